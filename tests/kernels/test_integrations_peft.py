"""PEFT's forward with several active adapters in one call, against PEFT's own."""

from __future__ import annotations

import copy
import itertools
import logging

import numpy as np
import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft.utils.hotswap import hotswap_adapter

from nsc_kernels.integrations import peft as integration
from nsc_kernels.integrations.peft import accelerate
from peft_cases import NAMES, build, inputs, lora_layers


@pytest.fixture
def batch():
    return inputs()


@pytest.fixture
def fallbacks(caplog):
    integration._say_once.cache_clear()
    caplog.set_level(logging.WARNING, logger="nsc_kernels")
    return caplog


def learnable(model):
    """Tensor-valued scaling in every layer: coefficient times LoRA's own; returns the coefficients."""
    lams = []
    for number, layer in enumerate(lora_layers(model)):
        for k, name in enumerate(layer.lora_A):
            lam = torch.tensor(0.3 + 0.1 * k + 0.01 * number, dtype=layer.weight.dtype, requires_grad=True)
            layer.scaling[name] = lam * layer.scaling[name]
            lams.append(lam)
    return lams


@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_output_and_gradients_equal_pefts_own(batch, fallbacks, dtype, tolerance, lora_bias):
    model = build(dtype, lora_bias=lora_bias)

    def run():
        lams = learnable(model)
        embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        logits = model(inputs_embeds=embedded).logits
        grads = torch.autograd.grad(logits.square().mean(), [embedded, *lams])
        return logits, grads

    original = [dict(layer.scaling) for layer in lora_layers(model)]
    expected = run()
    for layer, scaling in zip(lora_layers(model), original, strict=True):
        layer.scaling = scaling
    with accelerate(model) as handle:
        found = run()
    assert handle.layers == 8
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    largest = max(float(grad.abs().max()) for grad in expected[1])
    for grad, wanted in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(grad, wanted, rtol=20 * tolerance, atol=20 * tolerance * largest)
    assert not fallbacks.records


def test_it_is_fused_and_undone(batch, monkeypatch):
    model = build()
    calls = []
    real = integration.merged_lora
    monkeypatch.setattr(integration, "merged_lora", lambda *args: calls.append(1) or real(*args))
    objects = {name: id(module) for name, module in model.named_modules()}
    with torch.no_grad():
        expected = model(**batch).logits
        handle = accelerate(model)
        fused = model(**batch).logits
        assert len(calls) == len(lora_layers(model)) == handle.layers == 8
        assert accelerate(model).layers == 0
        handle.remove()
        handle.remove()
        assert torch.equal(model(**batch).logits, expected)
    assert len(calls) == 8
    torch.testing.assert_close(fused, expected, rtol=2e-5, atol=2e-5)
    assert {name: id(module) for name, module in model.named_modules()} == objects
    assert not any("forward" in vars(module) for module in model.modules())


def test_bfloat16_base_under_float32_adapters(batch):
    model = build()
    model.base_model.model.to(torch.bfloat16)
    for key, value in model.named_parameters():
        if "lora_" in key:
            value.data = value.data.float()
    with torch.no_grad():
        expected = model(**batch).logits
        with accelerate(model):
            found = model(**batch).logits
    assert found.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2 * float(expected.abs().max()))


def test_changes_to_adapters_are_seen(batch):
    model = build()

    with torch.no_grad(), accelerate(model) as handle:
        before = model(**batch).logits
        layer = lora_layers(model)[0]
        layer.lora_B["a"].weight.mul_(3)
        in_place = model(**batch).logits
        layer.lora_A["a"].weight.data = 2 * layer.lora_A["a"].weight.data
        replaced = model(**batch).logits
        model.base_model.set_adapter(["a", "c"])
        fewer = model(**batch).logits
        with model.disable_adapter():
            none = model(**batch).logits
        model.merge_adapter(["a", "c"])
        torch.testing.assert_close(model(**batch).logits, fewer, rtol=2e-5, atol=2e-5)
        model.unmerge_adapter()
        handle.remove()
        torch.testing.assert_close(fewer, model(**batch).logits, rtol=2e-5, atol=2e-5)
        model.base_model.set_adapter(NAMES)
        torch.testing.assert_close(replaced, model(**batch).logits, rtol=2e-5, atol=2e-5)
        different = [before, in_place, replaced, fewer, none]
    assert all((one - other).abs().max() > 1e-3 for one, other in itertools.pairwise(different))


def write_by_fused_optimizer(weight):
    weight.requires_grad_(True)
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=0.5, fused=True).step()


@pytest.mark.parametrize(
    "write",
    [
        write_by_fused_optimizer,
        lambda weight: weight.data.mul_(3),
        lambda weight: weight.data[0, 0].add_(5),
        lambda weight: np.multiply(weight.detach().numpy(), 3, out=weight.detach().numpy()),
    ],
)
def test_writes_that_leave_no_trace_are_seen(batch, write):
    model = build()
    with torch.no_grad():
        with accelerate(model):
            before = model(**batch).logits
            for layer in lora_layers(model):
                write(layer.lora_A["a"].weight)
                write(layer.lora_B["b"].weight)
            found = model(**batch).logits
        expected = model(**batch).logits
    assert (found - before).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def test_training_with_a_fused_optimizer_and_evaluating_in_turn(batch):
    model, twin = build(), build()
    trained = [value for key, value in model.named_parameters() if "lora_" in key]
    for weight in trained:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=0.05, fused=True)
    with accelerate(model):
        for _ in range(3):
            model(**batch).logits.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            twin.load_state_dict(model.state_dict())
            with torch.no_grad():
                torch.testing.assert_close(model(**batch).logits, twin(**batch).logits, rtol=2e-5, atol=2e-5)


def test_a_hot_swapped_adapter_is_seen(batch, tmp_path):
    model = build()
    model.save_pretrained(tmp_path, selected_adapters=["a"])
    with torch.no_grad():
        for layer in lora_layers(model):
            layer.lora_B["a"].weight.mul_(-2)
        with accelerate(model):
            before = model(**batch).logits
            hotswap_adapter(model, str(tmp_path / "a"), "a")
            found = model(**batch).logits
        expected = model(**batch).logits
    assert (found - before).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def test_a_gradient_after_a_call_in_inference_mode(batch):
    model = build()
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()

    def gradient():
        return torch.autograd.grad(model(inputs_embeds=embedded).logits.sum(), embedded)[0]

    expected = gradient()
    with accelerate(model):
        with torch.inference_mode():
            model(**batch)
        torch.testing.assert_close(gradient(), expected, rtol=2e-4, atol=2e-4)


def hook_forward(module):
    module.register_forward_hook(lambda module, args, output: 3 * output)


def hook_input(module):
    module.register_forward_pre_hook(lambda module, args: (3 * args[0],))


def hook_gradient(module):
    module.register_full_backward_hook(lambda module, into, out: (3 * into[0],))


def hook_output_gradient(module):
    module.register_full_backward_pre_hook(lambda module, out: (3 * out[0],))


def subclass(module):
    class Tripled(type(module)):
        def forward(self, x):
            return 3 * super().forward(x)

    module.__class__ = Tripled


def replace_forward(module):
    module.forward = lambda x: 3 * type(module).forward(module, x)


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_dropout"])
@pytest.mark.parametrize(
    "change", [hook_forward, hook_input, hook_gradient, hook_output_gradient, subclass, replace_forward]
)
def test_hooks_and_other_modules_in_an_adapter_have_their_effect(batch, fallbacks, part, change):
    model = build()
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()

    def run():
        logits = model(inputs_embeds=embedded).logits
        return [logits, *torch.autograd.grad(logits.square().mean(), embedded)]

    plain = run()
    change(getattr(lora_layers(model)[3], part)["b"])
    expected = run()
    with accelerate(model):
        found = run()
    for one, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(one, wanted, rtol=2e-4, atol=2e-5)
    assert max(float((one - other).detach().abs().max()) for one, other in zip(plain, expected, strict=True)) > 1e-3
    assert "hooks" in fallbacks.text


def test_hooks_of_all_modules_have_their_effect(batch, fallbacks):
    model = build()

    def double(module, args, output):
        return 2 * output if module is lora_layers(model)[3].lora_B["b"] else None

    plain = model(**batch).logits
    with torch.nn.modules.module.register_module_forward_hook(double):
        expected = model(**batch).logits
        with accelerate(model):
            found = model(**batch).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert (plain - expected).abs().max() > 1e-3
    assert "all modules" in fallbacks.text


def test_a_bias_in_a_down_projection_is_not_lost(batch, fallbacks):
    model = build()
    down = lora_layers(model)[3].lora_A["b"]
    down.bias = torch.nn.Parameter(torch.linspace(-1, 1, down.out_features), requires_grad=False)
    expected = model(**batch).logits
    with accelerate(model):
        torch.testing.assert_close(model(**batch).logits, expected, rtol=2e-5, atol=2e-5)
    assert "not PEFT's own" in fallbacks.text


def ragged(x):
    return torch.nested.nested_tensor([x[0], x[1, :3]], layout=torch.jagged)


def padded_rows(x):
    return torch.nested.nested_tensor([x[0], x[1, :3]])


def wrapped(x):
    return two_tensor().TwoTensor(x, x)


def two_tensor():
    return pytest.importorskip("torch.testing._internal.two_tensor")


@pytest.mark.parametrize("make", [ragged, padded_rows, wrapped])
def test_inputs_that_are_no_plain_tensors_are_pefts(fallbacks, make):
    layer = lora_layers(build())[3]
    x = make(torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(4)))

    def run():
        y = layer(x)
        return torch.cat(y.unbind()) if y.is_nested else y.a

    expected = run()
    with accelerate(layer):
        torch.testing.assert_close(run(), expected, rtol=0, atol=0)
    assert "no plain dense tensors" in fallbacks.text


def test_a_factor_that_is_a_wrapper_is_pefts(fallbacks):
    layer = lora_layers(build())[3]
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(4))
    plain, weight = layer(x), layer.lora_B["b"].weight.data
    # Of the two tensors of which it is made, autograd and kernels see the first.
    layer.lora_B["b"].weight = torch.nn.Parameter(two_tensor().TwoTensor(weight, weight), requires_grad=False)
    with accelerate(layer):
        torch.testing.assert_close(layer(x).a, plain, rtol=0, atol=0)
    assert "no plain dense tensors" in fallbacks.text


def test_complex_numbers_are_pefts(fallbacks):
    layer = lora_layers(build())[3].to(torch.complex64)
    x = torch.randn(7, 32, dtype=torch.complex64, generator=torch.Generator().manual_seed(4))
    expected = layer(x)
    with accelerate(layer):
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
    assert "torch.complex64" in fallbacks.text


def test_adapters_frozen_by_set_adapter_are_fused_where_a_gradient_flows(batch, fallbacks):
    model = build(torch.float64)
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    with accelerate(model):
        model.base_model.set_adapter(NAMES)
        model(inputs_embeds=embedded)
        assert "inference_mode=True" in fallbacks.text
        fallbacks.clear()
        integration._say_once.cache_clear()
        model.base_model.set_adapter(NAMES, inference_mode=True)
        fused = model(inputs_embeds=embedded).logits
        assert not fallbacks.records
        (once,) = torch.autograd.grad(fused.square().sum(), embedded, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(once.sum(), embedded)


def test_what_it_cannot_express_goes_to_peft_and_is_said_once(batch, fallbacks):
    model = build(lora_dropout=0.5)
    with accelerate(model):
        model.train()
        torch.manual_seed(5)
        dropped = model(**batch).logits
        assert [record.message for record in fallbacks.records] == [
            "PEFT's own forward serves some calls: dropout in training mode gives every adapter an input of its own"
        ]
        model.eval()
        model(**batch)
        with torch.no_grad():
            mixed = model(**batch, adapter_names=["a", "b"]).logits
        assert "adapter_names" in fallbacks.records[-1].message
        for layer in lora_layers(model):
            layer.lora_A["a"].weight.requires_grad_(True)
        model(**batch).logits.sum().backward()
        assert lora_layers(model)[0].lora_A["a"].weight.grad is not None
        assert "being trained" in fallbacks.records[-1].message
    assert len(fallbacks.records) == 3
    model.train()
    torch.manual_seed(5)
    torch.testing.assert_close(model(**batch).logits, dropped)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch, adapter_names=["a", "b"]).logits, mixed)


def test_dora_and_models_without_lora(batch, fallbacks):
    model = build(use_dora=True)
    with torch.no_grad():
        expected = model(**batch).logits
        with accelerate(model):
            assert torch.equal(model(**batch).logits, expected)
    assert "DoRA" in fallbacks.text
    with pytest.raises(ValueError, match=r"model: expected peft\.tuners\.lora\.Linear layers, found none"):
        accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model: expected a PeftModel or another module, found str; of a pipeline"):
        accelerate("model")


def test_a_copy_of_an_accelerated_model_is_its_own(batch):
    model = build()
    with torch.no_grad(), accelerate(model):
        twin = copy.deepcopy(model)
        before = twin(**batch).logits
        for layer in lora_layers(model):
            layer.lora_B["a"].weight.zero_()
        assert torch.equal(twin(**batch).logits, before)


def test_a_hook_put_around_an_accelerated_layer_outlives_it(batch, monkeypatch):
    hooks = pytest.importorskip("accelerate.hooks")
    calls = []

    class Counting(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    model = build(torch.float64)
    layers = list(lora_layers(model))
    with torch.no_grad():
        expected = model(**batch).logits
        handle = accelerate(model)
        hooks.add_hook_to_module(layers[0], Counting())
        handle.remove()
        monkeypatch.setattr(integration, "merged_lora", None)  # nothing is fused any more
        assert torch.equal(model(**batch).logits, expected)
        assert calls == [layers[0]]
        hooks.remove_hook_from_module(layers[0])
        assert torch.equal(model(**batch).logits, expected)
        assert calls == [layers[0]]
    assert not any("forward" in vars(layer) for layer in layers[1:])
    with accelerate(model) as handle:
        assert handle.layers == len(layers)  # the first has the forward that the hook brought back
    assert not any("forward" in vars(layer) for layer in layers)


def test_what_is_accelerated_already_is_said(fallbacks):
    model = build()
    with accelerate(model):
        assert accelerate(copy.deepcopy(model)).layers == 0
    assert "'base_model.model.model.layers.0.self_attn.q_proj' first: they run fused already" in fallbacks.text


def test_a_layer_whose_forward_was_taken_off_by_somebody_else_does_not_stop_the_others(batch):
    model = build(torch.float64)
    layers = list(lora_layers(model))
    handle = accelerate(model)
    del layers[0].forward
    handle.remove()
    assert not any("forward" in vars(layer) for layer in layers)
