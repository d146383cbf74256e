"""The operator in NumPy: dense sums, projectors of NumPy's SVD, gradients by their formulas. No code of nsc_kernels.

The same formulas serve twice. In float64 without rounding they are what is right. In the accumulation dtype, with the
rounding points of the operator's contract, they are what can be asked of arithmetic: see :func:`disagreement`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


@dataclass
class Numbers:
    """The numbers of one call, in float64: what the tensors hold, exactly.

    ``A [R, d_in]``, ``Bt [R, d_out]`` and ``offsets`` are a bank's. ``base`` is given, or is made by ``weight`` and
    ``bias``. ``dy``, ``dquad`` and ``dsqnorm`` are the gradients that come in, None of what nobody uses. ``into`` is
    what reaches z through a linear layer that is not here as a ``weight``.
    """

    z: Array
    A: Array
    Bt: Array
    offsets: tuple[int, ...]
    lam: Array
    base: Array | None
    weight: Array | None
    bias: Array | None
    dy: Array | None
    dquad: Array | None
    dsqnorm: Array | None
    into: Array | None = None

    def map(self, change: Callable[[Array], Array]) -> Numbers:
        parts: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        parts |= {name: change(x) for name, x in parts.items() if isinstance(x, np.ndarray)}
        return Numbers(**parts)


def per_adapter(columns: Array, offsets: tuple[int, ...]) -> Array:
    """``[T, R] -> [T, K]``."""
    parts = [columns[:, a:b].sum(1) for a, b in itertools.pairwise(offsets)]
    return np.stack(parts, 1)


def _as_it_is(x: Array) -> Array:
    return x


def results(
    n: Numbers, rounded: Callable[[Array], Array] = _as_it_is, rounded_lam: Callable[[Array], Array] = _as_it_is
) -> dict[str, Array]:
    """Outputs and gradients; ``rounded`` stands wherever the contract rounds to the dtype of z, ``rounded_lam`` where
    it rounds to that of lam.
    """
    ranks = np.diff(n.offsets)
    lam = np.repeat(n.lam, ranks, -1)
    base, into = n.base, n.into
    if n.weight is not None:
        base = rounded(n.z @ n.weight.T + (0 if n.bias is None else n.bias))
        into = None if n.dy is None else rounded(n.dy @ n.weight)
    u = n.z @ n.A.T
    y = rounded(lam * u) @ n.Bt
    kept = rounded(u)
    # Where nobody uses y, lam has no gradient, whatever z holds.
    v = np.zeros_like(u) if n.dy is None else n.dy @ n.Bt.T
    dlam = np.zeros((len(u), len(n.offsets) - 1), u.dtype) if n.dy is None else per_adapter(kept * v, n.offsets)
    c = lam * v if n.dquad is None else lam * v + 2 * np.repeat(n.dquad, ranks, -1) * kept
    dz = rounded(c) @ n.A
    if n.dsqnorm is not None:
        dz = dz + 2 * n.dsqnorm[:, None] * n.z
    return {
        "y": rounded(y if base is None else y + base),
        "quad": per_adapter(u * u, n.offsets),
        "sqnorm": (n.z * n.z).sum(1),
        "dz": rounded(dz if into is None else dz + into),
        "dlam": rounded_lam(dlam.sum(0) if n.lam.ndim == 1 else dlam),
        "dbase": np.zeros((len(u), n.Bt.shape[1]), u.dtype) if n.dy is None else n.dy,
    }


def disagreement(
    found: dict[str, Array],
    n: Numbers,
    own: Numbers,
    acc: type,
    rounded: Callable[[Array], Array],
    rounded_lam: Callable[[Array], Array],
    grains: tuple[tuple[float, float], tuple[float, float]],
) -> str:
    """What of ``found`` is wrong, or nothing.

    An error may be twice that of :func:`results` in ``acc`` with the contract's rounding points (three times, if it is
    of sixteen values), in proportion to the sums of absolute values, and a few units of ``acc`` besides: of each result
    as a whole and, with one unit more, of every element. ``grains`` are the unit of the dtype of z and that of lam's
    gradient, each with the spacing of the smallest numbers. NaN and infinity must stand where they stand in float64.

    ``own`` is ``n`` for that plain arithmetic. Where a linear layer makes the base, it has what PyTorch's own layer
    makes of z and of dy: with one output it adds one product after another to the bias, which costs 1e-6 in float32
    where 127 of them are small beside it. Here the bias comes last.
    """
    right, sizes = results(n), results(n.map(np.abs))
    eager = results(own.map(lambda x: x.astype(acc)), rounded, rounded_lam)
    few = (32 if acc is np.float64 else 4) * float(np.finfo(acc).eps)
    for name, got in found.items():
        unit, tiny = grains[name == "dlam"]
        want, size, plain = right[name], sizes[name], eager[name].astype(np.float64)
        if got.shape != want.shape:
            return f"{name}: shape {got.shape}, expected {want.shape}"
        finite = np.isfinite(want)
        if not np.array_equal(np.isfinite(got), finite):
            lost, gained = int((finite & ~np.isfinite(got)).sum()), int((~finite & np.isfinite(got)).sum())
            return f"{name}: {lost} of {got.size} values are not finite and should be, {gained} are and should not be"
        if not finite.any():
            continue
        size = np.maximum(size[finite], np.finfo(np.float64).tiny)
        off, allowed = np.abs(got - want)[finite], np.abs(plain - want)[finite]
        slack = tiny * np.sqrt(off.size)
        # The rounding of few different values scatters, and tokens that are the same round in the same way.
        tokens = len({row.tobytes() for row in n.z})
        different = min(np.unique(want[finite]).size, max(tokens, 1) * max(want.shape[-1:], default=1))
        times = 2 + 4 / np.sqrt(different)
        # Of so few, all may be off by a unit, and all of plain arithmetic's by next to nothing.
        slack += unit * np.linalg.norm(want[finite]) if different < 100 else 0.0
        if not np.linalg.norm(off) <= times * np.linalg.norm(allowed) + few * np.linalg.norm(size) + slack:
            error, bound = np.linalg.norm(off) / np.linalg.norm(size), np.linalg.norm(allowed) / np.linalg.norm(size)
            return f"{name}: error {error:.3g} of the sums' size, plain arithmetic's is {bound:.3g}"
        error, bound = (off / size).max(), (allowed / size).max()
        if not (off <= (2 * bound + unit + few) * size + tiny).all():
            return f"{name}: error {error:.3g} of an element's size, plain arithmetic's is {bound:.3g}"
    return ""


def row_space(A: Array, resolution: float) -> tuple[Array, float] | None:
    """An orthonormal basis of the rows of ``A`` and their condition; None where no number of them is the right one.

    Rows are scaled to one length first. ``resolution`` is the relative size of a singular value that is rounding.
    """
    length = np.abs(A).max(1, keepdims=True) if len(A) else np.ones((0, 1))
    _, sigma, basis = np.linalg.svd(A / np.where(length > 0, length, 1), full_matrices=False)
    share = sigma / sigma[0] if len(sigma) and sigma[0] > 0 else np.zeros_like(sigma)
    if ((share > resolution / 30) & (share < 30 * resolution)).any() and resolution > 1e-12:
        return None
    rank = int((share > resolution).sum())
    return basis[:rank], (1 / share[rank - 1] if rank else 1.0)


def bank_error(
    packed_A: Array,
    packed_Bt: Array,
    offsets: tuple[int, ...],
    raw: list[tuple[Array, Array, float]],
    own: float,
    unit: float,
    tiny: float,
) -> str:
    """What is wrong with a bank of the adapters ``raw``, (A, B, scaling) each, or nothing.

    ``own`` is the resolution of the factors' dtype and ``unit`` that of the bank's, whose smallest numbers are ``tiny``
    apart.
    """
    for k, (A, B, scaling) in enumerate(raw):
        rows = slice(offsets[k], offsets[k + 1])
        W, Bt = packed_A[rows], packed_Bt[rows]
        space = row_space(A, max(len(A) * own, max(A.shape) * 2.3e-16))
        if space is None:
            continue
        basis, condition = space
        if len(W) != len(basis):
            return f"adapter {k}: rank {len(W)}, expected {len(basis)}"
        off = np.abs(W.T @ W - basis.T @ basis).max(initial=0)
        allowed = 4 * unit + 1e-14 * condition + (30 * own * condition if len(basis) < len(A) else 0)
        if not off <= allowed:
            return f"adapter {k}: projector is off by {off:.3g}, allowed {allowed:.3g}"
        right = scaling * (B @ A)
        lost = len(A) * own * abs(scaling) * float(np.linalg.norm(B, axis=0) @ np.linalg.norm(A, axis=1))
        off = float(np.linalg.norm(Bt.T @ W - right))
        allowed = (4 + len(W)) * unit * float(np.linalg.norm(right)) + lost + 1e-14 * condition * lost / own
        # Rows of W are of length 1.
        allowed += tiny * np.sqrt(Bt.size)
        if not off <= allowed:
            return f"adapter {k}: update is off by {off:.3g} of {np.linalg.norm(right):.3g}, allowed {allowed:.3g}"
    return ""
