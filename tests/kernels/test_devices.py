"""Devices that lack something: float64 is computed elsewhere, and any device is served by the reference."""

from __future__ import annotations

import torch

from nsc_kernels.devices import to_float64, with_float64
from small_device import run

OPERATOR = """
from device_without_float64 import NAME
import torch
import nsc_kernels as nk

torch.manual_seed(0)
A, B = [torch.randn(r, 16) for r in (4, 0, 3)], [torch.randn(12, r) for r in (4, 0, 3)]
z, lam, base, linear = torch.randn(5, 16), torch.rand(3), torch.randn(5, 12), torch.nn.Linear(16, 12)

def results(device, bank):
    inputs = [t.to(device).requires_grad_() for t in (z, lam, base)]
    y, quad, sqnorm = nk.merged_lora_nsc(inputs[0], bank, *inputs[1:])
    omega = nk.null_space_ratio(quad, sqnorm)
    grads = torch.autograd.grad(y.square().sum() + omega.sum(), inputs)
    layer = nk.MergedLoRALinear(linear.to(device), bank, [0.2, 0.3, 0.4])(z.to(device))
    return [t.detach().cpu() for t in (y, quad, sqnorm, omega, *grads, layer, bank.delta([0.2, 0.3, 0.4]))]

expected = results("cpu", nk.AdapterBank.from_factors(A, B))
moved = [t.to(NAME) for t in A], [t.to(NAME) for t in B]
for bank in (nk.AdapterBank.from_factors(*moved), nk.AdapterBank.from_factors(A, B, device=NAME)):
    assert bank.device.type == NAME
    for found, wanted in zip(results(NAME, bank), expected, strict=True):
        # Where terms cancel, an element is as far off as the largest are rounded.
        torch.testing.assert_close(found, wanted, rtol=1.3e-6, atol=1.3e-6 * max(1, float(wanted.abs().max())))
print("the same")
"""


def test_the_operator_on_a_device_without_float64():
    assert "the same" in run(OPERATOR)


def test_float64_stays_where_it_is_to_be_had():
    assert with_float64("cpu") == torch.device("cpu")
    assert to_float64(torch.ones(2, dtype=torch.bfloat16)).dtype is torch.float64
