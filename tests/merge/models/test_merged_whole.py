"""Embeddings and norms with merged updates: PEFT's forward, gradients of coefficients, methods that need linears."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import ARCHITECTURES
from peft import PeftModel
from torch import nn
from zoo import build, outputs, pixels, text, write_adapter

import nsc_merge
from nsc_merge.integrations import peft as integrations
from nsc_merge.models.attachment import attach
from nsc_merge.results.beside.norms import norm_kept

IDS = {"input_ids": torch.tensor([[1, 5, 2, 3, 8]])}
TASKS = {
    "whole": {"modules_to_save": ["embed_tokens", "norm", "input_layernorm"]},
    "rows": {"trainable_token_indices": {"embed_tokens": [1, 2, 5]}},
    "LoRA": {"target_modules": ["q_proj", "v_proj", "embed_tokens"]},
}


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    model, folder = build("llama"), tmp_path_factory.mktemp("adapters")
    folders = {
        task: write_adapter(model, folder / task, seed, **{"r": 4, "target_modules": ["q_proj", "v_proj"], **config})
        for seed, (task, config) in enumerate(TASKS.items(), 1)
    }
    return model, folders


@pytest.mark.parametrize("task", TASKS)
def test_every_task_alone_is_what_peft_runs_and_gradients_are_right(task, merged):
    model, folders = merged
    wanted = outputs(PeftModel.from_pretrained(copy.deepcopy(model), folders[task]).double(), IDS)
    result = nsc_merge.merge(model, folders, method="task_arithmetic")
    exact = copy.deepcopy(model).double()
    with attach(exact, result.adapters, {name: float(name == task) for name in folders}) as modules:
        torch.testing.assert_close(outputs(exact, IDS), wanted, rtol=1e-5, atol=1e-6)
        whole = {path: modules[path] for path in ("model.embed_tokens", "model.norm")}

        def run(*lams):
            for module, lam in zip(whole.values(), lams, strict=True):
                del module.lam
                module.lam = lam
            # A norm of transformers computes in float32 within: its weight is what is differentiated.
            return whole["model.embed_tokens"](IDS["input_ids"]), whole["model.norm"].weight

        lams = [torch.full((3,), 0.3, dtype=torch.float64, requires_grad=True) for _ in whole]
        assert torch.autograd.gradcheck(run, lams, fast_mode=True)
        for module, lam in zip(whole.values(), lams, strict=True):
            del module.lam
            module.lam = nn.Parameter(lam.detach())


def test_a_norm_trained_with_its_bias_is_what_peft_runs(tmp_path):
    model = build("vit")
    folders = {
        task: write_adapter(model, tmp_path / task, seed, target_modules=["q_proj"], modules_to_save=["layernorm"])
        for seed, task in enumerate("ab", 1)
    }
    result = nsc_merge.merge(model, folders, method="task_arithmetic")
    images = pixels(1)
    for task in folders:
        wanted = outputs(PeftModel.from_pretrained(copy.deepcopy(model), folders[task]), images)
        with attach(model, result.adapters, {name: float(name == task) for name in folders}) as modules:
            assert any(path.endswith("layernorm") and one.biases is not None for path, one in modules.items())
            torch.testing.assert_close(outputs(model, images), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", ["model", "lora"])
def test_several_kinds_together_are_the_same_in_every_format(format, merged, tmp_path):
    model, folders = merged
    result = nsc_merge.merge(model, folders, method="task_arithmetic", scale=0.5)
    wanted = outputs(result.apply(copy.deepcopy(model)), IDS)
    out = result.save(tmp_path / format, format)
    load = type(model).from_pretrained if format == "model" else PeftModel.from_pretrained
    loaded = load(out) if format == "model" else load(copy.deepcopy(model), out)
    torch.testing.assert_close(outputs(loaded, IDS), wanted, rtol=5e-5, atol=5e-5)


def test_nsc_learns_their_coefficients_and_measures_linears_alone(merged):
    model, folders = merged
    batches = {task: [text(seed)] for seed, task in enumerate(folders)}
    result = nsc_merge.merge(model, folders, batches, steps=2, lr=0.01, progress=False)
    row = result.coefficients["model.embed_tokens"]
    assert len(set(row.values())) == 3
    assert all("v_proj" in path for path in result.options["scored"])


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_methods_of_linear_inputs_refuse_them_by_name(method, merged):
    model, folders = merged
    batches = {task: [text(1)] for task in folders}
    with pytest.raises(ValueError, match=rf"{method}.*: model.embed_tokens is no linear.*'task_arithmetic'"):
        nsc_merge.merge(model, folders, batches, method)


def test_embeddings_in_a_peft_model_are_merged_there(merged):
    model, folders = merged
    held = PeftModel.from_pretrained(copy.deepcopy(model), folders["LoRA"], adapter_name="LoRA").eval()
    wanted = outputs(held, IDS)
    integrations.merge(held, ["LoRA"], [1.0], method="task_arithmetic")
    held.set_adapter("merged")
    torch.testing.assert_close(outputs(held, IDS), wanted, rtol=1e-5, atol=1e-6)
    rows = PeftModel.from_pretrained(copy.deepcopy(model), folders["rows"], adapter_name="rows")
    with pytest.raises(ValueError, match=r"\['rows'\] have trainable_token_indices"):
        integrations.merge(rows, ["rows"], [1.0], method="task_arithmetic")


def test_an_embedding_that_scales_what_it_looks_up_scales_the_update_too(tmp_path):
    """Gemma's; its forward is its own."""
    model = ARCHITECTURES["Gemma 3"].build().double()
    targets = {"r": 3, "target_modules": ["q_proj", "embed_tokens"]}
    folders = {task: write_adapter(model, tmp_path / task, seed, **targets) for seed, task in enumerate("ab")}
    result = nsc_merge.merge(model, folders, method="task_arithmetic", scale=0.5)
    path = "model.embed_tokens"
    with attach(model, result.adapters, {"a": 0.3, "b": -0.6}) as modules:
        module = modules[path]
        held = module.lam
        weight = module.linear.weight + sum(
            lam * result.adapters[task].factors[path].delta() for lam, task in zip(held.detach(), "ab", strict=True)
        )
        wanted = nn.functional.embedding(IDS["input_ids"], weight) * module.linear.embed_scale
        torch.testing.assert_close(module(IDS["input_ids"]), wanted, rtol=0, atol=1e-12)

        def run(lam):
            module._parameters["lam"] = lam
            return module(IDS["input_ids"])

        assert torch.autograd.gradcheck(run, (held,))
        module._parameters["lam"] = held


def test_norms_of_a_card_count_embeddings_and_norms(merged):
    model, folders = merged
    result = nsc_merge.merge(model, folders, method="task_arithmetic", scale=0.5)
    kept = norm_kept(result)
    deltas = {
        task: torch.cat([one.delta().flatten() for one in adapter.factors.values()])
        for task, adapter in result.adapters.items()
    }
    assert kept.own == pytest.approx({task: float(delta.norm()) for task, delta in deltas.items()}, rel=1e-5)
    total = torch.cat([result.delta(path).flatten() for path in result.paths])
    assert kept.merged == pytest.approx(float(total.norm()), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("OPT", {"target_modules": ["q_proj", "embed_positions"]}),
        ("OPT", {"trainable_token_indices": {"embed_positions": [3, 4]}}),
        ("BART", {"target_modules": ["q_proj", "embed_positions"]}),
        ("Whisper", {"target_modules": ["q_proj", "decoder.embed_positions"]}),
    ],
    ids=str,
)
def test_embeddings_that_count_positions_themselves_are_refused_where_peft_looks_rows_up(name, config, tmp_path):
    """PEFT adds rows by the first argument, which is a mask or the tokens there."""
    model = ARCHITECTURES[name].build()
    folder = write_adapter(model, tmp_path / "a", 1, **{"target_modules": ["q_proj"], **config})
    with pytest.raises(TypeError, match=r"embed_positions: the forward of \w+PositionalEmbedding is its own"):
        nsc_merge.merge(model, {"a": folder}, method="task_arithmetic")


def test_positions_trained_in_full_are_merged(tmp_path):
    model, inputs = ARCHITECTURES["OPT"].build(), ARCHITECTURES["OPT"].inputs()
    config = {"target_modules": ["q_proj"], "modules_to_save": ["embed_positions"]}
    folder = write_adapter(model, tmp_path / "a", 1, **config)
    wanted = outputs(PeftModel.from_pretrained(copy.deepcopy(model), folder), inputs)
    result = nsc_merge.merge(model, {"a": folder}, method="task_arithmetic", scale=1.0)
    with attach(model, result.adapters, 1.0):
        torch.testing.assert_close(outputs(model, inputs), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs(result.apply(model), inputs), wanted, rtol=1e-5, atol=1e-5)


class OwnEmbedding(nn.Embedding):
    """As bitsandbytes', with a forward of its own that looks rows up like any other."""

    def forward(self, ids):
        return nn.functional.embedding(ids, self.weight)


class NormedEmbedding(nn.Embedding):
    def forward(self, ids):
        return nn.functional.normalize(super().forward(ids), dim=-1)


@pytest.mark.parametrize(("kind", "merged"), [(OwnEmbedding, True), (NormedEmbedding, False)])
def test_an_embedding_with_a_forward_of_its_own_is_merged_where_it_looks_rows_up(kind, merged):
    model = nn.Sequential(kind(9, 4))
    factor = nsc_merge.Factor(torch.ones(1, 4), torch.ones(9, 1), 1.0)
    adapters = {"a": nsc_merge.Adapter("a", {"0": factor})}
    if not merged:
        with pytest.raises(TypeError, match="0: the forward of NormedEmbedding is its own"):
            nsc_merge.merge(model, adapters, method="task_arithmetic")
        return
    before = model[0].weight.detach().clone()
    nsc_merge.merge(model, adapters, method="task_arithmetic", scale=0.5).apply(model)
    torch.testing.assert_close(model[0].weight.detach(), before + 0.5)
