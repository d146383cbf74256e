"""Tied weights that an adapter changes under one name or all: PEFT's forward, in every format; the model is kept."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from architectures import ARCHITECTURES
from peft import LoraConfig, PeftModel, get_peft_model
from zoo import DECODER, outputs

import nsc_merge
from nsc_merge.models.fitting import fit

EXACT = {"rtol": 1e-5, "atol": 1e-6}
HEAD, EMBEDDINGS = "lm_head", "model.embed_tokens"


def written(model, folder, seed, **config):
    """A PEFT folder with random values in what PEFT trains, tied names changed as one where PEFT ties them."""
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, **{"target_modules": ["q_proj"], **config}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in wrapped.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tied():
    torch.manual_seed(0)
    config = tf.LlamaConfig(**{**DECODER, "num_hidden_layers": 1}, tie_word_embeddings=True)
    return tf.LlamaForCausalLM(config).eval()


IDS = {"input_ids": torch.tensor([[1, 5, 2, 3, 8]])}
CASES = {
    "head": {"modules_to_save": ["lm_head"]},
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "LoRA on the embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "as one": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "LoRA as one": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "rows": {"trainable_token_indices": [1, 5, 2]},
    "rows of the head": {"trainable_token_indices": {"lm_head": [3, 1]}},
    "rows of each": {"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [3]}},
}


@pytest.mark.parametrize("case", CASES)
def test_a_tied_weight_is_merged_as_peft_runs_it(case, tied, tmp_path):
    folder = written(tied, tmp_path / "a", 1, **CASES[case])
    peft = PeftModel.from_pretrained(copy.deepcopy(tied), folder)
    wanted = outputs(peft.double(), IDS)
    before = outputs(tied, IDS)
    result = nsc_merge.merge(tied, {"a": folder}, method="task_arithmetic", scale=1.0)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert torch.equal(outputs(tied, IDS), before)
    assert result.model.model.layers[0].mlp.up_proj.weight is tied.model.layers[0].mlp.up_proj.weight
    exact = copy.deepcopy(result.model).double()
    with nsc_merge.attach(exact, result.adapters, 1.0):
        torch.testing.assert_close(outputs(exact, IDS), wanted, **EXACT)
    loaded = tf.LlamaForCausalLM.from_pretrained(result.save(tmp_path / "model", "model"))
    torch.testing.assert_close(outputs(loaded.double(), IDS), wanted, **EXACT)
    lora = PeftModel.from_pretrained(copy.deepcopy(tied), result.save(tmp_path / "lora", "lora"))
    torch.testing.assert_close(outputs(lora.double(), IDS), wanted, **EXACT)
    in_memory = nsc_merge.merge(tied, {"a": peft}, method="task_arithmetic", scale=1.0)
    assert sorted(in_memory.paths) == sorted(result.paths)


def test_applying_to_the_copy_counts_for_what_shares_its_tensors(tied, tmp_path):
    model = copy.deepcopy(tied)
    folder = written(model, tmp_path / "a", 1, modules_to_save=["lm_head"])
    first = nsc_merge.merge(model, {"a": folder}, method="task_arithmetic", scale=1.0)
    second = nsc_merge.merge(model, {"a": folder}, method="task_arithmetic", scale=1.0)
    first.apply(copy.deepcopy(first.model))
    second.save(tmp_path / "fine", "model")
    first.apply(first.model)
    with pytest.raises(ValueError, match="apply has changed it since this merge was made"):
        second.save(tmp_path / "late", "model")


def test_tied_weights_saved_as_the_base_has_them_stay_tied(tied, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    get_peft_model(copy.deepcopy(tied), config).save_pretrained(tmp_path)
    result = nsc_merge.merge(tied, {"a": tmp_path}, method="task_arithmetic")
    assert result.model is tied
    assert result.adapters["a"].notes == ("lm_head: saved in full with the base's values: left out",)


SCALED = {
    "Switch": (tf.SwitchTransformersForConditionalGeneration, tf.SwitchTransformersConfig),
    "UMT5": (tf.UMT5ForConditionalGeneration, tf.UMT5Config),
    "T5": (tf.T5ForConditionalGeneration, tf.T5Config),
}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
PAIR = {**IDS, "decoder_input_ids": torch.tensor([[0, 4, 9]])}


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize(
    "config",
    [{"target_modules": ["q", "lm_head"]}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5, 2]}],
    ids=str,
)
def test_a_head_whose_inputs_are_scaled_where_it_is_tied_stays_so_when_it_is_not(name, config, tmp_path):
    torch.manual_seed(0)
    kind, settings = SCALED[name]
    model = kind(settings(**T5)).eval()
    tied_as = model.config.tie_word_embeddings
    folder = written(model, tmp_path / "a", 1, **{"target_modules": ["q"], **config})
    wanted = outputs(PeftModel.from_pretrained(copy.deepcopy(model), folder).double(), PAIR)
    result = nsc_merge.merge(model, {"a": folder}, method="task_arithmetic", scale=1.0)
    exact = copy.deepcopy(result.model).double()
    with nsc_merge.attach(exact, result.adapters, 1.0):
        torch.testing.assert_close(outputs(exact, PAIR), wanted, **EXACT)
    applied = result.apply(copy.deepcopy(result.model))
    torch.testing.assert_close(outputs(applied.double(), PAIR), wanted, **EXACT)
    loaded = kind.from_pretrained(result.save(tmp_path / "model", "model"))
    torch.testing.assert_close(outputs(loaded.double(), PAIR), wanted, **EXACT)
    assert model.config.tie_word_embeddings is tied_as
    assert model.lm_head.weight is model.shared.weight


@pytest.mark.parametrize("name", ["T5", "UMT5"])
def test_a_way_out_of_tied_weights_names_the_setting_where_it_changes_nothing_else(name, tmp_path):
    kind, settings = SCALED[name]
    model = kind(settings(**T5)).eval()
    # T5 keeps apart whether the head's inputs are scaled; UMT5 does since transformers 5.24.
    advised = hasattr(model.config, "scale_decoder_outputs")
    assert advised or name == "UMT5"
    folder = written(model, tmp_path / "a", 1, target_modules=["q"], modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"weight is shared.weight too \(tied\)") as error:
        fit({"a": nsc_merge.load_adapter(folder, "a")}, model)
    assert ("tie_word_embeddings" in str(error.value)) is advised


def resized(name):
    """A model whose embeddings, resized, are one module under the names of encoder and decoder as well."""
    model = ARCHITECTURES[name].build()
    model.resize_token_embeddings(100, mean_resizing=False)
    assert model.get_input_embeddings() is model.get_encoder().embed_tokens
    return model, "q" if name == "T5" else "q_proj"


SHARED = {
    "LoRA": {"target_modules": ["shared"]},
    "whole": {"modules_to_save": ["shared"]},
    "as one": {"modules_to_save": ["shared"], "ensure_weight_tying": True},
    "rows": {"trainable_token_indices": {"shared": [3, 9]}},
}


@pytest.mark.parametrize("name", ["T5", "BART"])
@pytest.mark.parametrize("case", SHARED)
def test_one_module_under_several_names_is_merged_under_each_as_peft_runs_it(name, case, tmp_path):
    model, linear = resized(name)
    targets = [linear, *SHARED[case].get("target_modules", [])]
    folder = written(model, tmp_path / "a", 1, **{**SHARED[case], "target_modules": targets})
    wanted = outputs(PeftModel.from_pretrained(copy.deepcopy(model), folder).double(), PAIR)
    result = nsc_merge.merge(model, {"a": folder}, method="task_arithmetic", scale=1.0)
    assert model.get_input_embeddings() is model.get_encoder().embed_tokens
    exact = copy.deepcopy(result.model).double()
    with nsc_merge.attach(exact, result.adapters, 1.0):
        torch.testing.assert_close(outputs(exact, PAIR), wanted, **EXACT)
    torch.testing.assert_close(outputs(result.apply(copy.deepcopy(result.model)).double(), PAIR), wanted, **EXACT)
    loaded = type(model).from_pretrained(result.save(tmp_path / "model", "model"))
    torch.testing.assert_close(outputs(loaded.double(), PAIR), wanted, **EXACT)
    if case == "rows":
        with pytest.raises(ValueError, match=r"encoder.embed_tokens is merged .*saved and loaded anew"):
            result.save(tmp_path / "lora", "lora")
        model.save_pretrained(tmp_path / "base")
        model = type(model).from_pretrained(tmp_path / "base")
        result = nsc_merge.merge(model, {"a": folder}, method="task_arithmetic", scale=1.0)
    lora = PeftModel.from_pretrained(copy.deepcopy(model), result.save(tmp_path / "lora", "lora"))
    torch.testing.assert_close(outputs(lora.double(), PAIR), wanted, **EXACT)
