"""Real libraries of quantised weights, where they are installed: their forward is kept, their codes are not touched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nsc_merge
from nsc_merge import Adapter, Factor


def bitsandbytes_8bit(model):
    library = pytest.importorskip("bitsandbytes")
    for name, linear in model.named_children():
        quantised = library.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
        quantised.weight = library.nn.Int8Params(linear.weight.detach(), requires_grad=False, has_fp16_weights=False)
        setattr(model, name, quantised.to("cpu"))


def bitsandbytes_4bit(model):
    library = pytest.importorskip("bitsandbytes")
    for name, linear in model.named_children():
        quantised = library.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32)
        quantised.weight = library.nn.Params4bit(linear.weight.detach(), requires_grad=False)
        setattr(model, name, quantised.to("cpu"))


def torchao(model):
    library = pytest.importorskip("torchao.quantization")
    library.quantize_(model, library.Int8WeightOnlyConfig())


def quanto(model):
    library = pytest.importorskip("optimum.quanto")
    library.quantize(model, weights=library.qint8)
    library.freeze(model)


@pytest.mark.parametrize("quantise", [bitsandbytes_8bit, bitsandbytes_4bit, torchao, quanto])
def test_attached_around_their_forward_and_refused_for_apply(quantise):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(2)))
    quantise(model)
    model.scale = nn.Parameter(torch.ones(1))
    model.eval().requires_grad_(False)
    factors = {path: Factor(torch.randn(2, 64), torch.randn(64, 2), 0.5) for path in ("0", "1")}
    result = nsc_merge.merge(model, {"a": Adapter("a", factors)}, method="task_arithmetic", scale=0.4)
    z = torch.randn(3, 64)
    with torch.no_grad():
        expected = z
        for path in ("0", "1"):
            expected = model.get_submodule(path)(expected) + expected @ result.delta(path).float().t()
    with nsc_merge.attach(model, result.adapters, 0.4) as merged:
        found = model(z)
        found.sum().backward()
        assert all(module.lam.grad.abs() > 0 for module in merged.values())
    # 8-bit products quantise their input as well, so that a rounding before them shows.
    torch.testing.assert_close(found.detach(), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))
    with torch.no_grad():
        before = model(z)
    with pytest.raises(ValueError, match=r"^0\.weight: .*; use format 'lora' and load it on the quantised base"):
        result.apply(model)
    with torch.no_grad():
        assert torch.equal(model(z), before)
