"""The operator as a node of the autograd graph in eager mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .contract import Backend, BackwardCall, ForwardCall
from .modes import AS_IT_IS, gradients_batched, results_watched, without_autocast
from .ops import derived_backward, run_backward, run_forward


class MergedLoRAFunction(torch.autograd.Function):
    """The eager route: one forward kernel, one backward kernel, on the backend chosen in the forward.

    ``base`` is given, or made here by a frozen linear layer (``weight``, ``bias``). Saves u (bank dtype, ``[T, R]``)
    if it is needed, and z only where ``sqnorm`` may have a gradient. Returns y, with ``stats`` quad and sqnorm, and u.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        lam: Tensor,
        base: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        Bt: Tensor,
        offsets: tuple[int, ...],
        stats: bool,
        backend: Backend,
    ) -> Any:
        need_dz, need_dlam = ctx.needs_input_grad[:2]
        save_u = need_dlam or need_dz
        if weight is not None:
            base = nn.functional.linear(z, weight, bias)
        reuse_base = weight is not None and not results_watched()
        call = ForwardCall(z, A, Bt, offsets, lam, base, stats, save_u, reuse_base)
        y, quad, sqnorm, u = run_forward(backend, call)
        if save_u:
            ctx.save_for_backward(u, lam, A, Bt, weight if need_dz else None, z if stats and need_dz else None)
        ctx.offsets, ctx.backend = offsets, backend
        ctx.set_materialize_grads(False)
        if stats and not need_dz:
            ctx.mark_non_differentiable(quad, sqnorm)
        # As a result u leads to z: dlam depends on z through it, and z itself is not always kept.
        return (y, quad, sqnorm, u) if stats else (y, u)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *others: Tensor | None) -> Any:
        need_dz, need_dlam, need_dbase = ctx.needs_input_grad[:3]
        dquad, dsqnorm = others[:2] if len(others) == 3 else (None, None)
        dz = dlam = None
        if need_dz or need_dlam:
            u, lam, A, Bt, weight, z = ctx.saved_tensors
            create_graph = torch.is_grad_enabled()
            with torch.no_grad() if create_graph else AS_IT_IS, without_autocast(u.device.type):
                dz_base = None if weight is None or dy is None else dy @ weight
                reuse_base = not results_watched()
                call = BackwardCall(
                    dy, dquad, dsqnorm, u, z, A, Bt, ctx.offsets, lam, dz_base, need_dz, need_dlam, reuse_base
                )
                if gradients_batched(dy, dquad, dsqnorm) or forward_ad._current_level >= 0:
                    dz, dlam = derived_backward(*call[:12])
                else:
                    dz, dlam = run_backward(ctx.backend, call)
            if create_graph:
                dz, dlam = OnceDifferentiable.apply(
                    dz if need_dz else None, dlam if need_dlam else None, lam, z, dy, dquad, dsqnorm
                )
                if need_dz and need_dlam and z is None:
                    _, dlam = OnceDifferentiable.apply(None, dlam, u)
        return (
            dz if need_dz else None,
            dlam if need_dlam else None,
            dy if need_dbase else None,
            *[None] * 7,
        )


class OnceDifferentiable(torch.autograd.Function):
    """Passes the gradients on and keeps them tied to what they depend on, so that differentiating them raises.

    ``once_differentiable`` raises from ``backward()`` but leaves the tensors that the gradients depend on out of the
    graph, and ``torch.autograd.grad(..., allow_unused=True)`` then returns None for a derivative that is not zero.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(dz: Tensor | None, dlam: Tensor | None, *sources: Tensor | None) -> Any:
        return dz, dlam

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def jvp(ctx: Any, dz: Tensor | None, dlam: Tensor | None, *sources: Tensor | None) -> Any:
        # Views, as the results of the forward are.
        return tuple(t if t is None else t.view_as(t) for t in (dz, dlam))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "merged_lora is differentiable once: its gradient was to be differentiated again. For second derivatives "
            "use torch.func transforms (torch.func.hessian, jvp of grad), which the reference backend serves"
        )
