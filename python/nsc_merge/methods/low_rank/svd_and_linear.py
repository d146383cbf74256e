"""Merges that add: the truncated SVD of the summed updates, and the product of summed factors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from nsc_merge.adapters import Adapter, Factor
from nsc_merge.methods.gradient_free import check_equal_ranks, gradient_free, present
from nsc_merge.methods.low_rank.common_bases import cores, in_float32, truncated
from nsc_merge.methods.shared_options import check_weights, weights_of
from nsc_merge.methods.task_vectors.in_factors import roots_of
from nsc_merge.utils.option_checks import check_choice, check_count, check_number

PRESETS = ("peft", "nsc")


@dataclass(frozen=True)
class SVDOptions:
    """Options of ``method="svd"``.

    Attributes:
        scale: multiplies the merged update.
        rank: of the merged update in every module; None keeps all of the sum, which is task arithmetic.
        weights: task -> weight of its update, 1 each when None.
    """

    scale: float = 1.0
    rank: int | None = None
    weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        check_number("scale", self.scale)
        if self.rank is not None:
            check_count("rank", self.rank)
        check_weights(self.weights)


@dataclass(frozen=True)
class LinearOptions:
    """Options of ``method="linear"``.

    Attributes:
        scale: multiplies the merged update.
        weights: task -> weight, 1 each when None.
        preset: where weight and scaling of a task go: ``"peft"`` puts the square root of their product into both
            factors and its sign into PEFT's first, which is A, of embeddings B; ``"nsc"`` adds the A as they are and
            puts both into B (NSC's public code, which has neither).
    """

    scale: float = 1.0
    weights: Mapping[str, float] | None = None
    preset: str = "peft"

    def __post_init__(self) -> None:
        check_number("scale", self.scale)
        check_weights(self.weights)
        check_choice("preset", self.preset, PRESETS)


def svd(
    adapters: Mapping[str, Adapter], paths: Sequence[str], options: SVDOptions
) -> Iterator[tuple[str, Factor]]:
    """Path and the best approximation of the sum of all updates."""
    weights = weights_of(options.weights, list(adapters))
    for path in paths:
        common = cores(present(adapters, path))
        total = torch.stack([weights[task] * part for task, part in common.M.items()]).sum(0)
        left, right = truncated(total, options.rank)
        yield path, Factor(right @ common.V, options.scale * (common.U @ left), 1.0)


def linear(
    adapters: Mapping[str, Adapter], paths: Sequence[str], options: LinearOptions
) -> Iterator[tuple[str, Factor]]:
    """Path and ``(sum_k b_k B_k) (sum_k a_k A_k)``, which also holds the products of different tasks' factors and so
    depends on how the updates are factored.
    """
    weights = weights_of(options.weights, list(adapters))
    check_equal_ranks("method 'linear'", adapters, paths)
    for path in paths:
        factors = present(adapters, path)
        if options.preset == "peft":
            into_A, into_B = roots_of(factors, weights)
        else:
            into_A = dict.fromkeys(factors, 1.0)
            into_B = {task: weights[task] * factor.scaling for task, factor in factors.items()}
        A = torch.stack([into_A[task] * factor.A.double() for task, factor in factors.items()]).sum(0)
        B = torch.stack([into_B[task] * factor.B.double() for task, factor in factors.items()]).sum(0)
        yield path, Factor(A, options.scale * B, 1.0)


METHODS = (
    gradient_free(
        "svd",
        "adds the updates and keeps the largest singular values",
        "PEFT's combination_type 'svd'; a baseline of arXiv 2603.26317",
        SVDOptions,
        in_float32(svd),
    ),
    gradient_free(
        "linear",
        "adds the A factors and the B factors; their product mixes tasks",
        "PEFT's combination_type 'linear'; a baseline of arXiv 2603.26317",
        LinearOptions,
        in_float32(linear),
        of_factors=True,
    ),
)
