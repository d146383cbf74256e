"""Embeddings and heads that PEFT saves of the base, whatever a family calls them: against PEFT's own forward."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from architectures import ARCHITECTURES
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from zoo import outputs

import nsc_merge
from nsc_merge.adapters import outline_of
from nsc_merge.adapters.formats.parameter_stacks import updates_of

WEIGHTS = "adapter_model.safetensors"
EXACT = {"rtol": 1e-5, "atol": 1e-5}


def saved(model, folder, seed=1, **config):
    """A PEFT folder with the embedding layers in it, and random values in what PEFT trains."""
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in wrapped.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
    wrapped.save_pretrained(folder, save_embedding_layers=True)
    return folder


def agrees(model, folder, inputs, **options):
    """What is merged of an adapter with a coefficient of 1 computes what PEFT runs."""
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    wanted = outputs(PeftModel.from_pretrained(copy.deepcopy(model), folder).double(), inputs)
    assert (wanted - outputs(copy.deepcopy(model).double(), inputs)).abs().max() > 1e-3
    result = nsc_merge.merge(model, {"a": folder}, method="task_arithmetic", scale=1.0, **options)
    found = outputs(result.apply(copy.deepcopy(result.model)).double(), inputs)
    torch.testing.assert_close(found, wanted, **EXACT)
    # Shapes alone are as many.
    assert set(outline_of(folder, "a")[0].factors) <= set(result.paths)
    return result


def resized(name, size=100):
    model = ARCHITECTURES[name].build()
    model.resize_token_embeddings(size, mean_resizing=False)
    return model, ARCHITECTURES[name].inputs()


WHOLE = {
    "both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "the head": {"modules_to_save": ["lm_head"]},
    "the embeddings": {"modules_to_save": ["embed_tokens"]},
    "as one": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "rows": {"trainable_token_indices": [3, 5]},
    "rows of each": {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [4]}},
}


@pytest.mark.parametrize("name", ["LLaMA", "Gemma"])
@pytest.mark.parametrize("case", WHOLE)
def test_embeddings_trained_in_full_are_read_beside_those_of_the_base(name, case, tmp_path):
    """Gemma's are tied."""
    model, inputs = resized(name)
    agrees(model, saved(model, tmp_path / "a", target_modules=["q_proj"], **WHOLE[case]), inputs)


def test_a_vocabulary_that_grew_is_read_with_what_was_trained_of_it(tmp_path):
    model, inputs = resized("LLaMA")
    folder = saved(model, tmp_path / "a", target_modules=["q_proj"], **WHOLE["both"])
    small = ARCHITECTURES["LLaMA"].build()
    result = nsc_merge.merge(small, {"a": folder}, method="task_arithmetic", scale=1.0, added_tokens="mean")
    assert len(result.model.lm_head.weight) == 100
    wanted = outputs(PeftModel.from_pretrained(copy.deepcopy(model), folder), inputs)
    torch.testing.assert_close(outputs(result.apply(result.model), inputs), wanted, **EXACT)


COPY = "base_model.model.lm_head.original_module.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held.pop("base_model.model.lm_head.weight"), r"2 of \d+ tensors would be ignored.*lm_head.modul"),
        (lambda held: held["base_model.model.lm_head.modules_to_save.weight"].add_(1), "1 of .*lm_head.modules_to"),
        (lambda held: held[COPY].add_(1), "lm_head.weight of the base was saved with the adapter and differs"),
    ],
    ids=["alone", "another", "another base"],
)
def test_copies_that_are_not_what_they_stand_beside_are_refused(change, message, tmp_path):
    model, _ = resized("LLaMA")
    folder = saved(model, tmp_path / "a", target_modules=["q_proj"], modules_to_save=["lm_head"])
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(ValueError, match=message):
        nsc_merge.merge(model, {"a": folder}, method="task_arithmetic")


NAMES = {
    "GPT-2": "transformer.wte.weight",
    "GPT-NeoX": "gpt_neox.embed_in.weight",
    "Falcon": "transformer.word_embeddings.weight",
    "BERT": "bert.embeddings.word_embeddings.weight",
    "ModernBERT": "decoder.bias",
    "Whisper": "proj_out.weight",
}


@pytest.mark.parametrize("name", NAMES)
def test_embeddings_of_the_base_are_known_whatever_they_are_called(name, tmp_path):
    kind = ARCHITECTURES[name]
    model, inputs = kind.build(), kind.inputs()
    folder = saved(model, tmp_path / "a", target_modules=kind.targets)
    assert f"base_model.model.{NAMES[name]}" in load_file(folder / WEIGHTS)
    agrees(model, folder, inputs)
    other = kind.build()
    with torch.no_grad():
        other.get_parameter(NAMES[name]).add_(0.5)
    # Of tied weights, under either name.
    with pytest.raises(ValueError, match=r"\.(weight|bias) of the base was saved with the adapter and differs"):
        nsc_merge.merge(other, {"a": folder}, method="task_arithmetic")


def test_another_matrix_that_nothing_announces_is_refused_by_name(tmp_path):
    model = ARCHITECTURES["LLaMA"].build()
    folder = saved(model, tmp_path / "a", target_modules=["q_proj"])
    weights, held = load_file(folder / WEIGHTS), model.model.layers[0].mlp.up_proj.weight.detach().clone()
    key = "base_model.model.model.layers.0.mlp.up_proj.weight"
    save_file({**weights, key: held}, folder / WEIGHTS)
    assert "up_proj" not in str(nsc_merge.merge(model, {"a": folder}, method="task_arithmetic").paths)
    save_file({**weights, key: held + 1}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"up_proj.weight is in the adapter's file, .*neither LoRA nor of modules_to_"):
        nsc_merge.merge(model, {"a": folder}, method="task_arithmetic")
    save_file({**weights, "base_model.model.score.weight": held}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"score.weight of the base was saved .*no such parameter in Llama"):
        nsc_merge.merge(model, {"a": folder}, method="task_arithmetic")


@pytest.mark.parametrize(
    "config", [{"modules_to_save": ["embed_tokens"]}, {"target_modules": ["q_proj", "embed_tokens"]}], ids=str
)
def test_a_tied_head_of_another_name_is_trained_as_one_with_the_embeddings(config, tmp_path):
    kind = ARCHITECTURES["Whisper"]
    model, inputs = kind.build(), kind.inputs()
    config = {"target_modules": ["q_proj"], **config, "ensure_weight_tying": True}
    result = agrees(model, saved(model, tmp_path / "a", **config), inputs)
    assert {"model.decoder.embed_tokens", "proj_out"} <= set(result.paths)
    assert isinstance(model, tf.WhisperForConditionalGeneration)


def test_parameters_of_a_module_are_told_apart_by_the_ranks_that_make_as_many_matrices():
    """Without the model nothing else tells them apart; each is the sum over the ranks that PEFT's einsum forms."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_parameters": ["m.w", "m.u"]}
    shapes = {"m": (4, 6, 7), "m.base_layer": (2, 5, 4)}
    weights, wanted = {}, {}
    for path, (rank, d_in, d_out) in shapes.items():
        A, B = torch.randn(3 * rank, d_in), torch.randn(d_out, 3 * rank)
        weights |= {f"base_model.model.{path}.lora_{name}.weight": value for name, value in (("A", A), ("B", B))}
        sums = torch.einsum("ore,eri->eoi", B.view(d_out, rank, 3).double(), A.view(3, rank, d_in).double())
        wanted |= {f"{path}.{number}": 6 / rank * one for number, one in enumerate(sums)}
    for pattern in ({"m.u": 4}, {"w": 4}):
        source = {"config": {**config, "rank_pattern": pattern}, "weights": weights}
        found = updates_of(nsc_merge.load_adapter(source, "a"))
        assert found.keys() == wanted.keys()
        for path, one in found.items():
            torch.testing.assert_close(one.delta(), wanted[path])
    for pattern in ({}, {"u": 5}, {"u": 3}):
        source = {"config": {**config, "rank_pattern": pattern}, "weights": weights}
        with pytest.raises(ValueError, match=r"adapters\['a'\]: m has tensors for 2 parameters, whose ranks are none"):
            updates_of(nsc_merge.load_adapter(source, "a"))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x)[0])


def test_lora_on_an_attention_of_torch_is_refused_but_not_on_its_parameter(tmp_path):
    torch.manual_seed(0)
    model = Attention().eval()
    held = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["attention", "head"]))
    held.save_pretrained(tmp_path / "a")
    for source in (held, tmp_path / "a"):
        with pytest.raises(ValueError, match=r"\['a'\]: attention: LoRA on nn.MultiheadAttention is not merged, where"):
            nsc_merge.load_adapter(source, "a")
    config = LoraConfig(r=2, target_modules=["head"], target_parameters=["attention.in_proj_weight"])
    held = get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for name, value in held.named_parameters():
            if "lora_" in name:
                value.normal_(std=0.5)
    held.save_pretrained(tmp_path / "b")
    x = torch.randn(2, 3, 8)
    wanted = held.eval()(x)
    assert not torch.allclose(wanted, model(x), atol=1e-2)
    result = nsc_merge.merge(model, {"b": tmp_path / "b"}, method="task_arithmetic", scale=1.0)
    saved = PeftModel.from_pretrained(copy.deepcopy(model), result.save(tmp_path / "c", "lora")).eval()
    for found in (result.apply(copy.deepcopy(model)), saved):
        torch.testing.assert_close(found(x), wanted, rtol=1e-5, atol=1e-5)
