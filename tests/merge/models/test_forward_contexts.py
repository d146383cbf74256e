"""Compiled models are merged by running them eagerly, and stay compiled."""

from __future__ import annotations

import copy

import pytest
import torch
from loop_cases import adapters_for, llama, text_batches, trajectory, values
from torch import nn
from torch.func import functional_call
from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM, RwkvConfig, RwkvForCausalLM

import nsc_merge
from nsc_merge import Adapter, Factor
from nsc_merge.evaluation.scoring import applied
from nsc_merge.models.forward_contexts import shared_forward, wrapped_forward


def in_place(model):
    model.compile(backend="eager")


def layers_in_place(model):
    for layer in model:
        layer.compile(backend="eager")


def forward_alone(model):
    model.forward = torch.compile(model.forward, backend="eager")


@pytest.mark.parametrize("compiled", [in_place, layers_in_place, forward_alone])
def test_a_model_compiled_in_place_runs_as_it_was_written_while_adapters_are_attached(compiled):
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    adapters = {
        task: Adapter(task, {"0": Factor(torch.randn(2, 6), torch.randn(7, 2), 1.5)}) for task in ("one", "two")
    }
    z = torch.randn(5, 6, dtype=torch.float64)
    compiled(model)
    with torch.no_grad():
        before = model(z)
    calls = {module: (module._compiled_call_impl, vars(module).get("forward")) for module in model.modules()}
    with nsc_merge.attach(model, adapters, 0.4) as merged:
        out = model(z)
        out.sum().backward()
    lam = torch.full((2,), 0.4, dtype=torch.float64, requires_grad=True)
    deltas = [adapter.factors["0"].delta().double() for adapter in adapters.values()]
    weight = model[0].weight.detach() + lam[0] * deltas[0] + lam[1] * deltas[1]
    plain = nn.Sequential(*model)
    expected = functional_call(plain, {"0.weight": weight}, (z,))
    expected.sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(merged["0"].lam.grad, lam.grad, rtol=1e-8, atol=1e-10)
    assert {m: (m._compiled_call_impl, vars(m).get("forward")) for m in model.modules()} == calls
    assert any(call or forward for call, forward in calls.values())
    with torch.no_grad():
        assert torch.equal(model(z), before)


@pytest.mark.parametrize("option", [False, "eager"])
def test_nsc_of_a_model_compiled_in_place(option):
    plain, model = llama(), llama()
    model.compile(backend="eager")
    adapters, batches = adapters_for(plain), text_batches(1)
    found = trajectory(model, adapters, batches, steps=2, compile=option)
    wanted = trajectory(plain, adapters, batches, steps=2)
    torch.testing.assert_close(values(found), values(wanted), rtol=0, atol=1e-6)
    assert model._compiled_call_impl is not None


def test_what_torch_compile_wrapped_is_refused_by_name():
    model = llama()
    adapters, batches = adapters_for(model), text_batches(1)
    for method, given in (("nsc", batches), ("ties", None)):
        with pytest.raises(ValueError, match=r"model: expected a model, found OptimizedModule; .*\(_orig_mod\)"):
            nsc_merge.merge(torch.compile(model, backend="eager"), adapters, given, method)
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    with pytest.raises(ValueError, match=r"2 of 8 adapted modules are not in LlamaForCausalLM.*\(_orig_mod\)"):
        nsc_merge.merge(model, adapters, method="ties")


def test_what_stands_around_a_model_is_refused_with_the_way_in():
    model = llama()
    with pytest.raises(ValueError, match=r"not in Sequential, .*; of what .*, expected get_submodule\('1'\) of it"):
        nsc_merge.merge(torch.nn.Sequential(torch.nn.ReLU(), model), adapters_for(model), method="ties")


def test_a_forward_of_the_modules_own_is_given_back():
    block = llama().model.layers[0]
    own = block.forward
    block.forward = own
    with wrapped_forward(block, True, None), shared_forward(block):
        assert block.forward is not own
    assert vars(block)["forward"] is own


@pytest.mark.parametrize("method", ["nsc", "match", "distill", "adamerging", "fisher", "regmean"])
def test_no_method_keeps_the_state_that_a_model_writes_over(method):
    """RWKV's, for the next tokens: the backward needs what was there before."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "intermediate_size": 48}
    model = RwkvForCausalLM(RwkvConfig(**sizes, vocab_size=96, context_length=32)).eval()
    paths = [path for path, _ in model.named_modules() if path.endswith(("attention.key", "attention.value"))]
    adapters = {
        task: Adapter(task, {path: Factor(torch.randn(2, 32), torch.randn(32, 2), 1.0) for path in paths})
        for task in "ab"
    }
    data = {task: [{"input_ids": torch.randint(3, 96, (2, 6))}] for task in "ab"}
    options = {"batches": 1} if method in ("fisher", "regmean") else {"steps": 2, "progress": False}
    found = nsc_merge.merge(model, adapters, data, method, **options)
    assert model.config.use_cache
    assert all(torch.isfinite(found.delta(path)).all() for path in paths)


def dividing():
    """RWKV of four layers, which divides what the last two add to the hidden states, in evaluation mode."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "attention_hidden_size": 32, "intermediate_size": 48}
    model = RwkvForCausalLM(RwkvConfig(**sizes, vocab_size=96, context_length=32, rescale_every=2)).double().eval()
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(0.2 * torch.randn(value.shape, dtype=value.dtype))
    return model


@pytest.mark.parametrize("method", ["task_arithmetic", "nsc", "match", "regmean"])
def test_a_model_that_divides_its_weights_is_merged_as_it_was_loaded(method):
    model, undivided = dividing(), dividing()
    undivided.config.rescale_every = 0
    adapters = {}
    for task in "ab":
        places = [(path, one) for path, one in model.named_modules() if path.endswith(("n.output", "d.value"))]
        factors = {
            path: Factor(0.3 * torch.randn(2, one.in_features), 0.3 * torch.randn(one.out_features, 2), 1.0)
            for path, one in places
        }
        adapters[task] = Adapter(task, factors)
    batch = {"input_ids": torch.randint(3, 96, (2, 6))}
    data = {task: [batch] for task in adapters}
    options = {"regmean": {"batches": 1}, "task_arithmetic": {}}.get(method, {"steps": 2, "progress": False})
    found, wanted = (nsc_merge.merge(one, adapters, data, method, **options) for one in (model, undivided))
    for path in wanted.paths:
        torch.testing.assert_close(found.delta(path), wanted.delta(path), rtol=0, atol=0)
    # Measured twice, so that the second has whatever the first left behind.
    logits = []
    for _ in range(2):
        with applied(model, found) as one, torch.no_grad():
            logits.append(one(**batch).logits)
    assert (model.config.rescale_every, model.rwkv.layers_are_rescaled) == (2, False)
    wanted.apply(undivided)
    logits.append(found.apply(model)(**batch).logits)
    for one in logits:
        torch.testing.assert_close(one, undivided(**batch).logits, rtol=1e-3, atol=1e-3)
    assert model.rwkv.layers_are_rescaled
    for merging in (lambda: found.apply(model), lambda: nsc_merge.merge(model, adapters, data, method)):
        with pytest.raises(ValueError, match=r"model: RwkvForCausalLM has run in evaluation mode.*rescale_every = 0"):
            merging()


@pytest.mark.parametrize("method", ["nsc", "match", "distill", "regmean"])
def test_a_model_that_gives_tuples_is_merged_like_any_other(method):
    """transformers' own models cannot read what their parts give then."""
    model = llama()
    adapters, batches = adapters_for(model), text_batches(1)
    options = {"batches": 1} if method == "regmean" else {"steps": 2, "progress": False}
    wanted = nsc_merge.merge(model, adapters, batches, method, **options)
    model.config.return_dict = False
    found = nsc_merge.merge(model, adapters, batches, method, **options)
    assert model.config.return_dict is False
    for path in wanted.paths:
        assert torch.equal(found.delta(path), wanted.delta(path))


@pytest.mark.parametrize("method", [{"method": "nsc", "steps": 1, "progress": False}, {"method": "fisher"}])
def test_states_that_modules_keep_hold_no_graph_afterwards(method):
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    more = {"lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "recurrent", "attention"]}
    model = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**sizes, **more, vocab_size=64)).eval()
    paths = [f"model.layers.{number}.temporal_block.linear_x" for number in (0, 1)]
    paths.append("model.layers.2.temporal_block.v_proj")
    factors = {path: Factor(torch.randn(2, 32), torch.randn(model.get_submodule(path).out_features, 2), 1.0)
               for path in paths}
    adapters = {task: Adapter(task, factors) for task in "ab"}
    texts = {task: [{"input_ids": torch.randint(3, 60, (2, 7))}] for task in adapters}
    result = nsc_merge.merge(model, adapters, texts, **method)
    assert model.model.layers[0].temporal_block.rg_lru.recurrent_states is not None
    result.apply(copy.deepcopy(model))
