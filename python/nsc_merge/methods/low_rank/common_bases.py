"""Algebra of low-rank updates in float64: common bases, so that no matrix is larger than a layer's width times the sum
of the ranks, and no decomposition is of one larger than the sum of the ranks (times the number of tasks).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsc_merge.adapters import Adapter, Factor
from nsc_merge.methods.method import Updates

_ROUNDING = 1e-12


@dataclass(frozen=True)
class Cores:
    """The updates of one module in bases that they share: ``s_k B_k A_k = U M_k V``.

    Attributes:
        U: ``[d_out, p]``, orthonormal columns.
        V: ``[q, d_in]``, orthonormal rows.
        M: task -> ``[p, q]``.
    """

    U: Tensor
    V: Tensor
    M: dict[str, Tensor]

    def factor(self, core: Tensor) -> Factor:
        """``U core V`` as an update, of rank p or q, whichever is less."""
        if core.shape[0] <= core.shape[1]:
            return Factor(core @ self.V, self.U, 1.0)
        return Factor(self.V, self.U @ core, 1.0)

    def by_updates(self) -> Cores:
        """The same updates between the singular vectors of all updates next to and on top of one another, which do not
        depend on how an update is factored.
        """
        parts = list(self.M.values())
        left = singular(torch.cat(parts, 1))
        right = singular(torch.cat(parts).t())
        return Cores(
            self.U @ left, right.t() @ self.V, {task: left.t() @ part @ right for task, part in self.M.items()}
        )


def cores(factors: Mapping[str, Factor], null: bool = False) -> Cores:
    """Common bases of the updates of one module: the left singular vectors of ``[s_1 B_1, ..., s_K B_K]`` and the right
    ones of the ``A_k`` on top of one another, as Core Space takes them (arXiv 2509.17786).

    p and q are the numerical ranks of the two, so that factors of deficient rank, or shared ones, need no more of
    either than there is.

    Args:
        factors: task -> update of low rank.
        null: keep singular vectors of values that are zero as well, as Core Space's code does; which those are is
            a matter of rounding.
    """
    U, up = _basis(torch.cat([factor.scaling * factor.B.double() for factor in factors.values()], 1), null)
    Vt, down = _basis(torch.cat([factor.A.double() for factor in factors.values()]).t(), null)
    ranks = [factor.rank for factor in factors.values()]
    parts = zip(up.split(ranks, 1), down.split(ranks, 1), strict=True)
    return Cores(U, Vt.t(), {task: left @ right.t() for task, (left, right) in zip(factors, parts, strict=True)})


def _basis(side: Tensor, null: bool) -> tuple[Tensor, Tensor]:
    """Left singular vectors ``Q [d, p]`` of ``side [d, R]`` and ``C [p, R]`` with ``Q C = side``; p is its rank, or the
    lesser of d and R with ``null``.
    """
    q, r = torch.linalg.qr(side)
    basis = q @ singular(r, null)
    # Not what the decomposition leaves over: a column of zeros must have coordinates of zero, which have no vote.
    return basis, basis.t() @ side


def singular(matrix: Tensor, null: bool = False) -> Tensor:
    """Left singular vectors of values above rounding, all with ``null``."""
    left, sigma, _ = torch.linalg.svd(matrix, full_matrices=False)
    if null:
        return left
    kept = sigma > max(matrix.shape) * torch.finfo(sigma.dtype).eps * sigma.max() if len(sigma) else sigma > 0
    return left[:, kept]


def decomposed(core: Tensor, largest: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Left vectors ``[p, r]``, values ``[r]`` and right vectors ``[r, q]`` of the singular values of a core that
    factors in float32 can vouch for. What makes values alike would make one that is rounding a direction like others.

    Args:
        core: ``[p, q]``.
        largest: the singular value that the others are held against; the core's own when None.
    """
    left, sigma, right = torch.linalg.svd(core, full_matrices=False)
    if largest is None:
        largest = float(sigma.max()) if len(sigma) else 0.0
    kept = sigma > torch.finfo(torch.float32).eps * largest
    return left[:, kept], sigma[kept], right[kept]


def orthogonalised(columns: Tensor) -> Tensor:
    """The matrix with orthonormal columns nearest to ``columns [p, n]`` (orthogonal Procrustes); where the columns span
    fewer than n directions, the nearest partial isometry, which has no direction that they do not have.
    """
    left, _, right = decomposed(columns)
    return left @ right


def numerical_rank(core: Tensor) -> int:
    """How many singular values of a product of adapters' factors are more than rounding, in the sense of
    :func:`without_rounding`: those that come of factors which float32 keeps are the product of two such errors.
    """
    sigma = torch.linalg.svdvals(core)
    return int((sigma > _ROUNDING * sigma.max()).sum()) if len(sigma) else 0


def without_rounding(part: Tensor) -> Tensor:
    """``part`` with zeros where it holds nothing but rounding, which must not vote in TIES: adapters are kept in
    float32, of which :data:`_ROUNDING` of the largest entry is far less than the last bit.
    """
    if not part.numel():
        return part
    magnitude = part.abs()
    return torch.where(magnitude > _ROUNDING * magnitude.max(), part, 0.0)


def truncated(core: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """``left [p, r]``, ``right [r, q]`` of the best approximation of rank ``rank`` at most, both with the roots of the
    singular values.
    """
    left, sigma, right = torch.linalg.svd(core, full_matrices=False)
    roots = sigma[:rank].sqrt()
    return left[:, :rank] * roots, roots[:, None] * right[:rank]


def rounded(factor: Factor) -> Factor:
    """The update with factors in float32, as adapters are kept."""
    return Factor(factor.A.float(), factor.B.float(), factor.scaling)


def in_float32(updates: Updates) -> Updates:
    """``updates``, which are computed in float64, with :func:`rounded` factors."""

    def each(adapters: Mapping[str, Adapter], paths: Sequence[str], options: Any) -> Iterator[tuple[str, Factor]]:
        for path, factor in updates(adapters, paths, options):
            yield path, rounded(factor)

    return each
