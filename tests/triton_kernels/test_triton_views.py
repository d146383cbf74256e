"""Tensors whose memory does not hold what they read as: kernels are handed addresses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import nsc_kernels as nk


@pytest.fixture
def bank(device: torch.device) -> nk.AdapterBank:
    A, B = [torch.randn(r, 24) for r in (3, 2)], [torch.randn(20, r) for r in (3, 2)]
    return nk.AdapterBank.from_factors(A, B, device=device)


def results(bank: nk.AdapterBank, lam: Tensor, **given: Tensor) -> dict[str, Tensor]:
    z, lam = given["z"].detach().requires_grad_(), lam.detach().requires_grad_()
    y, quad, sqnorm = nk.merged_lora_nsc(z, bank, lam, given["base"])
    into = [given[name] for name in ("dy", "dquad", "dsqnorm")]
    dz, dlam = torch.autograd.grad([y, quad, sqnorm], [z, lam], into)
    return {"y": y, "quad": quad, "sqnorm": sqnorm, "dz": dz, "dlam": dlam}


@pytest.mark.parametrize("name", ["z", "base", "lam", "dy", "dquad", "dsqnorm"])
def test_a_view_that_torch_negates_when_it_is_read(name: str, bank: nk.AdapterBank, device: torch.device) -> None:
    shapes = {"z": (7, 24), "base": (7, 20), "lam": (2,), "dy": (7, 20), "dquad": (7, 2), "dsqnorm": (7,)}
    given = {key: torch.randn(shape, device=device) for key, shape in shapes.items()}
    view = torch._neg_view(given[name])  # type: ignore[attr-defined]
    assert view.is_neg()
    assert view.is_contiguous()
    with nk.use_backend("triton"):
        found = results(bank, **{**given, name: view})
    with nk.use_backend("reference"):
        expected = results(bank, **{**given, name: -given[name]})
    for key, t in found.items():
        torch.testing.assert_close(t, expected[key], rtol=1e-5, atol=1e-4, msg=key)


def test_gradients_in_batches(bank: nk.AdapterBank, device: torch.device) -> None:
    """As of is_grads_batched, which jacobian(vectorize=True) and gradcheck(check_batched_grad=True) use."""
    z, lam = torch.randn(5, 24, device=device, requires_grad=True), torch.rand(2, device=device, requires_grad=True)
    with nk.use_backend("triton"):
        for output in nk.merged_lora_nsc(z, bank, lam):  # each alone: that of another one would tell
            many = torch.randn(2, *output.shape, device=device)
            one_by_one = [torch.autograd.grad(output, (z, lam), into, retain_graph=True) for into in many]
            together = torch.autograd.grad(output, (z, lam), many, is_grads_batched=True, retain_graph=True)
            for found, expected in zip(together, zip(*one_by_one, strict=True), strict=True):
                assert torch.equal(found, torch.stack(expected))
