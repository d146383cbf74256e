"""Paths of adapters of other releases, and of a language model alone, on models of this one."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES

from nsc_merge.adapters import Adapter, Factor
from nsc_merge.adapters.adapter import TokenRows
from nsc_merge.models.fitting import renamed

TODAY = "model.language_model.layers.1.self_attn.v_proj"
SIGHTED = ("LLaVA-NeXT", "LLaVA-OneVision", "Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "PaliGemma")
CASES = [
    *((name, "language_model.model.layers.1.self_attn.v_proj", TODAY) for name in SIGHTED),
    *((name, "model.layers.1.self_attn.v_proj", TODAY) for name in (*SIGHTED, "LLaVA")),
    *((name, TODAY, TODAY) for name in SIGHTED),
    ("Qwen2-VL", "visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.qkv"),
    ("Qwen2.5-VL", "visual.blocks.1.attn.qkv", "model.visual.blocks.1.attn.qkv"),
    ("LLaVA-NeXT", "multi_modal_projector.linear_1", "model.multi_modal_projector.linear_1"),
    ("LLaVA-NeXT", "language_model.lm_head", "lm_head"),
    ("Idefics3", "model.layers.0.self_attn.q_proj", "model.text_model.layers.0.self_attn.q_proj"),
    (
        "Swin",
        "swin.encoder.layers.0.blocks.1.attention.self.value",
        "swin.encoder.layers.0.blocks.1.attention.v_proj",
    ),
    ("Swin", "swin.encoder.layers.0.blocks.1.output.dense", "swin.encoder.layers.0.blocks.1.mlp.fc2"),
    ("LLaMA", "layers.1.self_attn.v_proj", "model.layers.1.self_attn.v_proj"),
    ("LLaMA", "somewhere.else", "somewhere.else"),
]


@pytest.fixture(scope="module")
def models():
    with torch.device("meta"):
        return {name: ARCHITECTURES[name].build() for name in {case[0] for case in CASES}}


@pytest.mark.parametrize(("name", "path", "wanted"), CASES)
def test_paths_become_those_of_the_model(models, name, path, wanted):
    adapter = Adapter("a", {path: Factor(torch.zeros(1, 1), torch.zeros(1, 1), 1.0)})
    found = renamed({"a": adapter}, models[name])["a"]
    assert list(found.factors) == [wanted]
    note = f"1 module is called otherwise in this model: {path} is taken for {wanted}"
    assert found.notes == (() if path.endswith(wanted) or wanted.endswith(path) else (note,))
    assert renamed({"a": found}, models[name])["a"].notes == found.notes
    assert (wanted in dict(models[name].named_modules())) == (wanted != "somewhere.else")


def test_two_names_of_one_module_are_refused(models):
    factor = Factor(torch.zeros(1, 1), torch.zeros(1, 1), 1.0)
    twice = Adapter("a", {"language_model.model.layers.1.self_attn.v_proj": factor, TODAY: factor})
    with pytest.raises(ValueError, match="and another name both mean model.language_model.layers.1"):
        renamed({"a": twice}, models["LLaVA-NeXT"])
    rows = TokenRows((0,), torch.ones(1, 1))
    names = ("language_model.model.embed_tokens", "model.language_model.embed_tokens")
    with pytest.raises(ValueError, match="and another name both mean model.language_model.embed_tokens"):
        renamed({"a": Adapter("a", {}, token_rows=dict.fromkeys(names, rows))}, models["LLaVA-NeXT"])
