"""The keys of a recipe that say how the base model is held."""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import yaml
from cli_cases import make_place
from zoo import build

from nsc_merge.commands.main import main
from nsc_merge.models.bases.placement import KINDS, PLAIN, Placement
from nsc_merge.processes.group import Group
from nsc_merge.recipes import preflight, run, saved_result
from nsc_merge.recipes.forecast.estimate import STORED
from nsc_merge.recipes.merge_recipe import load_recipe
from nsc_merge.recipes.placement_keys import QUANTIZATIONS
from nsc_merge.recipes.yaml_keys import RecipeError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(build("llama-cls"), tmp_path_factory.mktemp("place"))


def read(place, *overrides):
    return load_recipe(place / "recipe.yaml", [*overrides, f"output.dir={place / 'merged'}"])


def test_every_way_to_quantise_has_its_bytes():
    assert [*STORED] == [*KINDS]
    assert ("none", *KINDS, PLAIN) == QUANTIZATIONS


def test_the_keys_become_a_placement(place):
    assert read(place).placement == Placement()
    spread = read(place, "device_map=auto", "max_memory={0: 20GiB, 1: 0, cpu: 1000}", "dtype=bfloat16").placement
    assert spread == Placement("bfloat16", device_map="auto", max_memory={0: "20GIB", 1: 0, "cpu": 1000})
    mapped = read(place, "device_map={model.embed_tokens: cpu, model.layers: 0, model.norm: 'cuda:1', score: disk}")
    assert mapped.placement.device_map == {
        "model.embed_tokens": "cpu",
        "model.layers": 0,
        "model.norm": "cuda:1",
        "score": "disk",
    }
    for kind in QUANTIZATIONS[1:]:
        assert read(place, f"quantization={kind}", "output.formats=lora").placement.quantization == kind
    assert read(place, "quantization=none").placement.quantization is None
    assert read(place, "quantization=null").placement.quantization is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["device_map=automatic"], "device_map: expected one of ['auto', "),
        (["device_map={}"], "device_map: expected one of"),
        (["device_map={model: gpu}"], "device_map.model: expected the number of a GPU, cuda:N, cpu or disk"),
        (["device_map={model: -1}"], "device_map.model: expected the number of a GPU"),
        (["device_map={0: cpu}"], "device_map: expected module paths, found 0"),
        (["device_map=auto", "device=cpu"], "device_map: spreads the model over devices, but device asks for 'cpu'"),
        (["max_memory={0: 20GiB}"], "max_memory: bounds a device_map of"),
        (["max_memory={0: 20GiB}", "device_map={model: cpu}"], "found a mapping, which says all there is to say"),
        (["max_memory=20GiB", "device_map=auto"], "max_memory: expected devices with a size each, found '20GiB'"),
        (["max_memory={0: much}", "device_map=auto"], "max_memory.0: expected a size such as 20GiB, found 'much'"),
        (["max_memory={0: true}", "device_map=auto"], "max_memory.0: expected a size such as 20GiB, found True"),
        (["max_memory={0: -1}", "device_map=auto"], "max_memory.0: expected a size such as 20GiB, found -1"),
        (["max_memory={gpu: 1GiB}", "device_map=auto"], "max_memory: expected cpu or the number of a GPU, found 'gpu'"),
        (["quantization=int3"], "quantization: expected one of ['none', 'bitsandbytes-8bit', "),
        (["output.dequantize=1"], "output.dequantize: expected true or false"),
        (["output.dequantize=true", "output.formats=lora"], "output.dequantize: only format 'model'"),
    ],
)
def test_what_is_no_placement_is_refused_when_it_is_read(place, overrides, message):
    with pytest.raises(RecipeError) as error:
        read(place, *overrides)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "processes", "message"),
    [
        (["device_map=auto"], 2, "device_map: several processes hold a plain base in shards"),
        (["quantization=fp8", "output.formats=lora"], 2, "quantization: several processes hold a plain base"),
        (["device_map={model: 98}"], 1, "GPUs that PyTorch"),
        (["device_map=auto", "max_memory={98: 1GiB}"], 1, "GPUs that PyTorch"),
        (["quantization=fp8"], 1, "output.formats: a model of plain numbers takes a plain base"),
    ],
)
def test_what_cannot_be_had_here_is_refused_before_anything_is_loaded(
    place, monkeypatch, overrides, processes, message
):
    monkeypatch.setattr(preflight, "current", lambda: Group(0, processes))
    with pytest.raises(RecipeError) as error:
        preflight.check(read(place, *overrides), resume=False)
    assert message in str(error.value)


def test_modules_trained_in_full_take_a_base_that_is_whole(place, monkeypatch):
    """In shards it is whole in no process; a base in a folder is read from there once more."""
    part, whole = (SimpleNamespace(factors={"q": SimpleNamespace(dense=dense)}) for dense in (None, torch.ones(1)))
    shards, hub = partial(Group, 0, 2), ("model=me/base", "device=cpu")
    for processes, overrides, adapter in (
        (Group, hub, whole),
        (shards, [], whole),
        (shards, [*hub, "output.formats=[coefficients, model]"], whole),
        (shards, hub, part),
    ):
        monkeypatch.setattr(run, "current", processes)
        run._check_whole(read(place, *overrides), {"nli": adapter})
    with pytest.raises(RecipeError, match=r"output\.formats: expected .* from 2 processes, .*\(q\), found lora"):
        run._check_whole(read(place, *hub), {"nli": part, "topic": whole})


def test_a_quantised_base_needs_no_key_and_takes_none(place, tmp_path, monkeypatch):
    base = tmp_path / "base"
    base.mkdir()
    config = json.loads((place / "base" / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    preflight.check(read(place, f"model={base}", "output.formats=lora"), resume=False)
    preflight.check(read(place, f"model={base}", "output.dequantize=true"), resume=False)
    with pytest.raises(RecipeError, match="output.formats: .* found one quantised as gptq; expected output.dequantize"):
        preflight.check(read(place, f"model={base}"), resume=False)
    with pytest.raises(RecipeError, match=r"quantization: the base in .* is quantised already \(gptq\)"):
        preflight.check(read(place, f"model={base}", "quantization=fp8", "output.formats=lora"), resume=False)
    with pytest.raises(RecipeError, match=r"quantization: dequantize is for .* found one quantised by gptq"):
        preflight.check(read(place, f"model={base}", "quantization=dequantize"), resume=False)
    with pytest.raises(RecipeError, match=r"quantization: dequantize is for .* found one in plain numbers"):
        preflight.check(read(place, "quantization=dequantize"), resume=False)
    monkeypatch.setattr(preflight, "current", lambda: Group(0, 2))
    with pytest.raises(RecipeError, match=r"model: several processes hold a plain base in shards, .*\(gptq\)"):
        preflight.check(read(place, f"model={base}", "output.formats=lora"), resume=False)


def test_a_base_read_as_plain_numbers_is_written_as_any(place, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    config = json.loads((place / "base" / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    preflight.check(read(place, f"model={base}", "quantization=dequantize"), resume=False)
    with pytest.raises(RecipeError, match="output.formats: .* found one quantised as fp8; expected output.dequantize"):
        preflight.check(read(place, f"model={base}"), resume=False)


def test_the_record_leads_to_the_same_placement(place, monkeypatch):
    """Loading itself is as the models have it; here only what it is asked for."""
    asked = []

    def load(name, *, local, placement, digest, **_):
        asked.append(placement)
        return original(name, local=local, digest=digest)

    original = run.load_model
    for module in (run, saved_result):
        monkeypatch.setattr(module, "load_model", load)
    keys = {"device_map": {"model": "cpu", "score": 0}, "quantization": "torchao-int8", "dtype": "float32"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    overrides = [f"{key}={json.dumps(value)}" for key, value in keys.items()]
    overrides += ["output.formats=coefficients", "options.steps=1", f"output.dir={place / 'placed'}"]
    assert main(["run", str(place / "recipe.yaml"), *overrides]) == 0
    written = yaml.safe_load((place / "placed" / "recipe.yaml").read_text())
    assert {key: written[key] for key in keys} == keys
    again = load_recipe(place / "placed" / "recipe.yaml")
    assert again.placement == asked[0] == Placement(**keys)
    saved_result.load_result(place / "placed")
    assert asked[1].quantization == "torchao-int8"
