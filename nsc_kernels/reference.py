"""The operator in plain PyTorch: the oracle every other backend is tested against.

Read this file first. Forward and backward are the same three steps with the operands swapped:

    shrink    u = x W_in^T          [T, d_in] x [R, d_in] -> [T, R]
    mid       a diagonal on the R columns; the statistics come from here
    expand    out = base + c W_out  [T, R] x [R, d_out] -> [T, d_out]

    forward :  x = z,  W_in = A,  W_out = Bt,  mid: c = lam u,              quad_k = sum u_k^2
    backward:  x = dy, W_in = Bt, W_out = A,   mid: c = lam v + 2 dquad u,  dlam_k = sum_t u_k . v_k

``A [R, d_in]`` has orthonormal rows within each adapter (see :mod:`nsc_kernels.bank`), so the quadratic form is a
sum of squares. ``Bt [R, d_out]`` is the transposed up-projection: with both factors stored ``[R, d]``, both
directions read their operands in the same order.

Rounding points (part of the contract): sums are accumulated in ``accumulation_dtype``; ``c`` is rounded to the
compute dtype once, before expand, and ``u`` once, where it is saved for the backward; ``quad`` comes from the
unrounded ``u``, ``dlam`` from the saved ``u`` and the unrounded ``v``; the output is rounded once, after ``base`` has
been added.

The forward is differentiable by autograd as it stands, which is how ``torch.func`` transforms and forward-mode
differentiation are served.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def shrink(x: Tensor, w_in: Tensor) -> Tensor:
    """``x [T, d], w_in [R, d] -> [T, R]``, not rounded."""
    acc = accumulation_dtype(x.dtype)
    return x.to(acc) @ w_in.to(acc).t()


def expand(c: Tensor, w_out: Tensor, base: Tensor | None) -> Tensor:
    """``c [T, R], w_out [R, d], base [T, d] -> [T, d]``; ``c`` is rounded to the dtype of ``w_out`` first."""
    acc = accumulation_dtype(w_out.dtype)
    out = c.to(w_out.dtype).to(acc) @ w_out.to(acc)
    return out if base is None else out + base.to(acc)


def spread(per_adapter: Tensor, offsets: Sequence[int]) -> Tensor:
    """Repeat a value per adapter over that adapter's columns: ``[..., K] -> [..., R]``."""
    owner = [k for k in range(len(offsets) - 1) for _ in range(offsets[k], offsets[k + 1])]
    return per_adapter[..., torch.tensor(owner, dtype=torch.int64, device=per_adapter.device)]


def gather(per_column: Tensor, offsets: Sequence[int]) -> Tensor:
    """Sum over each adapter's columns: ``[..., R] -> [..., K]``."""
    segments = [per_column[..., a:b].sum(-1) for a, b in itertools.pairwise(offsets)]
    return torch.stack(segments, -1)


def forward(
    z: Tensor, A: Tensor, Bt: Tensor, offsets: Sequence[int], lam: Tensor, base: Tensor | None, stats: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Merged forward with statistics.

    Args:
        z: ``[T, d_in]``, the input of the adapted linear layer.
        A, Bt: ``[R, d_in]`` and ``[R, d_out]``, dtype of ``z``.
        offsets: ``K + 1`` increasing ints; adapter k owns rows ``offsets[k]:offsets[k + 1]``.
        lam: ``[K]`` or ``[T, K]``, accumulation dtype.
        base: ``[T, d_out]`` or None (zero).
        stats: whether to compute ``quad`` and ``sqnorm``.

    Returns:
        ``y [T, d_out]``, ``quad [T, K]`` and ``sqnorm [T]`` (None without ``stats``), ``u [T, R]`` in z's dtype.
    """
    u = shrink(z, A)
    quad = gather(u * u, offsets) if stats else None
    sqnorm = z.to(u.dtype).square().sum(-1) if stats else None
    y = expand(spread(lam, offsets) * u, Bt, base)
    return y.to(z.dtype), quad, sqnorm, u.to(z.dtype)


def backward(
    dy: Tensor | None,
    dquad: Tensor | None,
    dsqnorm: Tensor | None,
    u: Tensor,
    z: Tensor | None,
    A: Tensor,
    Bt: Tensor,
    offsets: Sequence[int],
    lam: Tensor,
    dz_base: Tensor | None,
    need_dz: bool,
    need_dlam: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`forward` for ``z`` and ``lam``.

    ``dy [T, d_out]``, ``dquad [T, K]`` and ``dsqnorm [T]`` are the incoming gradients (None: zero), ``u`` is what the
    forward returned, ``z`` is needed only with ``dsqnorm``. ``dz_base [T, d_in]`` is added to ``dz``.
    Returns ``dz [T, d_in]`` in the compute dtype and ``dlam`` shaped like ``lam``, each None if not needed.
    """
    acc = lam.dtype
    u_acc = u.to(acc)
    v = torch.zeros_like(u_acc) if dy is None else shrink(dy, Bt)
    dlam = None
    if need_dlam:
        # lam reaches y alone: where y has no gradient lam has none, whatever u holds.
        dlam = gather(v if dy is None else u_acc * v, offsets)
        dlam = dlam.sum(0) if lam.dim() == 1 else dlam
    if not need_dz:
        return None, dlam
    c = spread(lam, offsets) * v
    if dquad is not None:
        c = c + 2 * spread(dquad, offsets) * u_acc
    dz = expand(c, A, dz_base)
    if dsqnorm is not None:
        assert z is not None, "z must be saved when sqnorm has a gradient"
        dz = dz + 2 * dsqnorm[:, None] * z.to(acc)
    return dz.to(A.dtype), dlam
