"""MergedLoRALinear, and PEFT's layers, around quantised layers that are no nn.Linear."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import nsc_kernels as nk
import operator_cases as oc


class Coded(nn.Module):
    """int8 codes in a buffer that is not called weight, and a dtype in which the product is computed."""

    def __init__(self, computes: torch.dtype, gives: torch.dtype | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.computes, self.gives = 48, 40, computes, gives
        weight = torch.randn(40, 48, generator=torch.Generator().manual_seed(3))
        self.register_buffer("scales", weight.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("codes", (weight / self.scales).round().to(torch.int8))

    def numbers(self) -> torch.Tensor:
        return self.codes * self.scales

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        y = nn.functional.linear(z.to(self.computes), self.numbers().to(self.computes))
        return y.to(self.gives or z.dtype)


def bank_of(dtype: torch.dtype) -> nk.AdapterBank:
    return oc.make_bank(oc.Case("module"), dtype)


def plain_of(layer: Coded, bank: nk.AdapterBank, lam: object) -> nk.MergedLoRALinear:
    linear = nn.Linear(48, 40, bias=False, dtype=bank.dtype)
    linear.weight = nn.Parameter(layer.numbers().to(bank.dtype))
    return nk.MergedLoRALinear(linear, bank, lam)  # type: ignore[arg-type]


def test_forward_statistics_and_gradients_are_those_of_its_numbers() -> None:
    bank, layer = bank_of(torch.float32), Coded(torch.float32)
    found = []
    for build in (nk.MergedLoRALinear, plain_of):
        lam = nn.Parameter(torch.tensor([0.3, 0.6]))
        module = build(layer, bank, lam)  # type: ignore[operator]
        z = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1)).requires_grad_()
        outputs = module.nsc(z)
        sum(out.square().sum() for out in outputs).backward()
        found.append((*outputs, module(z), z.grad, lam.grad))
    for mine, plain in zip(*found, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))


@pytest.mark.parametrize(
    ("given", "held", "gives"),
    [
        (torch.float32, torch.bfloat16, None),
        (torch.bfloat16, torch.float32, None),
        (torch.bfloat16, torch.bfloat16, torch.float32),
    ],
)
def test_a_layer_of_another_dtype_keeps_it(given: torch.dtype, held: torch.dtype, gives: torch.dtype | None) -> None:
    layer, bank = Coded(torch.float32, gives), bank_of(held)
    lam = nn.Parameter(torch.tensor([0.3, 0.6]))
    module = nk.MergedLoRALinear(layer, bank, lam)
    z = torch.randn(3, 48, dtype=given, requires_grad=True)
    y, quad, sqnorm = module.nsc(z)
    assert y.dtype is (gives or given)
    wide = z.detach().float() @ (layer.numbers() + bank.delta(lam.detach()).float()).t()
    torch.testing.assert_close(y.float(), wide, rtol=0, atol=2e-2 * float(wide.detach().abs().max()))
    assert torch.equal(module(z), y)
    (y.float().sum() + quad.sum() + sqnorm.sum()).backward()
    assert z.grad is not None
    assert lam.grad is not None
    assert bool((lam.grad != 0).all())


def test_has_what_the_layer_has() -> None:
    layer = nk.MergedLoRALinear(Coded(torch.float32), bank_of(torch.float32), [0.3, 0.6])
    names = ["bank.A", "bank.Bt", "bank._extra_state", "lam", "linear.codes", "linear.scales"]
    assert sorted(layer.state_dict()) == names
    assert "Coded()" in repr(layer)
    assert (layer.in_features, layer.out_features, layer.bias) == (48, 40, None)
    with pytest.raises(AttributeError, match="weight"):
        _ = layer.weight
    other = nk.MergedLoRALinear(Coded(torch.float32), bank_of(torch.float32), [0.0, 0.0])
    other.load_state_dict(layer.state_dict())
    z = torch.randn(2, 48)
    assert torch.equal(other(z), layer(z))
    # Rows with coefficients of their own.
    rows = nk.functional.merged_linear(z[None], layer.linear, layer.bank, layer.lam.expand(1, 2, 2), False)
    torch.testing.assert_close(rows[0], layer(z))


def test_compiles_in_one_graph() -> None:
    layer = nk.MergedLoRALinear(Coded(torch.bfloat16), bank_of(torch.float32), nn.Parameter(torch.tensor([0.3, 0.6])))
    z = torch.randn(2, 3, 48)
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(z), layer(z))


class Tuples(Coded):
    def forward(self, z):  # type: ignore[no-untyped-def]
        return super().forward(z), None


class Shards(Coded):
    def forward(self, z):  # type: ignore[no-untyped-def]
        return super().forward(z)[..., :20]


class Codes(Coded):
    def forward(self, z):  # type: ignore[no-untyped-def]
        return super().forward(z).int()


@pytest.mark.parametrize(
    ("kind", "z", "error", "words"),
    [
        (Tuples, torch.ones(2, 48), TypeError, "linear must return a tensor, found tuple from Tuples"),
        (Shards, torch.ones(2, 48), ValueError, r"base must have shape \(2, 40\), found \(2, 20\)"),
        (Shards, torch.ones(2, 48, dtype=torch.bfloat16), ValueError, r"linear\(z\) must have shape \(2, 40\), found"),
        (Codes, torch.ones(2, 48), TypeError, r"linear\(z\) must be of a floating dtype, found torch.int32"),
        (Coded, torch.ones(2, 40), ValueError, r"z must have shape \[..., d_in=48\]"),
    ],
)
def test_refuses_what_is_no_linear(kind: type[Coded], z: torch.Tensor, error: type[Exception], words: str) -> None:
    layer = nk.MergedLoRALinear(kind(torch.float32), bank_of(torch.float32), [0.3, 0.6])
    with pytest.raises(error, match=words):
        layer(z)


@pytest.mark.parametrize("kind", ["gptq.GPTQLoraLinear", "awq.AwqLoraLinear"])
def test_pefts_layers_around_one_run_fused(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    lora = pytest.importorskip("peft.tuners.lora")
    from nsc_kernels.integrations import peft as integration

    file, name = kind.split(".")
    config = lora.LoraConfig(init_lora_weights=False)
    build = getattr(__import__(f"peft.tuners.lora.{file}", fromlist=[name]), name)
    torch.manual_seed(0)
    layer = build(Coded(torch.float32), "a", config=config, r=4, lora_alpha=8)
    layer.update_layer("b", 3, lora_alpha=3, config=config)
    layer.set_adapter(["a", "b"])
    layer.requires_grad_(False)
    z = torch.randn(2, 5, 48, requires_grad=True)
    caplog.set_level(logging.WARNING, logger="nsc_kernels")
    integration._say_once.cache_clear()
    found = []
    for fused in (False, True):
        with integration.accelerate(nn.Sequential(layer)) if fused else torch.enable_grad():
            y = layer(z)
        found.append((y.detach(), *torch.autograd.grad(y.square().sum(), z)))
    assert "forward" not in vars(layer)
    assert not caplog.records
    for mine, peft in zip(*found, strict=True):
        torch.testing.assert_close(mine, peft, rtol=1e-5, atol=1e-5 * float(peft.abs().max()))
