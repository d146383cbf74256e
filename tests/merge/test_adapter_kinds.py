"""The second table of docs/architectures.md: what becomes of each kind of adapter that PEFT writes."""

from __future__ import annotations

import copy
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from architectures import PAGE
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from zoo import DECODER, outputs, text, write_adapter

import nsc_merge

LINEARS = {"target_modules": ["q_proj", "v_proj"]}
MERGED: dict[str, dict[str, Any]] = {
    "LoRA, unequal ranks (`rank_pattern`)": {**LINEARS, "rank_pattern": {"q_proj": 5}},
    "rsLoRA": {**LINEARS, "use_rslora": True},
    "`lora_bias`": {**LINEARS, "lora_bias": True},
    "`fan_in_fan_out` set on linears": {**LINEARS, "fan_in_fan_out": True},
    "DoRA": {**LINEARS, "use_dora": True},
    "LoRA on embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA on `lm_head`": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings in `modules_to_save`": {**LINEARS, "modules_to_save": ["embed_tokens"]},
    "`lm_head` in `modules_to_save`": {**LINEARS, "modules_to_save": ["lm_head"]},
    "norms in `modules_to_save`": {**LINEARS, "modules_to_save": ["input_layernorm", "norm"]},
    "`trainable_token_indices`": {**LINEARS, "trainable_token_indices": {"embed_tokens": [3, 11]}},
}
TIED = {
    "tied weights: LoRA on `lm_head` alone": {"target_modules": ["q_proj", "lm_head"]},
    "tied weights: embeddings in `modules_to_save`": {**LINEARS, "modules_to_save": ["embed_tokens"]},
    "tied weights: `ensure_weight_tying`": {
        **LINEARS,
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
}
REFUSED = {
    "QALoRA": ({"use_qalora": True}, "QALoRA pools the input.*serve its adapter by itself"),
    "PiSSA, OLoRA, LoftQ and others that change the base": (
        {"init_lora_weights": "pissa"},
        "path_initial_model_for_weight_conversion",
    ),
    "activated LoRA": ({"alora_invocation_tokens": [1, 2]}, "serve its adapter by itself"),
    "biases of the base (`bias=\"all\"`)": ({"bias": "all"}, "bias: expected 'none'.*train with bias='none'"),
}
LINES = PAGE.read_text(encoding="utf-8").splitlines()


def base(*, tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER, attention_bias=True, tie_word_embeddings=tied)).double().eval()


def by_peft(model: nn.Module, folder: Path, inputs: dict[str, Tensor]) -> Tensor:
    return outputs(PeftModel.from_pretrained(copy.deepcopy(model), folder).double(), inputs)


@pytest.mark.parametrize("kind", [*MERGED, *TIED])
def test_merged_kinds_compute_what_peft_does(kind: str, tmp_path: Path) -> None:
    model = base(tied=kind in TIED)
    folder = write_adapter(model, tmp_path / "a", 1, r=3, lora_alpha=5, **{**MERGED, **TIED}[kind])
    result = nsc_merge.merge(model, {"a": folder}, method="task_arithmetic", scale=1.0)
    expected = by_peft(model, folder, text(1))
    own = copy.deepcopy(result.model)
    torch.testing.assert_close(outputs(result.apply(own), text(1)), expected, rtol=1e-6, atol=1e-7)
    again = PeftModel.from_pretrained(copy.deepcopy(model), result.save(tmp_path / "lora", "lora")).double()
    torch.testing.assert_close(outputs(again, text(1)), expected, rtol=1e-5, atol=1e-6)
    assert f"| {kind} | merged |" in "\n".join(LINES)


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_kinds_name_cause_and_cure(kind: str, tmp_path: Path) -> None:
    setting, cure = REFUSED[kind]
    folder = write_adapter(base(), tmp_path / "a", 1, r=2, **LINEARS)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **setting}))
    with pytest.raises(ValueError, match=cure):
        nsc_merge.load_adapter(folder, "a")
    assert f"| {kind} | refused |" in "\n".join(LINES)


def test_what_mergekit_leaves_unchanged_is_left_out(tmp_path: Path) -> None:
    """mergekit-extract-lora lists embeddings and norms in modules_to_save, be they the base's or not."""
    model = base()
    folder = write_adapter(model, tmp_path / "a", 1, r=3, **LINEARS)
    config = json.loads((folder / "adapter_config.json").read_text())
    names = ["embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm"]
    (folder / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": names}))
    weights = load_file(folder / "adapter_model.safetensors")
    whole = {key: value for key, value in model.state_dict().items() if key.split(".")[-2] in names}
    save_file(
        {**weights, **{f"base_model.model.{key}": value.clone() for key, value in whole.items()}},
        folder / "adapter_model.safetensors",
    )
    result = nsc_merge.merge(model, {"a": folder}, method="task_arithmetic", scale=1.0)
    assert result.paths == list(nsc_merge.load_adapter(folder, "a").factors)
    assert any("lm_head" in note for note in result.adapters["a"].notes)
    assert "| mergekit-extract-lora | merged |" in "\n".join(LINES)


def same(read: nsc_merge.Adapter, wanted: nsc_merge.Adapter) -> bool:
    pairs = [(read.factors[path], factor) for path, factor in wanted.factors.items()]
    return all(torch.equal(one.A, other.A) and torch.equal(one.B, other.B) for one, other in pairs)


def run(message: str) -> None:
    """The one line that a message asks for."""
    exec(shlex.split(message[message.index("python -c") :])[2], {})


def test_pickles_and_parts_are_converted_by_the_line_that_the_message_names(tmp_path: Path) -> None:
    folder = write_adapter(base(), tmp_path / "it's a", 1, r=2, **LINEARS)
    wanted = nsc_merge.load_adapter(folder, "a")
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    file.unlink()
    torch.save(weights, folder / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pickles are never opened.*weights_only=True") as caught:
        nsc_merge.load_adapter(folder, "a")
    run(str(caught.value))
    assert same(nsc_merge.load_adapter(folder, "a"), wanted)
    file.unlink()
    (folder / "adapter_model.bin").unlink()
    keys = sorted(weights)
    for number, half in enumerate((keys[::2], keys[1::2]), 1):
        save_file({key: weights[key] for key in half}, folder / f"adapter_model-0000{number}-of-00002.safetensors")
    with pytest.raises(FileNotFoundError, match="parts not put together") as caught:
        nsc_merge.load_adapter(folder, "a")
    run(str(caught.value))
    assert same(nsc_merge.load_adapter(folder, "a"), wanted)


def test_dora_is_approximated_when_asked(tmp_path: Path) -> None:
    model = base()
    folder = write_adapter(model, tmp_path / "a", 1, r=3, use_dora=True, **LINEARS)
    result = nsc_merge.merge(model, {"a": folder}, method="task_arithmetic", scale=1.0, dora="convert")
    assert any("DoRA converted at rank 3, relative error" in note for note in result.adapters["a"].notes)


def test_adapters_of_experts_are_merged_where_the_model_has_these(tmp_path: Path) -> None:
    """Values: tests/merge/models/test_experts.py."""
    assert "| experts of a fused parameter (`target_parameters`) | merged |" in "\n".join(LINES)
    assert "| LoRA on single experts, as transformers 4 had them | merged |" in "\n".join(LINES)
    model = get_peft_model(base(), LoraConfig(r=2, target_modules=["gate_proj"]))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    renamed = {key.replace("mlp.gate_proj", "block_sparse_moe.experts.0.w1"): value for key, value in weights.items()}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["w1"]}))
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"adapted modules are not in LlamaForCausalLM, for example .*experts\.0\.w1"):
        nsc_merge.merge(base(), {"a": tmp_path}, method="task_arithmetic")
