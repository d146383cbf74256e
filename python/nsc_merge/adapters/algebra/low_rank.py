"""Low-rank forms of a sum of updates: exact, or truncated by singular values."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from nsc_merge.adapters.adapter import Factor

# A coefficient and the update that it scales.
Term: TypeAlias = tuple[float, Factor]
# Of an update: its rows from one number up to another, in float64 and memory of their own.
Rows: TypeAlias = Callable[[int, int], Tensor]

# Up to this width an exact SVD of a dense update takes about a second; a wide one would take minutes.
_EXACT_WIDTH = 1024
_OVERSAMPLING, _ITERATIONS = 16, 4


def concatenated(terms: Iterable[Term]) -> tuple[Tensor, Tensor]:
    """``A [R, d_in]`` and ``B [d_out, R]`` in float64 whose product is the sum, R = sum of ranks."""
    held = list(terms)
    A = torch.cat([factor.A.double() for _, factor in held])
    B = torch.cat([lam * factor.scaling * factor.B.double() for lam, factor in held], 1)
    return A, B


def total_gain(terms: Iterable[Term]) -> Tensor | None:
    """The sum of the gains ``[d_out]`` in float64, if there is one."""
    gains = [lam * factor.scaling * factor.gain.double() for lam, factor in terms if factor.gain is not None]
    return torch.stack(gains).sum(0) if gains else None


def rows_of(terms: Iterable[Term], device: torch.device | str = "cpu", base: Rows | None = None) -> Rows:
    """The sum ``[d_out, d_in]`` some rows at a time, on ``device``: one product of the concatenated factors, so that
    nothing of the width of the layer is kept for each term. Gains scale rows of the weight that ``base`` gives.
    """
    held = list(terms)
    A, B = (part.to(device) for part in concatenated(held))
    denses = [(lam * factor.scaling, factor.dense) for lam, factor in held if factor.dense is not None]

    gain = total_gain(held)
    assert gain is None or base is not None, "a gain is of the base's weight"

    def rows(begin: int, end: int) -> Tensor:
        total = B[begin:end] @ A
        for share, matrix in denses:
            total.add_(matrix[begin:end].to(device).double(), alpha=share)
        if gain is not None and base is not None:
            total.addcmul_(base(begin, end).to(device).double(), gain[begin:end, None].to(device))
        return total

    return rows


def transposed(factor: Factor) -> Factor:
    """The same update of a weight that is stored the other way round, ``[d_in, d_out]``."""
    held = None if factor.dense is None else factor.dense.t()
    return Factor(factor.B.t(), factor.A.t(), factor.scaling, dense=held)


def dense(terms: Iterable[Term], base: Rows | None = None) -> Tensor:
    """The sum as a matrix ``[d_out, d_in]`` in float64; ``base`` as in :func:`rows_of`."""
    held = list(terms)
    return rows_of(held, base=base)(0, held[0][1].B.shape[0])


def low_rank(terms: Iterable[Term], rank: int) -> tuple[Tensor, Tensor, float]:
    """``A [r, d_in]``, ``B [d_out, r]`` with r <= ``rank`` next to the sum, and their relative Frobenius error.

    The best of that rank; of a wide update that has no factors, as good as a few subspace iterations find it. Gains
    (:func:`total_gain`) are no part of it.
    """
    held = list(terms)
    if any(factor.dense is not None for _, factor in held):
        return _low_rank_of_dense(dense([(lam, replace(factor, gain=None)) for lam, factor in held]), rank)
    A, B = concatenated(held)
    if A.shape[0] <= rank:
        return A, B, 0.0
    # QR of both factors first: the SVD is then of the sum of the ranks, not of the layer's width.
    q_in, r_in = torch.linalg.qr(A.t())
    q_out, r_out = torch.linalg.qr(B)
    left, sigma, right = torch.linalg.svd(r_out @ r_in.t(), full_matrices=False)
    roots = sigma[:rank].sqrt()
    error = float(sigma[rank:].norm() / sigma.norm()) if sigma.any() else 0.0
    return (roots[:, None] * right[:rank]) @ q_in.t(), (q_out @ left[:, :rank]) * roots, error


def _low_rank_of_dense(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    narrow = min(delta.shape)
    if narrow <= max(_EXACT_WIDTH, 4 * rank):
        left, sigma, right = torch.linalg.svd(delta, full_matrices=False)
    else:
        # Seeded here, so that the same merge gives the same file.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, sigma, columns = torch.svd_lowrank(delta, q=min(narrow, rank + _OVERSAMPLING), niter=_ITERATIONS)
        right = columns.t()
    kept = int((sigma[:rank] > 0).sum())
    roots = sigma[:kept].sqrt()
    A, B = roots[:, None] * right[:kept], left[:, :kept] * roots
    norm = delta.norm()
    return A, B, float((delta - B @ A).norm() / norm) if norm > 0 else 0.0
