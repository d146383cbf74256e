"""Under autocast, modes, transforms and global hooks: as torch's own; nothing that others keep is written over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from test_operator import BACKENDS, require
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import nsc_kernels as nk
from nsc_kernels.backends import reference
from nsc_kernels.contract import BackwardCall, ForwardCall


def layer(d_in: int = 16, d_out: int = 12, dtype: torch.dtype = torch.float32) -> nk.MergedLoRALinear:
    generator = torch.Generator().manual_seed(0)
    A = [torch.randn(rank, d_in, generator=generator) for rank in (3, 2)]
    B = [torch.randn(d_out, rank, generator=generator) for rank in (3, 2)]
    linear = nn.Linear(d_in, d_out).requires_grad_(False)
    for parameter in linear.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    bank = nk.AdapterBank.from_factors(A, B)
    return nk.MergedLoRALinear(linear, bank, nn.Parameter(torch.tensor([0.3, -0.5]))).to(dtype)


def input_of(width: int = 16) -> Tensor:
    return torch.randn(5, width, generator=torch.Generator().manual_seed(1)).requires_grad_()


def gradients(y: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y.square().sum(), of)


class Keeping(TorchDispatchMode):
    """Keeps what products return, and a copy of it."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            self.kept.append((found, found.clone()))
        return found


class KeepingFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is nn.functional.linear:
            self.kept.append((found, found.clone()))
        return found


@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """The reference writes over what it is allowed to, as the kernels of GPUs do. What each call allowed."""
    asked: list[bool] = []
    forward, backward = reference.forward, reference.backward

    def over_base(call: ForwardCall) -> Any:
        y, *rest = forward(call)
        asked.append(call.reuse_base)
        return (call.base.copy_(y) if call.reuse_base and call.base is not None else y, *rest)

    def over_dz_base(call: BackwardCall) -> Any:
        dz, dlam = backward(call)
        asked.append(call.reuse_base)
        taken = call.reuse_base and call.dz_base is not None and dz is not None
        return call.dz_base.copy_(dz) if taken and call.dz_base is not None and dz is not None else dz, dlam

    monkeypatch.setattr(reference, "forward", over_base)
    monkeypatch.setattr(reference, "backward", over_dz_base)
    with nk.use_backend("reference"):
        yield asked


def test_where_nobody_watches_what_was_made_here_is_written_over(in_place: list[bool]) -> None:
    one, x = layer(), input_of()
    gradients(one(x), x, one.lam)
    with torch.no_grad():
        one(x)
    assert in_place == [True, True, True]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("stats", [False, True])
def test_a_base_that_the_caller_holds_is_not_written_over(in_place: list[bool], grad: bool, stats: bool) -> None:
    one, x = layer(), input_of()
    base = one.linear(x).detach()
    before = base.clone()
    with torch.set_grad_enabled(grad):
        (nk.merged_lora_nsc if stats else nk.merged_lora)(x, one.bank, one.lam, base)
    assert in_place == [False]
    assert torch.equal(base, before)


@pytest.mark.parametrize("mode", [Keeping, KeepingFunctions])
def test_what_a_mode_keeps_is_not_written_over(in_place: list[bool], mode: Callable[[], Any]) -> None:
    one, x = layer(), input_of()
    expected, before = gradients(one(x), x, one.lam), one(x)
    watching = mode()
    with watching:
        found = gradients(one(x), x, one.lam)
        of_before = gradients(before, x, one.lam)
        with torch.no_grad():
            one(x)
    assert len(watching.kept) >= 2
    assert all(torch.equal(kept, copy) for kept, copy in watching.kept)
    for a, b in zip((*found, *of_before), 2 * expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_selective_checkpointing_that_keeps_products(backend: str, in_place: list[bool]) -> None:
    require(backend)
    one, other, x = layer(), layer(12, 16), input_of()
    products = (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE

    def both(x: Tensor) -> Tensor:
        return other(one(x).sin()).square()

    with nk.use_backend(backend):
        wanted = gradients(both(x), x, one.lam, other.lam)
        contexts = partial(create_selective_checkpoint_contexts, policy)
        found = gradients(checkpoint(both, x, use_reentrant=False, context_fn=contexts), x, one.lam, other.lam)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stats", [False, True])
def test_a_backward_under_autocast_is_that_of_its_forward(backend: str, stats: bool) -> None:
    require(backend)
    one, x = layer(), input_of()

    def loss() -> Tensor:
        if not stats:
            return one(x).square().sum()
        y, quad, sqnorm = one.nsc(x)
        return y.square().sum() + quad.sum() + sqnorm.sum()

    with nk.use_backend(backend):
        expected = torch.autograd.grad(loss(), (x, one.lam))
        with torch.autocast("cpu", torch.bfloat16):
            with torch.autocast("cpu", enabled=False):
                outside = loss()
            found = torch.autograd.grad(outside, (x, one.lam))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_autocast_is_of_its_own_kind_of_device() -> None:
    """On for GPUs it rounds nothing on the CPU; on for the CPU it is not asked for where there is none of it."""
    one, x = layer(), input_of().detach()
    expected = one(x)
    torch.set_autocast_enabled("cuda", True)
    try:
        assert torch.equal(nk.merged_lora(x, one.bank, one.lam, one.linear(x)), expected)
    finally:
        torch.set_autocast_enabled("cuda", False)
    with torch.autocast("cpu", torch.bfloat16):
        assert nk.merged_lora(x.to("meta"), one.bank.to("meta"), one.lam.to("meta")).dtype is torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_derivative_of_dlam_by_z_raises_and_is_not_left_out(backend: str) -> None:
    require(backend)
    one, x = layer(), input_of()
    with nk.use_backend(backend):
        (dlam,) = torch.autograd.grad(nk.merged_lora(x, one.bank, one.lam).sum(), one.lam, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(dlam.sum(), x, allow_unused=True)
        # That of dz by z is zero, without the statistics.
        (dz,) = torch.autograd.grad(nk.merged_lora(x, one.bank, one.lam.detach()).sum(), x, create_graph=True)
        assert not dz.requires_grad or torch.autograd.grad(dz.sum(), x, allow_unused=True) == (None,)


@pytest.mark.parametrize("compiled", [False, True])
def test_statistics_of_an_input_without_gradient_have_none(compiled: bool) -> None:
    one, x = layer(), input_of().detach()
    call = torch.compile(one.nsc, backend="aot_eager", fullgraph=True) if compiled else one.nsc
    y, quad, sqnorm = call(x)
    assert not quad.requires_grad
    assert not sqnorm.requires_grad
    # y is linear in lam: its derivatives are the updates of one adapter alone.
    (dlam,) = torch.autograd.grad(y.sum(), one.lam)
    assert torch.allclose(dlam, torch.stack([nk.merged_lora(x, one.bank, k).sum() for k in torch.eye(2)]), rtol=1e-4)
    assert all(t.requires_grad for t in call(input_of()))


def test_statistics_that_were_recorded_have_the_gradient_of_other_inputs() -> None:
    one, x = layer(), input_of()
    recorded = make_fx(lambda x: one.nsc(x))(x.detach())
    found, expected = (gradients(torch.cat([t.flatten() for t in call(x)[1:]]), x)[0] for call in (recorded, one.nsc))
    assert torch.allclose(found, expected)


@pytest.mark.parametrize("name", ["A", "Bt"])
def test_factors_that_require_a_gradient_are_refused(name: str) -> None:
    one, x = layer(), input_of()
    getattr(one.bank, name).requires_grad_()
    with pytest.raises(RuntimeError, match=f"bank.{name} requires a gradient, but the factors are frozen"):
        one(x)
    with pytest.raises(RuntimeError, match=f"bank.{name} requires a gradient"):
        nk.merged_lora(x.detach(), one.bank, one.lam.detach())
    with torch.no_grad():
        one(x)


def test_global_hooks_see_the_layer_within() -> None:
    one, x = layer(), input_of()
    plain = one(x)

    def to_zero(module: nn.Module, inputs: Any, output: Any) -> Any:
        return output * 0 if type(module) is nn.Linear else None

    with nn.modules.module.register_module_forward_hook(to_zero):
        with torch.no_grad():
            without = one(x)
        assert torch.equal(one(x), without)
    assert not torch.equal(plain, without)
    assert torch.equal(one(x), plain)


def test_symbolic_shapes_without_the_compiler() -> None:
    one, x = layer(), input_of()
    traced = make_fx(lambda x: one(x), tracing_mode="symbolic", _allow_non_fake_inputs=True)(x)
    longer = torch.cat([x, x]).detach()
    torch.testing.assert_close(traced(longer), one(longer).detach())
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True) as mode:
        assert one(mode.from_tensor(x)).shape == (5, 12)


@pytest.mark.parametrize("how", ["fake", "grad", "make_fx"])
def test_what_a_mode_makes_of_a_bank_is_not_kept_for_autocast(how: str) -> None:
    one, x = layer(), input_of().detach()

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return one(x).float().sum()

    expected = call(x)
    one = layer()
    if how == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            call(mode.from_tensor(x))
    elif how == "grad":
        torch.func.grad(call)(x)
    else:
        make_fx(call, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    found = call(x)
    assert type(found) is Tensor
    assert torch.equal(found, expected)


def test_a_layer_of_float64_becomes_a_narrow_one() -> None:
    one = layer(dtype=torch.float64)
    assert one.lam.dtype is torch.float64
    for dtype in (torch.bfloat16, torch.float16):
        narrow = layer(dtype=torch.float64).to(dtype)
        assert narrow.lam.dtype is torch.float32
        assert narrow(input_of().detach().to(dtype)).dtype is dtype
        torch.testing.assert_close(narrow.lam.detach(), torch.tensor([0.3, -0.5]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.ones(3, 16, dtype=torch.int64)}, "z is torch.int64, which autocast does not round"),
        ({"z": torch.ones(3, 16, dtype=torch.complex64)}, "z is torch.complex64, which autocast"),
        ({"base": torch.ones(3, 12, dtype=torch.float64)}, "base is torch.float64, which autocast"),
        ({"base": torch.ones(3, 12, dtype=torch.int64)}, "base is torch.int64, which autocast"),
        ({"bank": layer(dtype=torch.float64).bank}, "bank is torch.float64, which autocast"),
    ],
)
def test_autocast_rounds_only_what_it_rounds_elsewhere(change: dict[str, Any], message: str) -> None:
    given = {"z": torch.ones(3, 16), "bank": layer().bank, "lam": torch.ones(2), "base": None, **change}
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=message):
        nk.merged_lora(**given)
