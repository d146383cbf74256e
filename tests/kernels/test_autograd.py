"""Derivatives of every kind: right, or refused in words."""

from __future__ import annotations

import warnings

import pytest
import torch
from test_operator import BACKENDS, require
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import nsc_kernels as nk
import operator_cases as oc
from nsc_kernels import reference


def double_inputs(per_row: bool = False) -> tuple[nk.AdapterBank, Tensor, Tensor, Tensor]:
    case = oc.Case("grad", T=4, d_in=9, d_out=6, ranks=(2, 3), per_row=per_row)
    inputs = oc.make_inputs(case, torch.float64)
    assert inputs.base is not None
    return inputs.bank, inputs.z.requires_grad_(), inputs.lam.requires_grad_(), inputs.base.requires_grad_()


def objective(bank: nk.AdapterBank, z: Tensor, lam: Tensor, base: Tensor) -> Tensor:
    y, quad, sqnorm = nk.merged_lora_nsc(z, bank, lam, base)
    return y.square().mean() + nk.null_space_ratio(quad, sqnorm).mean() + (quad * sqnorm.unsqueeze(-1)).mean()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_row", [False, True])
def test_gradcheck(backend: str, per_row: bool) -> None:
    require(backend)
    bank, z, lam, base = double_inputs(per_row)
    with nk.use_backend(backend):
        assert torch.autograd.gradcheck(lambda *a: nk.merged_lora_nsc(a[0], bank, a[1], a[2]), (z, lam, base))
        assert torch.autograd.gradcheck(lambda *a: nk.merged_lora(a[0], bank, a[1]), (z, lam))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [("z",), ("lam",), ("base",), ("lam", "base"), ("z", "lam")])
def test_any_subset_of_gradients(backend: str, wanted: tuple[str, ...]) -> None:
    require(backend)
    bank, z, lam, base = double_inputs()
    tensors = {"z": z, "lam": lam, "base": base}
    full = dict(zip(tensors, torch.autograd.grad(objective(bank, z, lam, base), (z, lam, base)), strict=True))
    detached = {name: t if name in wanted else t.detach() for name, t in tensors.items()}
    with nk.use_backend(backend):
        grads = torch.autograd.grad(objective(bank, **detached), [tensors[name] for name in wanted])
    for name, gradient in zip(wanted, grads, strict=True):
        assert torch.allclose(gradient, full[name], rtol=1e-10, atol=1e-12)


def test_saves_u_and_the_input_only_where_it_must() -> None:
    bank, z, lam, base = double_inputs()
    saved: list[tuple[int, ...]] = []
    known = {t.data_ptr() for t in (bank.A, bank.Bt, lam)}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in known:
            saved.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        nk.merged_lora(z, bank, lam, base)
        assert saved == [(4, bank.R)]
        saved.clear()
        nk.merged_lora_nsc(z, bank, lam, base)
        assert sorted(saved) == [(4, bank.R), (4, 9)]
        saved.clear()
        nk.merged_lora_nsc(z.detach(), bank, lam, base)
        assert saved == [(4, bank.R)]
        saved.clear()
        nk.merged_lora(z.detach(), bank, lam.detach(), base)
        assert saved == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by_backward", [False, True])
def test_second_derivatives_raise(backend: str, by_backward: bool) -> None:
    require(backend)
    bank, z, lam, base = double_inputs()
    with nk.use_backend(backend):
        (gradient,) = torch.autograd.grad(objective(bank, z, lam, base), lam, create_graph=True)
        with pytest.raises(RuntimeError, match="merged_lora is differentiable once"):
            if by_backward:
                gradient.sum().backward()
            else:
                torch.autograd.grad(gradient.sum(), lam, allow_unused=True)


def test_torch_func_transforms_agree_with_reverse_mode() -> None:
    bank, z, lam, base = (t.detach() if isinstance(t, Tensor) else t for t in double_inputs())

    def loss(lam: Tensor) -> Tensor:
        return objective(bank, z, lam, base)

    leaf = lam.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert torch.allclose(torch.func.grad(loss)(lam), expected)
    assert torch.allclose(torch.func.jacrev(loss)(lam), expected)
    assert torch.allclose(torch.func.jacfwd(loss)(lam), expected)
    direction = torch.randn_like(lam)
    _, tangent = torch.func.jvp(loss, (lam,), (direction,))
    assert torch.allclose(tangent, expected @ direction)
    rows = torch.func.vmap(lambda z, base: nk.merged_lora(z, bank, lam, base))(z, base)
    assert torch.allclose(rows, nk.merged_lora(z, bank, lam, base))
    numeric = torch.stack(
        [
            (torch.func.grad(loss)(lam + h) - torch.func.grad(loss)(lam - h)) / 2e-5
            for h in 1e-5 * torch.eye(2, dtype=torch.float64)
        ]
    )
    assert torch.allclose(torch.func.hessian(loss)(lam), numeric, rtol=1e-5, atol=1e-7)


def test_forward_mode_agrees_with_reverse_mode() -> None:
    bank, z, lam, base = (t.detach() if isinstance(t, Tensor) else t for t in double_inputs())
    leaf = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(objective(bank, leaf, lam, base), leaf)
    direction = torch.randn_like(z)
    with forward_ad.dual_level():
        out = objective(bank, forward_ad.make_dual(z, direction), lam, base)
        tangent = forward_ad.unpack_dual(out).tangent
    assert torch.allclose(tangent, (expected * direction).sum())


def test_an_explicit_backend_does_not_yield_to_torch_func() -> None:
    require("cpu")
    bank, z, lam, base = (t.detach() if isinstance(t, Tensor) else t for t in double_inputs())
    with nk.use_backend("cpu"), pytest.raises(RuntimeError, match="served by 'reference' only"):
        torch.func.grad(lambda lam: objective(bank, z, lam, base))(lam)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("how", ["dual", "jvp", "jacfwd", "jvp of vmap"])
def test_forward_mode_of_a_backward_is_that_of_the_formula(how: str, create_graph: bool) -> None:
    bank, z, lam, _ = double_inputs()
    direction = torch.randn(4, 6, dtype=torch.float64)
    outputs = [nk.merged_lora(z, bank, lam), reference.forward(z, *bank.packed, lam, None, False)[0]]

    def tangents(y: Tensor) -> tuple[Tensor, ...]:
        def gradients(dy: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(y, (z, lam), dy, retain_graph=True, create_graph=create_graph)

        if how == "dual":
            with forward_ad.dual_level():
                found = gradients(forward_ad.make_dual(torch.ones_like(direction), direction))
                return tuple(forward_ad.unpack_dual(g).tangent for g in found)
        if how == "jacfwd":
            return torch.func.jacfwd(gradients)(direction)
        many = torch.stack([direction, -direction]) if how == "jvp of vmap" else direction
        wanted = torch.vmap(gradients) if how == "jvp of vmap" else gradients
        return torch.func.jvp(wanted, (torch.ones_like(many),), (many,))[1]

    for ours, expected in zip(*map(tangents, outputs), strict=True):
        assert expected.any()
        assert torch.allclose(ours, expected)


def test_a_backward_in_forward_mode_does_not_leave_an_explicit_backend() -> None:
    require("cpu")
    bank, z, lam, _ = double_inputs()
    with nk.use_backend("cpu"), pytest.raises(RuntimeError, match="served by 'reference' only"):
        y = nk.merged_lora(z, bank, lam)
        torch.func.jvp(lambda dy: torch.autograd.grad(y, z, dy), (torch.ones_like(y),), (torch.ones_like(y),))


def test_a_reverse_mode_of_a_backward_is_refused_under_transforms_too() -> None:
    bank, z, lam, _ = double_inputs()
    y = nk.merged_lora(z, bank, lam)
    with pytest.raises(RuntimeError, match="merged_lora is differentiable once"):
        torch.func.jacrev(lambda dy: torch.autograd.grad(y, z, dy, create_graph=True))(torch.ones_like(y))


def test_gradients_in_batches_are_those_one_by_one() -> None:
    bank, z, lam, _ = double_inputs()
    y = nk.merged_lora(z, bank, lam)
    many = torch.randn(3, *y.shape, dtype=torch.float64)

    def gradients(dy: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, (z, lam), dy, retain_graph=True)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = torch.vmap(gradients, in_dims=1)(many.movedim(0, 1))
    for ours, one_by_one in zip(found, zip(*map(gradients, many), strict=True), strict=True):
        assert torch.equal(ours, torch.stack(one_by_one))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    bank, z, lam, base = double_inputs()
    expected = torch.autograd.grad(objective(bank, z, lam, base), (z, lam, base))
    out = checkpoint(lambda *a: objective(bank, *a), z, lam, base, use_reentrant=reentrant)
    out.backward()
    for tensor, gradient in zip((z, lam, base), expected, strict=True):
        assert torch.equal(tensor.grad, gradient)


def test_no_grad_and_inference_mode_keep_no_graph() -> None:
    bank, z, lam, base = double_inputs()
    y = nk.merged_lora(z, bank, lam, base)
    with torch.no_grad():
        assert torch.equal(nk.merged_lora(z, bank, lam, base), y)
        assert not nk.merged_lora(z, bank, lam, base).requires_grad
    with torch.inference_mode():
        inside = nk.merged_lora_nsc(z, bank, lam, base)
    assert torch.equal(inside[0], y)
    assert inside[0].is_inference()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend: str, dtype: torch.dtype) -> None:
    require(backend)
    bank = oc.make_bank(oc.Case("autocast"), torch.float32)
    z, lam, base = torch.randn(6, 48, requires_grad=True), torch.rand(2, requires_grad=True), torch.randn(6, 40)
    with nk.use_backend(backend), torch.autocast("cpu", dtype):
        y, quad, sqnorm = nk.merged_lora_nsc(z, bank, lam, base)
        loss = y.float().square().mean() + quad.mean() + sqnorm.mean()
    assert (y.dtype, quad.dtype, sqnorm.dtype) == (dtype, torch.float32, torch.float32)
    dz, dlam = torch.autograd.grad(loss, (z, lam))
    assert (dz.dtype, dlam.dtype) == (torch.float32, torch.float32)
    narrow = nk.AdapterBank(bank.A.to(dtype), bank.Bt.to(dtype), bank.offsets)
    with nk.use_backend(backend):
        assert torch.equal(y, nk.merged_lora(z.to(dtype), narrow, lam, base.to(dtype)))


def test_autocast_converts_the_bank_once_and_again_when_it_changes() -> None:
    bank = oc.make_bank(oc.Case("autocast"), torch.float32)
    first = bank.cast_for_autocast(torch.bfloat16)
    assert bank.cast_for_autocast(torch.bfloat16) is first
    bank.A.mul_(2)
    second = bank.cast_for_autocast(torch.bfloat16)
    assert second is not first
    assert torch.equal(second.A, bank.A.bfloat16())


def test_float64_is_left_alone_by_autocast() -> None:
    bank, z, lam, base = double_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        assert nk.merged_lora(z, bank, lam, base).dtype is torch.float64


def test_narrow_lam_is_widened_and_gets_its_own_dtype_back() -> None:
    bank = oc.make_bank(oc.Case("narrow"), torch.bfloat16)
    lam = torch.tensor([0.5, 0.25], dtype=torch.bfloat16, requires_grad=True)
    nk.merged_lora(torch.randn(3, 48).bfloat16(), bank, lam).float().sum().backward()
    assert lam.grad is not None
    assert lam.grad.dtype is torch.bfloat16
