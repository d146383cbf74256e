"""The operator as registered torch.library ops, for torch.compile, export and profilers.

``nsc::merged_lora`` and ``nsc::merged_lora_backward`` are opaque to the compiler and choose their backend when they
run. Eager code does not pass through them: :mod:`nsc_kernels.autograd` calls the same :func:`run_forward` and
:func:`run_backward` from a ``torch.autograd.Function``, which costs half as much per call.

Schemas are defined here, in Python, so that they exist with no native library; the native libraries only add kernels.
The schema is the signature of what is registered for an op: functions take its arguments as they come.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from . import reference
from .contract import Backend, BackwardCall, Call, ForwardCall
from .dispatch import AUTO, chosen, select
from .modes import without_autocast
from .reference import accumulation_dtype

NAMESPACE = "nsc"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
TAGS = (torch.Tag.pt2_compliant_tag,)

FORWARD_SCHEMA = (
    "(Tensor z, Tensor A, Tensor Bt, int[] offsets, Tensor lam, Tensor? base, bool stats, bool save_u)"
    " -> (Tensor y, Tensor quad, Tensor sqnorm, Tensor u)"
)
BACKWARD_SCHEMA = (
    "(Tensor? dy, Tensor? dquad, Tensor? dsqnorm, Tensor u, Tensor? z, Tensor A, Tensor Bt, int[] offsets,"
    " Tensor lam, Tensor? dz_base, bool need_dz, bool need_dlam) -> (Tensor dz, Tensor dlam)"
)


def select_backend(z: Tensor, A: Tensor, Bt: Tensor, offsets: Sequence[int]) -> Backend:
    """The backend that serves ``z [T, d_in]``, by the explicit or the automatic choice."""
    return select(chosen(), Call(z.device, z.dtype, z.shape[0], A.shape[1], Bt.shape[1], tuple(offsets)))


@overload
def unit_stride(t: Tensor) -> Tensor: ...
@overload
def unit_stride(t: Tensor | None) -> Tensor | None: ...
def unit_stride(t: Tensor | None) -> Tensor | None:
    """``t`` itself if its rows are contiguous, else a contiguous copy: what backends may assume of z, base and dy.

    Of a tensor without rows or of one column ``contiguous()`` would return itself, whatever its stride.
    """
    return t if t is None or t.stride(-1) == 1 else t.clone(memory_format=torch.contiguous_format)


def run_forward(backend: Backend, call: ForwardCall) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """One forward on one backend. The only way to a backend's kernels."""
    z, A, Bt, offsets, lam, base, stats, save_u, reuse_base = call
    # Most calls are as backends want them. They are handed on as they are: another record costs more than asking.
    if not (
        z.stride(-1) == 1
        and A.is_contiguous()
        and Bt.is_contiguous()
        and lam.is_contiguous()
        and (base is None or base.stride(-1) == 1)
    ):
        call = ForwardCall(
            unit_stride(z),
            A.contiguous(),
            Bt.contiguous(),
            offsets,
            lam.contiguous(),
            unit_stride(base),
            stats,
            save_u,
            reuse_base,
        )
    return backend.forward(call)


def run_backward(backend: Backend, call: BackwardCall) -> tuple[Tensor | None, Tensor | None]:
    """One backward on one backend. The only way to a backend's kernels.

    The statistics depend on z alone, so without ``need_dz`` their gradients are dropped here. lam reaches y alone, so
    without ``dy`` its gradient is zero, and no kernel is asked for zero times a u that may hold NaN.
    """
    dy, dquad, dsqnorm, u, z, A, Bt, offsets, lam, dz_base, need_dz, need_dlam, reuse_base = call
    if dy is None and need_dlam:
        dz = run_backward(backend, call._replace(need_dlam=False))[0] if need_dz else None
        return dz, torch.zeros_like(lam, memory_format=torch.contiguous_format)
    if not (
        (dy is None or dy.stride(-1) == 1)
        and (dquad is None or (need_dz and dquad.is_contiguous() and dquad.stride(-1) == 1))
        and (dsqnorm is None or (need_dz and dsqnorm.is_contiguous()))
        and u.is_contiguous()
        and (z is None or z.stride(-1) == 1)
        and A.is_contiguous()
        and Bt.is_contiguous()
        and lam.is_contiguous()
        and (dz_base is None or dz_base.stride(-1) == 1)
    ):
        call = BackwardCall(
            unit_stride(dy),
            unit_stride(dquad).contiguous() if need_dz and dquad is not None else None,
            dsqnorm.contiguous() if need_dz and dsqnorm is not None else None,
            u.contiguous(),
            unit_stride(z),
            A.contiguous(),
            Bt.contiguous(),
            offsets,
            lam.contiguous(),
            unit_stride(dz_base),
            need_dz,
            need_dlam,
            reuse_base,
        )
    return backend.backward(call)


def derived_backward(*arguments: Any) -> tuple[Tensor | None, Tensor | None]:
    """The backward, of arguments that a transform wraps: they cannot be handed to a kernel.

    As an operator it gets gradients in batches one at a time. It has no derivative of its own, so that the reference
    serves where one is taken in forward mode.
    """
    if forward_ad._current_level >= 0:
        refuse_other_than_reference()
        return reference.backward(*arguments)
    return torch.ops.nsc.merged_lora_backward(*arguments)


def refuse_other_than_reference() -> None:
    """Raise where another backend than the one that transforms can see through was asked for."""
    if chosen() not in (AUTO, "reference"):
        raise RuntimeError(
            f"backend {chosen()!r} was asked for, but torch.func transforms and forward-mode differentiation are "
            "served by 'reference' only"
        )


def _tensor(t: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    """An op returns tensors only: what was not asked for is empty."""
    return torch.empty(0, dtype=dtype, device=like.device) if t is None else t


def _refuse_tangents(arguments: tuple[Any, ...]) -> None:
    """Raise where a graph that holds an op is differentiated in forward mode: its tangents would be left out."""
    if forward_ad._current_level >= 0 and any(
        isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in arguments
    ):
        raise RuntimeError(
            "nsc::merged_lora has no derivative in forward mode within a graph; differentiate the function itself, and "
            "not what torch.compile or a trace made of it"
        )


def _forward_impl(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _refuse_tangents(arguments)
    call = ForwardCall(*arguments)
    z, acc = call.z, call.lam.dtype
    # A graph computes as it was made, wherever it is called from.
    with without_autocast(z.device.type):
        y, quad, sqnorm, u = run_forward(select_backend(z, call.A, call.Bt, call.offsets), call)
    return y, _tensor(quad, z, acc), _tensor(sqnorm, z, acc), _tensor(u, z, z.dtype)


def _backward_impl(*arguments: Any) -> tuple[Tensor, Tensor]:
    _refuse_tangents(arguments)
    call = BackwardCall(*arguments)
    with without_autocast(call.u.device.type):
        dz, dlam = run_backward(select_backend(call.u, call.A, call.Bt, call.offsets), call)
    return _tensor(dz, call.u, call.A.dtype), _tensor(dlam, call.u, call.lam.dtype)


def forward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes of a forward op's results."""
    z, A, Bt, offsets, _, _, stats, save_u = arguments
    K, R = len(offsets) - 1, A.shape[0]
    torch._check(z.dim() == 2 and z.shape[1] == A.shape[1], lambda: f"z must be [T, {A.shape[1]}], found {z.shape}")
    torch._check(Bt.shape[0] == R, lambda: f"A and Bt must have one row count, found {R} and {Bt.shape[0]}")
    T, acc = z.shape[0], accumulation_dtype(z.dtype)
    return (
        z.new_empty(T, Bt.shape[1]),
        z.new_empty((T, K) if stats else 0, dtype=acc),
        z.new_empty(T if stats else 0, dtype=acc),
        z.new_empty((T, R) if save_u else 0),
    )


def backward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of a backward op's results."""
    call = BackwardCall(*arguments)
    dz = call.A.new_empty((call.u.shape[0], call.A.shape[1]) if call.need_dz else 0)
    return dz, call.lam.new_empty(call.lam.shape if call.need_dlam else 0)


def define(name: str, schema: str, fake: Any) -> None:
    """Add an op to the library, with what the compiler needs to know of it."""
    LIBRARY.define(name + schema, tags=TAGS)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)


define("merged_lora", FORWARD_SCHEMA, forward_fake)
define("merged_lora_backward", BACKWARD_SCHEMA, backward_fake)
LIBRARY.impl("merged_lora", _forward_impl, "CompositeExplicitAutograd")
LIBRARY.impl("merged_lora_backward", _backward_impl, "CompositeExplicitAutograd")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, A, Bt, offsets, lam, _, stats, save_u = inputs
    if not save_u:
        raise RuntimeError(
            "nsc::merged_lora needs save_u=True where a gradient is required; of what was traced or exported, make it "
            "with gradients enabled and an example input that requires one, or run it under torch.no_grad()"
        )
    ctx.save_for_backward(output[3], A, Bt, lam, z if stats else None)
    ctx.offsets, ctx.stats = offsets, stats
    ctx.set_materialize_grads(False)


@once_differentiable
def _op_backward(ctx: Any, dy: Any, dquad: Any, dsqnorm: Any, du: Any) -> tuple[Any, ...]:
    u, A, Bt, lam, z = ctx.saved_tensors
    need_z, need_A, need_Bt, _, need_lam, need_base = ctx.needs_input_grad[:6]
    if need_A or need_Bt:
        raise RuntimeError("nsc::merged_lora: A and Bt are frozen; they have no gradient")
    dz = dlam = None
    if need_z or need_lam:
        dz, dlam = derived_backward(
            dy,
            dquad if ctx.stats else None,
            dsqnorm if ctx.stats else None,
            u,
            z,
            A,
            Bt,
            ctx.offsets,
            lam,
            None,
            need_z,
            need_lam,
        )
    return (
        dz if need_z else None,
        None,
        None,
        None,
        dlam if need_lam else None,
        dy if need_base else None,
        None,
        None,
    )


torch.library.register_autograd(f"{NAMESPACE}::merged_lora", _op_backward, setup_context=_setup_context, lib=LIBRARY)


def _backward_of_batches(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, ...]:
    """Gradients in batches, one at a time: what torch.vmap does where nobody says so, with a warning."""
    given = list(zip(arguments, in_dims, strict=True))
    found = [
        torch.ops.nsc.merged_lora_backward(
            *(t.select(dim, i) if isinstance(t, Tensor) and dim is not None else t for t, dim in given)
        )
        for i in range(info.batch_size)
    ]
    return tuple(torch.stack(parts) for parts in zip(*found, strict=True)), (0, 0)


torch.library.register_vmap(f"{NAMESPACE}::merged_lora_backward", _backward_of_batches, lib=LIBRARY)
