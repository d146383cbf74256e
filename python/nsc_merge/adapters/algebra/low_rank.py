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

# Up to this width an SVD of a dense update takes about a second; a wide one would take minutes.
_SVD_WIDTH = 1024
_OVERSAMPLING = 16
# Share of the squares of the leading singular values, all of them together, that one more step may add once they count
# as found; and of a step's own, below which it has found no further direction.
_SETTLED = 1e-12


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

    The best of that rank. Gains (:func:`total_gain`) are no part of it.
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
    if min(delta.shape) <= max(_SVD_WIDTH, 4 * rank):
        left, sigma, right = torch.linalg.svd(delta, full_matrices=False)
    elif delta.shape[0] <= delta.shape[1]:
        left, sigma, right = _leading(delta, rank)
    else:
        left, sigma, right = (part.t() for part in reversed(_leading(delta.t(), rank)))
    kept = int((sigma[:rank] > 0).sum())
    roots = sigma[:kept].sqrt()
    A, B = roots[:, None] * right[:kept], left[:, :kept] * roots
    norm = delta.norm()
    return A, B, float((delta - B @ A).norm() / norm) if norm > 0 else 0.0


def _leading(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular vectors and values of a matrix that is not tall, as an SVD gives them.

    Block Krylov iteration (Musco and Musco 2015, arXiv 1504.05477), orthogonalised in full, until a step adds nothing.
    Subspace iteration, which keeps its last block alone, would stop short where singular values lie close together, as
    those of trimmed updates do.
    """
    # Seeded here, so that the same merge gives the same file.
    generator = torch.Generator(delta.device).manual_seed(0)
    start = torch.empty(len(delta), rank + _OVERSAMPLING, dtype=delta.dtype, device=delta.device)
    block = torch.linalg.qr(start.normal_(generator=generator)).Q
    size = delta.abs().max().clamp(min=torch.finfo(delta.dtype).tiny)  # whose squares a number would not hold
    basis, rows, before = block, block.t() @ delta / size, 0.0
    while True:
        found = float(torch.linalg.eigvalsh(rows @ rows.t())[-rank:].sum())
        if found - before <= _SETTLED * found:
            break
        before = found
        block = delta @ rows[-block.shape[1] :].t() / size
        least = _SETTLED * block.norm()
        for _ in range(2):  # once leaves what rounding left
            block = block - basis @ (basis.t() @ block)
        block, triangle = torch.linalg.qr(block)
        block = block[:, triangle.diagonal().abs() > least][:, : len(delta) - basis.shape[1]]
        if not block.shape[1]:
            break
        basis, rows = torch.cat([basis, block], 1), torch.cat([rows, block.t() @ delta / size])
    across, triangle = torch.linalg.qr(rows.t())
    left, sigma, right = torch.linalg.svd(triangle.t(), full_matrices=False)
    return basis @ left[:, :rank], size * sigma[:rank], right[:rank] @ across.t()
