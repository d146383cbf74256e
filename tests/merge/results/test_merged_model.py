"""Format "model", written from the base's files or from memory: every number as if the sum had been formed whole."""

from __future__ import annotations

import copy
import json
from functools import partial

import pytest
import torch
import transformers as tf
import zoo
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import nsc_merge
from nsc_merge.models.bases import numbers
from nsc_merge.models.bases.loading import load_model
from nsc_merge.models.bases.placement import Placement
from nsc_merge.results import merged_model
from nsc_merge.results.safetensors_writer import Planned, in_order, write_safetensors

INDEX = "model.safetensors.index.json"


def llama(**settings):
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**zoo.DECODER, **zoo.TOKENS, **settings))


# How the base is, what the adapters train, and how base and merge are written.
CASES = {
    "shards": (lambda: llama().bfloat16(), {"target_modules": "all-linear"}, {"max_shard_size": "20KB"}),
    "tied": (lambda: llama(tie_word_embeddings=True).half(), {"target_modules": ["q_proj"]}, {}),
    "renamed biases": (lambda: zoo.build("vit"), {"target_modules": ["k_proj"], "lora_bias": True}, {}),
    "renamed shards": (lambda: zoo.build("llava"), {"target_modules": zoo.LANGUAGE}, {"max_shard_size": "40KB"}),
    "dense": (
        lambda: llama().bfloat16(),
        {"target_modules": ["down_proj"], "modules_to_save": ["lm_head"]},
        {},
    ),
}


def written(case, folder):
    """The base and two adapters of it, in folders."""
    build, config, settings = CASES[case]
    base = build().eval()
    base.save_pretrained(folder / "base", **settings)
    adapters = {f"t{seed}": zoo.write_adapter(base, folder / f"t{seed}", seed, r=3, **config) for seed in (1, 2)}
    return folder / "base", adapters


def load(folder, *, loaded=True, dtype="auto"):
    return load_model(str(folder), local=True, placement=Placement(device="cpu", dtype=dtype, numbers=loaded))


def tensors(folder):
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def expected(result, folder):
    """As ``save_pretrained`` writes them, with every sum formed whole and rounded once."""
    model = load(folder, dtype=str(next(result.model.parameters()).dtype).removeprefix("torch."))
    state = model.state_dict()
    for path in result.paths:
        linear = model.get_submodule(path)
        delta = torch.stack([lam * factor.delta() for lam, factor in result.terms(path)]).sum(0)
        state[f"{path}.weight"] = (linear.weight.double() + delta).to(linear.weight.dtype)
        biases = [lam * factor.bias_delta() for lam, factor in result.terms(path) if factor.bias is not None]
        if biases:
            state[f"{path}.bias"] = (linear.bias.double() + torch.stack(biases).sum(0)).to(linear.bias.dtype)
    place = folder.with_name("expected")
    model.save_pretrained(place, state_dict=state)
    return tensors(place)


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_numbers_names_and_files_are_those_of_the_base_but_for_the_sums(case, loaded, tmp_path):
    base, adapters = written(case, tmp_path)
    result = nsc_merge.merge(load(base, loaded=loaded), adapters, method="task_arithmetic", scale=0.7)
    assert {one.device.type for one in result.model.parameters()} == ({"cpu"} if loaded else {"meta"})
    out = result.save(tmp_path / "out", "model")
    wanted = expected(result, base)
    same(tensors(out), wanted)
    assert sum(not torch.equal(value, wanted[key]) for key, value in tensors(base).items()) >= len(result.paths)
    # Every file has the header of the base's, byte by byte.
    assert {file.name for file in out.glob("model*")} == {file.name for file in base.glob("model*")}
    for file in base.glob("model*.safetensors"):
        raw = file.read_bytes()
        head = raw[: 8 + int.from_bytes(raw[:8], "little")]
        assert (out / file.name).read_bytes()[: len(head)] == head
        assert len(raw) == (out / file.name).stat().st_size
    assert not (base / INDEX).exists() or (base / INDEX).read_bytes() == (out / INDEX).read_bytes()
    for file in (tmp_path / "expected").glob("*.json"):
        if file.name != INDEX:
            assert (out / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("loaded", [True, False])
def test_another_dtype_or_size_is_written_in_files_of_its_own(loaded, tmp_path):
    base, adapters = written("shards", tmp_path)
    wide = nsc_merge.merge(load(base, loaded=loaded, dtype="float32"), adapters, method="task_arithmetic")
    out = wide.save(tmp_path / "wide", "model")
    same(tensors(out), expected(wide, base))
    assert [file.name for file in out.glob("model*")] == ["model.safetensors"]
    result = nsc_merge.merge(load(base, loaded=loaded), adapters, method="task_arithmetic")
    out = result.save(tmp_path / "out", "model", max_shard_size="10KB")
    wanted = expected(result, base)
    same(tensors(out), wanted)
    whole = load(base)
    whole.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    theirs, ours = (json.loads((place / INDEX).read_text()) for place in (tmp_path / "theirs", out))
    assert ours["metadata"] == theirs["metadata"]
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    assert len(set(ours["weight_map"].values())) > len(list(base.glob("*.safetensors")))
    type(whole).from_pretrained(out)


def test_the_model_is_written_as_it_is_now_and_not_as_its_files_are(tmp_path):
    base, adapters = written("shards", tmp_path)
    model = load(base)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    result = nsc_merge.merge(model, adapters, method="task_arithmetic")
    merged = result.merged(model)
    found = tensors(result.save(tmp_path / "out", "model"))
    same(found, {**model.state_dict(), **merged})


@pytest.mark.parametrize("loaded", [True, False])
def test_a_base_whose_shards_have_other_names_is_written_in_files_of_its_own(loaded, tmp_path):
    base, adapters = written("shards", tmp_path)
    told = json.loads((base / INDEX).read_text())
    names = told["weight_map"]
    place = names["lm_head.weight"]
    names.update({key: "weights.safetensors" for key, name in names.items() if name == place})
    (base / place).rename(base / "weights.safetensors")
    (base / INDEX).write_text(json.dumps(told))
    result = nsc_merge.merge(load(base, loaded=loaded), adapters, method="task_arithmetic")
    out = result.save(tmp_path / "out", "model")
    assert [file.name for file in out.glob("*.safetensors*")] == ["model.safetensors"]
    same(tensors(out), expected(result, base))


@pytest.mark.parametrize("loaded", [True, False])
def test_what_transformers_writes_otherwise_than_as_it_is_is_written_from_memory(loaded, tmp_path, caplog):
    torch.manual_seed(0)
    base = tf.MixtralForCausalLM(tf.MixtralConfig(**zoo.DECODER, **zoo.TOKENS, num_local_experts=2)).eval()
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    adapters = {"a": zoo.write_adapter(base, tmp_path / "a", 1, target_modules=["q_proj"])}
    caplog.set_level("INFO", logger="nsc_merge")
    result = nsc_merge.merge(load(tmp_path / "base", loaded=loaded), adapters, method="task_arithmetic")
    assert {one.device.type for one in result.model.parameters()} == {"cpu"}
    out = result.save(tmp_path / "out", "model")
    same(tensors(out), expected(result, tmp_path / "base"))
    assert "written from memory: transformers converts its tensors" in caplog.text


def test_numbers_are_not_saved_as_the_codes_that_their_configuration_speaks_of(tmp_path):
    base, adapters = written("dense", tmp_path)
    file = base / "config.json"
    told = {"quant_method": "modelopt", "quant_algo": "FP8"}
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": told}))
    model = tf.AutoModelForCausalLM.from_pretrained(base)
    result = nsc_merge.merge(model, adapters, method="task_arithmetic")
    with pytest.raises(ValueError, match=r"model.config says that the weights are quantised \(modelopt"):
        result.save(tmp_path / "out", "model")
    assert not (tmp_path / "out").exists()
    del model.config.quantization_config
    out = result.save(tmp_path / "out", "model")
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


def test_no_more_than_some_rows_of_a_tensor_are_in_memory(tmp_path, monkeypatch):
    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **kwargs or {})
            if isinstance(found, torch.Tensor) and found.device.type != "meta":
                self.bytes = max(self.bytes, found.nbytes)
            return found

    base, adapters = written("shards", tmp_path)
    result = nsc_merge.merge(load(base, loaded=False), adapters, method="task_arithmetic")
    monkeypatch.setattr(numbers, "_TILE", 16 * 32 * 8)
    monkeypatch.setattr(merged_model, "_PIECE", 512)
    with Largest() as largest:
        out = result.save(tmp_path / "out", "model")
    same(tensors(out), expected(result, base))
    # Sixteen rows of the widest linear in float64; its weight alone has 48.
    assert largest.bytes == 16 * 48 * 8


def test_a_base_that_changes_between_loading_and_saving_is_refused(tmp_path):
    base, adapters = written("shards", tmp_path)
    file = sorted(base.glob("*.safetensors"))[-1]
    whole = file.read_bytes()

    def other():
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))

    for change in (other, lambda: file.write_bytes(whole[:-4]), file.unlink):
        file.write_bytes(whole)
        result = nsc_merge.merge(load(base, loaded=False), adapters, method="task_arithmetic")
        change()
        with pytest.raises((ValueError, OSError), match=f"({file.name} has changed since it was loaded|No such file)"):
            result.save(tmp_path / "out", "model")
        assert not (tmp_path / "out").exists()


def test_files_that_hold_more_than_the_model_are_not_followed(tmp_path, caplog):
    base, adapters = written("dense", tmp_path)
    held = load_file(base / "model.safetensors")
    save_file({**held, "model.rotary.inv_freq": torch.ones(2)}, base / "model.safetensors", metadata={"format": "pt"})
    caplog.set_level("INFO", logger="nsc_merge")
    result = nsc_merge.merge(load(base, loaded=False), adapters, method="task_arithmetic")
    same(tensors(result.save(tmp_path / "out", "model")), expected(result, base))
    assert "not divided into files as the base is: model.rotary.inv_freq in model.safetensors" in caplog.text


def test_a_file_is_as_safetensors_writes_it(tmp_path):
    values = {
        "b": torch.randn(5, 3),
        "a": torch.randn(4, 2, dtype=torch.float64),
        "ü": torch.randn(3).bfloat16(),
        "scalar": torch.tensor(0.7, dtype=torch.float64),
        "none": torch.empty(0, 4),
        "flags": torch.tensor([True, False, True]),
    }
    planned = {
        name: Planned(value.dtype, tuple(value.shape), partial(iter, value.split(2) if value.dim() else [value]))
        for name, value in values.items()
    }
    counts = []
    write_safetensors(tmp_path / "ours", in_order(planned), counts.append)
    save_file(values, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert sum(counts) == sum(value.nbytes for value in values.values())
    short = Planned(torch.float32, (3,), lambda: iter([torch.zeros(2)]))
    with pytest.raises(RuntimeError, match="expected pieces of as many bytes as the tensors have"):
        write_safetensors(tmp_path / "short", {"x": short}, counts.append)


class Mixed(nn.Module, PyTorchModelHubMixin):
    """A model that is saved and loaded by huggingface_hub, as Moirai and GLiNER are."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def test_a_model_with_the_hub_s_mixin_is_saved_with_the_merge_in_it(tmp_path):
    model = Mixed(width=8)
    factors = {f"layers.{number}": nsc_merge.Factor(torch.randn(2, 8), torch.randn(8, 2), 1.0) for number in (0, 1)}
    adapters = {task: nsc_merge.Adapter(task, factors) for task in "ab"}
    result = nsc_merge.merge(model, adapters, method="task_arithmetic", scale=0.5)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    loaded = Mixed.from_pretrained(result.save(tmp_path / "out", "model"))
    wanted = result.apply(copy.deepcopy(model)).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in loaded.state_dict().items())
    assert not torch.equal(wanted["layers.0.weight"], base["layers.0.weight"])
    assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items())
    assert "2 LoRA adapters merged" in (tmp_path / "out" / "README.md").read_text()
