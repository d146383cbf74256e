"""RobustMerge (arXiv 2502.17159), as its public code has it and as its Algorithm 1 has it, which are two methods.

``A~_k`` and ``B~_k`` are the factors of task k's update with their smallest entries set to zero, the scaling in
``B~_k``. ``c_k`` makes up for that: of each row of ``A_k`` the sum of magnitudes, divided by that of ``A~_k``. Then

* ``robustmerge``: ``B A`` with ``A = 2 sum_k A~_k``, ``B = 2 sum_k B~_k diag(c_k / sum_j c_j)``, where each ``c_k`` is
  raised to the 80th percentile of its task. It has cross terms between tasks, and its factors of 2, the public code's,
  make of one task four times the trimmed update: tune ``scale``;
* ``robustmerge_alg1``: ``sum_k B~_k diag(c_k / sum_j c_j) A~_k``, without cross terms; rows of a number are shared out
  among the tasks whose rank reaches it.

Both depend on how an update is factored. ``A`` is what PEFT calls so, also of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nsc_merge.adapters import Adapter, Factor
from nsc_merge.adapters.algebra.low_rank import transposed
from nsc_merge.methods.gradient_free import check_equal_ranks, gradient_free, present
from nsc_merge.methods.low_rank.common_bases import in_float32
from nsc_merge.methods.task_vectors.elementwise import bound, trim
from nsc_merge.methods.task_vectors.in_factors import is_transposed
from nsc_merge.utils.option_checks import check_number

# The public code multiplies both merged factors by this.
FUSE = 2.0
PERCENTILE = 0.8


@dataclass(frozen=True)
class RobustMergeOptions:
    """Options of ``method="robustmerge"``.

    Attributes:
        scale: multiplies the merged update.
        density: share of the entries of each A and each B that is kept, the largest by magnitude: of N entries, as in
            the public code, N less (1 - density) times N rounded down, and one more, and all as large as the last.
    """

    scale: float = 1.0
    density: float = 0.2

    def __post_init__(self) -> None:
        check_number("scale", self.scale)
        check_number("density", self.density, 0, 1, above=True)


@dataclass(frozen=True)
class RobustMerge1Options(RobustMergeOptions):
    """Options of ``method="robustmerge_alg1"``.

    Attributes:
        scale: multiplies the merged update.
        density: as in :class:`RobustMergeOptions`; that of TARA-Merge's code for Algorithm 1, which multiplies the
            update by 2 besides.
    """

    density: float = 0.8


def robustmerge(
    adapters: Mapping[str, Adapter], paths: Sequence[str], options: RobustMergeOptions
) -> Iterator[tuple[str, Factor]]:
    """Path and merged update."""
    check_equal_ranks("method 'robustmerge'", adapters, paths)
    for path in paths:
        factors = list(present(adapters, path).values())
        turn = _turn(factors)
        parts = [_pruned(turn(factor), options.density) for factor in factors]
        shares = torch.stack([share for _, _, share in parts])
        least = shares.sort(dim=1).values[:, int(PERCENTILE * shares.shape[1]), None]
        shares = torch.maximum(shares, least)
        A = FUSE * torch.stack([A for A, _, _ in parts]).sum(0)
        B = FUSE * torch.stack([B * share for (_, B, _), share in zip(parts, shares, strict=True)]).sum(0)
        yield path, turn(Factor(A, options.scale * B / shares.sum(0), 1.0))


def robustmerge_alg1(
    adapters: Mapping[str, Adapter], paths: Sequence[str], options: RobustMerge1Options
) -> Iterator[tuple[str, Factor]]:
    """Path and merged update."""
    for path in paths:
        factors = list(present(adapters, path).values())
        turn = _turn(factors)
        parts = [_pruned(turn(factor), options.density) for factor in factors]
        longest = max(len(share) for _, _, share in parts)
        total = torch.stack([torch.nn.functional.pad(share, (0, longest - len(share))) for _, _, share in parts]).sum(0)
        A = torch.cat([A for A, _, _ in parts])
        B = torch.cat([B * (share / total[: len(share)]) for _, B, share in parts], 1)
        yield path, turn(Factor(A, options.scale * B, 1.0))


def _turn(factors: Sequence[Factor]) -> Callable[[Factor], Factor]:
    """What makes A of a module's factors that which PEFT calls A, and brings merged ones back."""
    return transposed if is_transposed(factors) else lambda factor: factor


def _pruned(factor: Factor, density: float) -> tuple[Tensor, Tensor, Tensor]:
    """The trimmed A and s B, and per row of A the magnitude before trimming by that after."""
    A, B = factor.A.double(), factor.scaling * factor.B.double()
    kept_A, kept_B = (trim(side, bound(side, density, "complement")) for side in (A, B))
    left = kept_A.abs().sum(1)
    # A row of which nothing is left has nothing to make up for.
    return kept_A, kept_B, torch.where(left > 0, A.abs().sum(1) / left.clamp(min=1e-30), 1.0)


METHODS = (
    gradient_free(
        "robustmerge",
        "trims A and B, makes up for what was trimmed, and adds factors (the public code)",
        "RobustMerge, Zeng et al. 2025, arXiv 2502.17159",
        RobustMergeOptions,
        in_float32(robustmerge),
        averages=True,
        of_factors=True,
    ),
    gradient_free(
        "robustmerge_alg1",
        "trims A and B, makes up for what was trimmed, and adds updates (the paper's Algorithm 1)",
        "RobustMerge, Zeng et al. 2025, arXiv 2502.17159, Algorithm 1",
        RobustMerge1Options,
        in_float32(robustmerge_alg1),
        averages=True,
        of_factors=True,
    ),
)
