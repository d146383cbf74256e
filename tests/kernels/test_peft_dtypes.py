"""accelerate() with a base, adapters and autocast of different dtypes, against PEFT's own forward and float64 sums."""

from __future__ import annotations

import functools
import itertools
import logging
from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model
from torch import nn

import operator_cases as oc
from nsc_kernels.integrations.peft import _say_once, accelerate

AUTOCAST = {"none": None, "bf16": torch.bfloat16, "f16": torch.float16}


class OneLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(48, 40)

    def forward(self, x):
        return self.proj(x)


def adapted(base, adapters, zero, lora_bias):
    """One linear under two adapters of ranks 4 and 3."""
    settings = {"target_modules": ["proj"], "lora_alpha": 7, "lora_bias": lora_bias}
    model = get_peft_model(OneLinear(), LoraConfig(r=4, **settings), "one", autocast_adapter_dtype=False)
    model.add_adapter("two", LoraConfig(r=3, **settings), autocast_adapter_dtype=False)
    layer = model.base_model.model.proj
    for name in ("one", "two"):
        for parameter in layer.lora_B[name].parameters():
            nn.init.zeros_(parameter) if zero else nn.init.normal_(parameter)
        layer.lora_A[name].to(oc.DTYPES[adapters])
        layer.lora_B[name].to(oc.DTYPES[adapters])
    layer.base_layer.to(oc.DTYPES[base])
    model.base_model.set_adapter(["one", "two"])
    return model.requires_grad_(False).eval(), layer


def update(layer, x):
    """The adapters' share of the output in float64, summed up here, and the size of what it is a sum of."""
    total = magnitude = torch.zeros(len(x), 40, dtype=torch.float64)
    for name in ("one", "two"):
        A, B = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
        bias = layer.lora_B[name].bias
        part = x.double() @ A.t() @ B.t() + (0 if bias is None else bias.double())
        total = total + layer.scaling[name] * part
        magnitude = magnitude + abs(layer.scaling[name]) * ((x.double() @ A.t()).abs() @ B.abs().t() + part.abs())
    return total, magnitude


@pytest.mark.parametrize("autocast", AUTOCAST)
@pytest.mark.parametrize(("base", "adapters"), list(itertools.product(oc.DTYPES, oc.DTYPES)))
def test_only_the_low_rank_part_is_rounded(base, adapters, autocast):
    dtype = AUTOCAST[autocast]
    for zero, lora_bias in itertools.product((True, False), (True, False)):
        model, layer = adapted(base, adapters, zero, lora_bias)
        x = torch.randn(9, 48).to(oc.DTYPES[base])
        with torch.no_grad(), nullcontext() if dtype is None else torch.autocast("cpu", dtype):
            alone = layer.base_layer(x)
            own = model(x)
            with accelerate(model) as handle:
                found = model(x)
        assert handle.layers == 1
        assert found.dtype is own.dtype is alone.dtype
        if zero:
            assert torch.equal(found, alone)
            continue
        total, magnitude = update(layer, x)
        expected = alone.double() + total
        scale = magnitude + alone.double().abs()
        allowed = 2 * oc.relative_error(own, expected, scale) + 4 * torch.finfo(own.dtype).eps
        assert oc.relative_error(found, expected, scale) <= allowed


def test_adapters_of_two_dtypes_are_pefts(caplog):
    _say_once.cache_clear()
    model, layer = adapted("f32", "f32", False, False)
    for factors in (layer.lora_A, layer.lora_B):
        factors["two"].to(torch.bfloat16)
    x = torch.randn(9, 48)
    expected = model(x)
    with accelerate(model):
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert "several dtypes" in caplog.text


def test_scalings_and_dropout_of_one_adapter_alone(caplog):
    """A scaling is one number, in whichever tensor; what every adapter would have of its own is PEFT's."""
    _say_once.cache_clear()
    model, layer = adapted("f32", "f32", False, False)
    x, own = torch.randn(9, 48), layer.scaling["one"]

    def both():
        torch.manual_seed(3)
        expected = layer(x)
        with accelerate(model):
            torch.manual_seed(3)
            torch.testing.assert_close(layer(x, adapter_names=None, alora_offsets=None), expected, rtol=1e-5, atol=1e-5)
        return expected

    several = torch.linspace(-1, 1, 40)
    found = []
    for layer.scaling["one"] in (own, torch.tensor(-2.0, dtype=torch.float64), torch.tensor([[3.0]]), several):
        assert not caplog.records
        found.append(both())
    assert "more than one value" in caplog.text
    layer.scaling["one"], layer.lora_dropout["one"] = own, nn.Dropout(0.5).train()
    found.append(both())
    assert "dropout" in caplog.text
    assert all((a - b).abs().max() > 0.1 for a, b in itertools.combinations(found, 2))


@pytest.mark.parametrize(("base", "adapters"), [("f32", "bf16"), ("f64", "f32"), ("bf16", "f16"), ("bf16", "f32")])
def test_gradients_of_mixed_dtypes_are_those_of_pefts_forward(base, adapters):
    model, layer = adapted(base, adapters, False, False)
    x = torch.randn(9, 48).to(oc.DTYPES[base]).requires_grad_()
    factor = torch.tensor(0.7, requires_grad=True)
    layer.scaling["one"] = factor * layer.scaling["one"]
    dy = torch.randn(9, 40).to(oc.DTYPES[base])

    def gradients():
        return torch.autograd.grad(model(x), (x, factor), dy, retain_graph=True)

    own = gradients()
    with accelerate(model):
        found = gradients()
    units = 8 * max(torch.finfo(oc.DTYPES[name]).eps for name in (base, adapters))
    for one, wanted in zip(found, own, strict=True):
        assert one.dtype is wanted.dtype
        assert oc.relative_error(one, wanted.double()) <= units


class SeveralKinds(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.proj, self.conv = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Conv1d(8, 8, 1)

    def forward(self, ids):
        return self.conv(self.proj(self.table(ids)).transpose(1, 2))


def test_what_is_not_accelerated_is_said(caplog):
    caplog.set_level(logging.WARNING, logger="nsc_kernels")
    model = get_peft_model(SeveralKinds(), LoraConfig(target_modules=["table", "proj", "conv"]))
    handle = accelerate(model)
    said = [record.message for record in caplog.records]
    assert handle.layers == 1
    assert len(said) == 2
    assert said[0].startswith("1 of 3 LoRA layers are not accelerated, 'base_model.model.table' first: ")
    assert "Embedding has another forward" in said[0]
    assert "Conv1d has another forward" in said[1]
    caplog.clear()
    assert accelerate(model).layers == 0
    assert "'base_model.model.proj' first: they run fused already" in caplog.text
    handle.remove()
    for model.base_model.model.proj.forward in (lambda x: x, functools.partial(torch.mul, other=2)):
        caplog.clear()
        assert accelerate(model).layers == 0
        assert "'base_model.model.proj' first: a forward was put on the layer itself" in caplog.text
