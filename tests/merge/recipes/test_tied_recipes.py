"""Recipes on a base with tied weights, or of adapters with more tokens: as in memory, and read back."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
import yaml
from zoo import DECODER, outputs, text, write_adapter

import nsc_merge
from nsc_merge.recipes.merge_recipe import load_recipe
from nsc_merge.recipes.run import run
from nsc_merge.recipes.saved_result import load_result


@pytest.mark.parametrize("added_tokens", ["refuse", "mean"])
def test_a_recipe_merges_on_tied_weights_as_in_memory(added_tokens, tmp_path):
    torch.manual_seed(0)
    config = tf.LlamaConfig(**{**DECODER, "num_hidden_layers": 1}, tie_word_embeddings=True)
    model = tf.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    settings = {"r": 4, "target_modules": ["q_proj"]}
    folders = {
        "head": write_adapter(model, tmp_path / "head", 1, **settings, modules_to_save=["lm_head"]),
        "rows": write_adapter(model, tmp_path / "rows", 2, **settings, trainable_token_indices=[1, 5]),
    }
    if added_tokens == "mean":
        larger = copy.deepcopy(model)
        larger.resize_token_embeddings(67)
        whole = ["embed_tokens", "lm_head"]
        folders["larger"] = write_adapter(larger, tmp_path / "larger", 3, **settings, modules_to_save=whole)
    document = {
        "model": str(tmp_path / "base"),
        "adapters": {task: str(folder) for task, folder in folders.items()},
        "method": "task_arithmetic",
        "options": {"scale": 0.5},
        "added_tokens": added_tokens,
        "output": {"dir": str(tmp_path / "out"), "formats": ["coefficients", "model"]},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document))
    run(load_recipe(tmp_path / "recipe.yaml"), resume=False, log=lambda line: None)
    result = nsc_merge.merge(model, folders, method="task_arithmetic", scale=0.5, added_tokens=added_tokens)
    wanted = outputs(result.apply(copy.deepcopy(result.model)), text(3))
    written = tf.LlamaForCausalLM.from_pretrained(tmp_path / "out" / "model")
    torch.testing.assert_close(outputs(written, text(3)), wanted, rtol=1e-6, atol=1e-6)
    assert written.config.vocab_size == (67 if added_tokens == "mean" else 64)
    again = load_result(tmp_path / "out")
    torch.testing.assert_close(outputs(again.apply(again.model), text(3)), wanted, rtol=1e-6, atol=1e-6)
