"""Algebra of low-rank updates in float64: common bases, so that no matrix is larger than a layer's width times the sum
of the ranks, and no decomposition is of one larger than the sum of the ranks (times the number of tasks).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nsc_merge.adapters import Factor


@dataclass(frozen=True)
class Cores:
    """The updates of one module in bases that they share: ``s_k B_k A_k = U M_k V``.

    Attributes:
        U: ``[d_out, p]``, orthonormal columns; p is the sum of the ranks, or d_out if that is less.
        V: ``[q, d_in]``, orthonormal rows.
        M: task -> ``[p, q]``.
    """

    U: Tensor
    V: Tensor
    M: dict[str, Tensor]

    def factor(self, core: Tensor) -> Factor:
        """``U core V`` as an update, in float64: of rank p or q, whichever is less."""
        if core.shape[0] <= core.shape[1]:
            return Factor(core @ self.V, self.U, 1.0)
        return Factor(self.V, self.U @ core, 1.0)


def cores(factors: Mapping[str, Factor], *, singular: bool = False) -> Cores:
    """Common bases of the updates of one module, by QR of the factors next to one another.

    Args:
        factors: task -> update of low rank.
        singular: take the singular vectors of ``[s_k B_k]`` and of the ``A_k`` on top of one another as bases, as
            Core Space does. Unlike any basis of the same spaces they depend on how an update is factored.
    """
    ups = torch.cat([factor.scaling * factor.B.double() for factor in factors.values()], 1)
    downs = torch.cat([factor.A.double() for factor in factors.values()]).t()
    (U, up), (Vt, down) = (_basis(side, singular) for side in (ups, downs))
    ranks = [factor.rank for factor in factors.values()]
    parts = zip(up.split(ranks, 1), down.split(ranks, 1), strict=True)
    return Cores(U, Vt.t(), {task: left @ right.t() for task, (left, right) in zip(factors, parts, strict=True)})


def _basis(side: Tensor, singular: bool) -> tuple[Tensor, Tensor]:
    """``Q [d, p]`` with orthonormal columns and ``C [p, R]`` with ``Q C = side [d, R]``."""
    q, r = torch.linalg.qr(side)
    if not singular:
        return q, r
    left, sigma, right = torch.linalg.svd(r, full_matrices=False)
    return q @ left, sigma[:, None] * right


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
