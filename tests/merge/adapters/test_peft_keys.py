"""Keys that PEFT did not write, read as it would have written them."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from zoo import build, write_adapter

import nsc_merge
from nsc_merge.adapters.peft_reader import outline_of

TARGETS = ["q_proj", "v_proj"]


def edited(folder, rename):
    weights = {rename(key): value for key, value in load_file(folder / "adapter_model.safetensors").items()}
    save_file(weights, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("rename", "note"),
    [
        (lambda key: f"_orig_mod.{key}", "_orig_mod, .*taken out of the keys"),
        (lambda key: key.replace("model.layers", "model._orig_mod.layers"), "_orig_mod, .*taken out of the keys"),
        (lambda key: key.replace("self_attn", "_fsdp_wrapped_module.self_attn"), "taken out of the keys"),
        (lambda key: f"module.{key}", "module.: taken off the keys"),
        (lambda key: f"module._orig_mod.{key}", "module.: taken off the keys"),
        (lambda key: f"_orig_mod.module.{key}", "module.: taken off the keys"),
        (lambda key: key.replace(".weight", ".default.weight"), ".default.: taken out of the keys"),
        (lambda key: key.removeprefix("base_model.model."), "base_model.model.: put before the keys"),
        (lambda key: f"base_model.model.{key}", "base_model.model. stood before the keys more than once"),
    ],
)
def test_keys_of_another_making_are_read_alike_with_a_note(tmp_path, rename, note):
    folder = write_adapter(build("llama"), tmp_path / "a", 1, r=4, target_modules=TARGETS)
    clean = nsc_merge.load_adapter(folder, "a")
    edited(folder, rename)
    read = nsc_merge.load_adapter(folder, "a")
    assert clean.notes == ()
    assert any(re.search(note, one) for one in read.notes)
    assert read.factors.keys() == clean.factors.keys() == outline_of(folder, "a")[0].factors.keys()
    for path, factor in clean.factors.items():
        assert torch.equal(read.factors[path].A, factor.A)
        assert torch.equal(read.factors[path].B, factor.B)


@pytest.mark.parametrize("end", [".weight", ".default", ".default.weight"])
def test_magnitudes_are_read_however_they_are_called(tmp_path, end):
    """PEFT reads all but ``.default``, of which it warns that the magnitude is missing."""
    folder = write_adapter(build("llama"), tmp_path / "a", 1, r=4, target_modules=TARGETS, use_dora=True)
    clean = nsc_merge.load_adapter(folder, "a")
    edited(folder, lambda key: re.sub("(lora_magnitude_vector).*", rf"\1{end}", key))
    read = nsc_merge.load_adapter(folder, "a")
    assert read.notes == ("lora_magnitude_vector: what followed it in the keys is taken off",)
    assert clean.factors.keys() == read.factors.keys()
    for path, factor in clean.factors.items():
        assert torch.equal(read.factors[path].magnitude, factor.magnitude)


def test_keys_that_would_become_one_are_refused(tmp_path):
    folder = write_adapter(build("llama"), tmp_path / "a", 1, r=4, target_modules=TARGETS)
    held = load_file(folder / "adapter_model.safetensors")
    key, value = next(iter(held.items()))
    twice = {**held, key.replace("model.layers", "model._orig_mod.layers"): value.clone()}
    save_file(twice, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"model._orig_mod.layers.*has lora_A only"):
        nsc_merge.load_adapter(folder, "a")
