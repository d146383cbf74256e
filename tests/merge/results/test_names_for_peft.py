"""Adapters of models whose tensors PEFT renames as it loads them: it finds what format ``lora`` wrote, and so do we."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from architectures import write_adapter
from peft import PeftModel
from safetensors.torch import load_file

import nsc_merge
from nsc_merge.models.merged import stacks
from nsc_merge.results.beside.serving_notes import serving_notes

NARROW = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


def pi0():
    """A policy of robots around PaliGemma, whose checkpoints have the projections of actions at the top."""
    torch.manual_seed(0)
    text = {"model_type": "gemma", "vocab_size": 64, "num_key_value_heads": 1, "head_dim": 16, **NARROW}
    vision = {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14, "projection_dim": 64, **NARROW}
    vlm = {"model_type": "paligemma", "text_config": text, "vision_config": vision, "projection_dim": 64}
    config = tf.PI0Config(vlm_config={**vlm, "image_token_id": 60}, dit_config=text, chunk_size=4, max_action_dim=8)
    return tf.PI0ForConditionalGeneration(config).eval()


def laguna():
    """With shared experts beside those that are chosen, whose name begins as that of older ones."""
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    own = {"vocab_size": 64, "num_key_value_heads": 2, "head_dim": 16, "shared_expert_intermediate_size": 32}
    return tf.LagunaForCausalLM(tf.LagunaConfig(**{**NARROW, **experts, **own})).eval()


FILE = "adapter_model.safetensors"
LOST = {
    pi0: r"embed_action_time\.(state_proj|action_in_proj|action_time_mlp_(in|out))|model\.dit.*\.[qv]_proj",
    laguna: r".*\.shared_experts?\.(gate|up|down)_proj|.*\.[qv]_proj",
}


def merged_of(model, targets, folder):
    """Of two adapters with several ranks each."""
    patterns = {"rank_pattern": {"q_proj": 1, "state_proj": 4, "gate_proj": 5}}
    folders = {
        task: write_adapter(model, folder / task, rank, r=rank, lora_alpha=rank, target_modules=targets, **patterns)
        for task, rank in (("a", 2), ("b", 3))
    }
    return nsc_merge.merge(model, folders, method="task_arithmetic", scale=0.3)


@pytest.mark.parametrize("build", LOST)
def test_what_peft_renames_is_written_as_it_finds_it(build, tmp_path):
    model = build()
    merged = merged_of(model, LOST[build], tmp_path)
    folder = merged.save(tmp_path / "out", "lora")
    assert not any("another name" in note for note in serving_notes(merged))
    written = {key.partition(".lora_")[0].removeprefix("base_model.model.") for key in load_file(folder / FILE)}
    assert written - set(merged.paths)
    held = PeftModel.from_pretrained(copy.deepcopy(model), folder)
    again = nsc_merge.merge(model, {"merged": folder}, method="task_arithmetic", scale=1.0)
    assert set(again.paths) == set(merged.paths)
    for path in merged.paths:
        torch.testing.assert_close(again.delta(path), merged.delta(path))
        torch.testing.assert_close(held.base_model.model.get_submodule(path).get_delta_weight("default"),
                                   merged.delta(path).float())  # fmt: skip


def test_what_has_no_name_that_peft_finds_is_told(monkeypatch, tmp_path):
    merged = merged_of(model := laguna(), LOST[laguna], tmp_path)
    monkeypatch.setattr(stacks, "_in_a_checkpoint", lambda path, model: None)
    folder = merged.save(tmp_path / "out", "lora")
    assert any("another name" in note for note in serving_notes(merged))
    written = {key.partition(".lora_")[0].removeprefix("base_model.model.") for key in load_file(folder / FILE)}
    assert written == set(merged.paths)
    again = nsc_merge.merge(model, {"merged": folder}, method="task_arithmetic", scale=1.0)
    for path in merged.paths:
        torch.testing.assert_close(again.delta(path), merged.delta(path))
