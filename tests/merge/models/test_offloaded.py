"""A base loaded over devices: what is on disk stays in its own files, and merges are those of the plain model."""

from __future__ import annotations

import gc
import importlib.util
import os
import tempfile
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from architectures import ARCHITECTURES
from loop_cases import adapters_for, llama, text_batches, trajectory, values
from safetensors.torch import load_file

import nsc_merge
from nsc_merge.models.bases import offloaded
from nsc_merge.models.bases.loading import load_model
from nsc_merge.models.bases.placement import Placement
from nsc_merge.models.bases.stored_weights import sharing, state_of, stored

PARTS = [f"model.{name}" for name in ("embed_tokens", "norm", "rotary_emb", *(f"layers.{n}" for n in range(4)))]
PLACES = {part: "disk" if part in ("model.layers.1", "model.layers.2") else "cpu" for part in (*PARTS, "lm_head")}
MAPS = {
    "mixed": {"device_map": PLACES},
    "disk": {"device_map": {"": "disk"}},
    "auto": {"device_map": "auto", "max_memory": {"cpu": "60KB"}},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    llama().save_pretrained(tmp_path / "base", max_shard_size="100KB")
    return tmp_path / "base"


def load(folder, **placement):
    return load_model(str(folder), local=True, placement=Placement(**placement))


def temporary():
    return sorted(Path(tempfile.gettempdir()).rglob("*"))


@pytest.mark.parametrize("name", MAPS)
def test_nsc_of_a_base_on_disk_is_that_of_the_plain_one(folder, name):
    if torch.cuda.is_available() and name == "auto":
        pytest.skip("the map would be over GPUs")
    model = load(folder, **MAPS[name])
    away = {path for path, value in model.named_parameters() if value.device.type == "meta"}
    assert away
    assert not temporary()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    plain = llama()
    adapters, batches = adapters_for(plain), text_batches()
    found, wanted = (trajectory(one, adapters, batches, steps=3, fold=False) for one in (model, plain))
    assert torch.equal(values(found), values(wanted))
    assert away == {path for path, value in model.named_parameters() if value.device.type == "meta"}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_what_is_in_memory_outlives_its_files(folder):
    model = load(folder, device_map=PLACES)
    for file in folder.glob("*.safetensors"):
        with file.open("r+b") as handle:
            handle.seek(os.path.getsize(file) // 2)
            handle.write(bytes(os.path.getsize(file) - os.path.getsize(file) // 2))
    expected = dict(llama().named_parameters())
    resident = {path: value for path, value in model.named_parameters() if value.device.type == "cpu"}
    assert len(resident) > 10
    assert all(torch.equal(value, expected[path]) for path, value in resident.items())


def test_what_waits_in_memory_for_a_device_gets_memory_of_its_own_and_stays_tied():
    model = llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    # Kept, so that no other tensor comes to their addresses.
    before = [value.detach() for value in model.parameters()]
    expected = logits(model)
    model = cpu_offload(model, torch.device("cpu"))
    offloaded.own_memory(model)
    held = [stored(model, f"{path}.weight").values.data_ptr() for path in ("lm_head", "model.layers.1.mlp.up_proj")]
    assert not {value.data_ptr() for value in before} & set(held)
    assert sharing(model)["lm_head.weight"] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert torch.equal(logits(model), expected)


def logits(model):
    with torch.no_grad():
        return model(**text_batches(1)["a"][0]).logits


def test_a_merge_on_disk_is_saved_whole(folder, tmp_path):
    model, plain = load(folder, device_map={"": "disk"}, dtype="float64"), llama().double()
    adapters = adapters_for(plain)
    saved = [
        nsc_merge.merge(one, adapters, method="task_arithmetic").save(tmp_path / name, "model")
        for name, one in (("disk", model), ("plain", plain))
    ]
    found, wanted = ({k: v for file in out.glob("*.safetensors") for k, v in load_file(file).items()} for out in saved)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[path]) for path, value in found.items())


def test_one_device_takes_the_whole_model(folder):
    model = load(folder, device_map={"": "cpu"})
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    state = state_of(model)
    assert all(torch.equal(value, state[path]) for path, value in llama().state_dict().items())
    assert not temporary()


def test_what_had_to_be_written_for_a_model_goes_with_it(folder):
    def write(**settings):
        (Path(settings["offload_folder"]) / "weight.safetensors").touch()
        return llama()

    model = offloaded.load_over_devices(write, Placement(device_map={"": "disk"}))
    assert [path.name for path in temporary()][1:] == ["weight.safetensors"]
    del model
    gc.collect()
    assert not temporary()

    def fail(**settings):
        write(**settings)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        offloaded.load_over_devices(fail, Placement(device_map="auto"))
    assert not temporary()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"model.layers": "cpu", "lm_head": "disk"}, "expected a device for every module, found .*embed_tokens"),
        ({"": "cpu", "layers.1": "disk"}, "expected paths of modules of Llama.*, found 'layers.1'"),
    ],
)
def test_a_map_that_cannot_be_is_refused(folder, given, words):
    with pytest.raises(ValueError, match=f"(?s)device_map.*{words}"):
        load(folder, device_map=given)
    assert not temporary()


def test_accelerate_is_asked_for(folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else find(name))
    with pytest.raises(RuntimeError, match="device_map needs accelerate, .*pip install accelerate"):
        load(folder, device_map="auto")


def test_conv1d_that_is_offloaded_is_named_with_the_way_out():
    model = ARCHITECTURES["GPT-2"].build()
    path = "transformer.h.0.attn.c_attn"
    factors = {path: nsc_merge.Factor(torch.randn(2, 32), torch.randn(96, 2), 1.0)}
    adapters = {task: nsc_merge.Adapter(task, factors) for task in "ab"}
    wanted = nsc_merge.merge(model, adapters, method="ties").delta(path)
    cpu_offload(model)
    assert torch.equal(nsc_merge.merge(model, adapters, method="ties").delta(path), wanted)
    match = f"{path}: expected a Conv1D in memory, found it offloaded; load the model without device_map"
    with pytest.raises(ValueError, match=match), nsc_merge.attach(model, adapters, 0.4):
        pass
