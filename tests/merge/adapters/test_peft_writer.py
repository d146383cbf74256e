"""Merged adapters of modules of which one's path is the end of another's: PEFT loads them, and the reader here."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from zoo import filled, write_adapter

import nsc_merge
from nsc_merge.adapters.peft_writer import rank_patterns
from nsc_merge.integrations.peft import merge as merge_loaded

EXACT = {"rtol": 1e-5, "atol": 1e-6}


class Toy(nn.Module):
    """As diffusers' Flux has ``proj_out`` beside ``single_transformer_blocks.0.proj_out``; without a configuration."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"proj_out": nn.Linear(8, 8)}) for _ in range(2))
        self.proj_out = nn.Linear(8, 8)

    def forward(self, x):
        for block in self.blocks:
            x = x + torch.tanh(block["proj_out"](x))
        return self.proj_out(x)


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
# What the first adapter is on (a list is of ends of names), and its rank; that of the second, on the blocks.
CASES = {"fewer above": ("proj_out", 3, 5), "more above": ("proj_out", 5, 3), "everywhere": (["proj_out"], 3, 3)}


def build():
    torch.manual_seed(0)
    return Toy().eval()


@pytest.mark.parametrize("case", CASES)
def test_a_pattern_of_ranks_is_of_its_module_alone(case, tmp_path):
    targets, first, second = CASES[case]
    folders = {
        "a": write_adapter(build(), tmp_path / "a", 1, r=first, target_modules=targets),
        "b": write_adapter(build(), tmp_path / "b", 2, r=second, target_modules=r"blocks\.\d\.proj_out"),
    }
    result = nsc_merge.merge(build(), folders, method="task_arithmetic", scale=0.5)
    with torch.no_grad():
        wanted = result.apply(build())(X)
        out = result.save(tmp_path / "out", "lora")
        torch.testing.assert_close(PeftModel.from_pretrained(build(), out)(X), wanted, **EXACT)
    read = nsc_merge.load_adapter(out, "m")
    for path in result.paths:
        torch.testing.assert_close(read.factors[path].delta(), result.delta(path), **EXACT)
    with pytest.raises(TypeError, match=r"format 'model' needs a transformers model, found Toy; save what"):
        result.save(tmp_path / "model", "model")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["alpha_pattern"] == config["rank_pattern"]


def test_a_pattern_stands_at_the_beginning_only_where_another_module_would_be_taken_for_it():
    ranks = {"proj.out": 3, "a.proj.out": 5, "b.proj.out": 4, "xproj.out": 5, "a.b.proj.out": 4}
    assert rank_patterns(ranks, 5) == {r"^proj\.out": 3, r"b\.proj\.out": 4, r"a\.b\.proj\.out": 4}
    assert rank_patterns({"out": 3, "a.out": 3, "b": 4}, 4) == {"out": 3, r"a\.out": 3}


def loaded():
    held = get_peft_model(build(), LoraConfig(r=3, target_modules="proj_out"), adapter_name="a")
    held.add_adapter("b", LoraConfig(r=5, target_modules=r"blocks\.\d\.proj_out"))
    return filled(held).float().eval()


def test_adapters_in_memory_are_merged_beside_each_other():
    held = loaded()
    merge_loaded(held, ["a", "b"], [0.5, 0.5], "mine", method="task_arithmetic")
    held.set_adapter("mine")
    base = held.get_base_model()
    ranks = {path: module.r["mine"] for path, module in base.named_modules() if path.endswith("proj_out")}
    assert ranks == {"blocks.0.proj_out": 5, "blocks.1.proj_out": 5, "proj_out": 3}
    wanted = copy.deepcopy(held)
    wanted.base_model.set_adapter(["a", "b"])
    for module in wanted.modules():
        if hasattr(module, "lora_A") and isinstance(module.scaling, dict):
            module.scaling = {name: 0.5 * value for name, value in module.scaling.items()}
    with torch.no_grad():
        torch.testing.assert_close(held(X), wanted(X), **EXACT)


@pytest.mark.parametrize("kind", ["PeftModel", "model"])
def test_an_adapter_that_could_not_be_filled_is_taken_off_again(kind, monkeypatch):
    held = loaded() if kind == "PeftModel" else loaded().base_model.model
    if kind == "model":
        held.peft_config = loaded().peft_config
    before = [name for name, _ in held.named_parameters()]
    active = [module.active_adapters for module in held.modules() if hasattr(module, "active_adapters")]

    def full(*given):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr("nsc_merge.integrations.peft._fill", full)
    with pytest.raises(torch.OutOfMemoryError):
        merge_loaded(held, ["a", "b"], [0.5, 0.5], "mine", method="task_arithmetic")
    assert list(held.peft_config) == ["a", "b"]
    assert [name for name, _ in held.named_parameters()] == before
    assert [module.active_adapters for module in held.modules() if hasattr(module, "active_adapters")] == active
    monkeypatch.undo()
    merge_loaded(held, ["a", "b"], [0.5, 0.5], "mine", method="task_arithmetic")
    assert list(held.peft_config) == ["a", "b", "mine"]
