"""Dense updates as products of factors."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nsc_merge.adapters.adapter import Factor

# How wide the first guess at a range is.
_FIRST = 32
# Ranks are looked for as long as factors are smaller than the matrix, but no further than the greater of these: a
# number, and a part of the narrow side.
_MOST, _SHARE = 256, 16
# Rows of the residual that are formed at a time.
_ROWS = 1024
# In units of float32's or float64's rounding: products of factors leave less than that, and so do differences of
# weights up to a hundred times as large.
_ROUNDINGS = 64
# Random products more than the rank, so that they are sure to span the range.
_OVERSAMPLING = 8


def factored(delta: Tensor, tolerance: float | None = None) -> Factor:
    """``delta`` as a product of factors, of the least rank found that leaves out no more than ``tolerance``; or as the
    matrix that it is, where factors would be no smaller, or their rank would be above 256 and above a sixteenth of the
    narrow side.

    A part of the matrix tells how large the rank is at least, so that those of full rank cost little. The range is then
    found from products with random vectors, seeded and so the same each time (Halko, Martinsson and Tropp 2011, arXiv
    0909.4061, algorithm 4.1), twice as many until the residual, which is computed, is small enough. A product rounded
    to half precision has no low rank at the default tolerance, and comes back whole.

    Args:
        delta: ``[d_out, d_in]``, floating point and finite.
        tolerance: relative error (Frobenius); None is rounding, 64 units of ``delta``'s dtype, float32's for half
            precision.

    Returns:
        Factors ``A [r, d_in]`` and ``B [d_out, r]`` in float32, or in float64 if ``delta`` is, r being 0 where it is
        zero; or ``delta`` itself as ``dense`` beside factors of rank 0.
    """
    dtype = torch.float64 if delta.dtype == torch.float64 else torch.float32
    bound = _ROUNDINGS * torch.finfo(dtype).eps if tolerance is None else tolerance
    d_out, d_in = delta.shape
    norm = torch.linalg.vector_norm(delta, dtype=torch.float64)
    if norm == 0:
        return Factor(delta.new_empty(0, d_in), delta.new_empty(d_out, 0), 1.0)
    generator = torch.Generator().manual_seed(0)
    most = min(d_out * d_in // (d_out + d_in), max(_MOST, min(d_out, d_in) // _SHARE))
    needed = _least_rank(delta, 2 * most, generator, float(norm), bound)
    columns = min(max(_FIRST, 1 << (needed + _OVERSAMPLING).bit_length()), most) if needed <= most else 0
    while columns:
        found = _in_range(delta, columns, generator, float(norm), bound)
        if found is not None:
            A, B = found
            return Factor(A.to(dtype), B.to(dtype), 1.0)
        columns = min(2 * columns, most) if columns < most else 0
    return Factor.of_matrix(delta)


def as_product(factor: Factor) -> Factor:
    """The same update of full rank as a product, one of whose factors is the identity."""
    if factor.dense is None:
        return factor
    d_out, d_in = factor.dense.shape
    identity = torch.eye(min(d_out, d_in), dtype=factor.dense.dtype, device=factor.dense.device)
    A, B = (factor.dense, identity) if d_out <= d_in else (identity, factor.dense)
    return replace(factor, A=A, B=B, dense=None)


def _least_rank(delta: Tensor, side: int, generator: torch.Generator, norm: float, bound: float) -> int:
    """What rank it takes at least to leave out no more than ``bound * norm``, by a part of ``side`` rows and columns:
    no rank leaves out less of the whole than of a part.
    """
    rows, columns = (
        torch.randperm(width, generator=generator, device="cpu")[:side].to(delta.device) for width in delta.shape
    )
    sigma = torch.linalg.svdvals(delta[rows][:, columns].double())
    return int((_behind(sigma) > (bound * norm) ** 2).sum())


def _behind(sigma: Tensor) -> Tensor:
    """For each singular value, the squares of it and all smaller ones added up."""
    return sigma.square().flip(0).cumsum(0).flip(0)


def _in_range(
    delta: Tensor, columns: int, generator: torch.Generator, norm: float, bound: float
) -> tuple[Tensor, Tensor] | None:
    """Factors between which ``delta`` stands but for ``bound * norm``, if so many random products span its range."""
    rows = delta.split(_ROWS)
    random = torch.randn(delta.shape[1], columns, generator=generator, dtype=torch.float64, device="cpu")
    random = random.to(delta.device)
    basis = torch.linalg.qr(torch.cat([some.double() @ random for some in rows])).Q
    parts = basis.split(_ROWS)
    inside = sum(part.t() @ some.double() for part, some in zip(parts, rows, strict=True))
    assert isinstance(inside, Tensor)
    left_out = sum(
        float(torch.linalg.vector_norm(some.double() - part @ inside)) ** 2
        for part, some in zip(parts, rows, strict=True)
    )
    room = (bound * norm) ** 2 - left_out
    if room < 0:
        return None
    q, r = torch.linalg.qr(inside.t())
    left, sigma, right = torch.linalg.svd(r.t(), full_matrices=False)
    rank = int((_behind(sigma) > room).sum())
    roots = sigma[:rank].sqrt()
    return roots[:, None] * (right[:rank] @ q.t()), basis @ (left[:, :rank] * roots)
