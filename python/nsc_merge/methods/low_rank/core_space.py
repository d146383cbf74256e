"""Core Space merging (arXiv 2509.17786): updates merged as small cores between common bases of their factors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nsc_merge.adapters import Adapter, Factor
from nsc_merge.methods.gradient_free import gradient_free, present
from nsc_merge.methods.low_rank.common_bases import cores, decomposed, in_float32, without_rounding
from nsc_merge.methods.method import Averages
from nsc_merge.methods.task_vectors.dare import check_drop, sparsify
from nsc_merge.methods.task_vectors.elementwise import AGGREGATES, SIGNS, ZEROS, Ties, ties_of
from nsc_merge.methods.task_vectors.ties import averages
from nsc_merge.utils.option_checks import check_choice, check_number

MERGES = ("sum", "ties", "dare", "dare_ties")
BASES = ("factors", "updates")


@dataclass(frozen=True)
class CoreSpaceOptions:
    """Options of ``method="core_space"``.

    Attributes:
        scale: multiplies the merged update.
        merge: how cores are merged, each module by itself as in the authors' code: ``"sum"`` (which is task
            arithmetic), ``"ties"`` (which keeps as many entries of a core as the code of TIES' authors does),
            ``"dare"`` or ``"dare_ties"``.
        bases: singular vectors of the ``"factors"`` next to one another (the authors'), so that the result depends on
            how an update is factored unless cores are summed (and not isotropised with ``null_directions``), or of the
            ``"updates"``, with which it does not.
        isotropise: give all singular values of the merged core that are not zero their mean.
        null_directions: as the authors' code, keep what belongs to singular values of zero. Where factors are of
            deficient rank, a core then still has as many rows and columns as the ranks add up to (no more than the
            layer is wide), of which trimming counts more entries. Isotropising takes the mean over all singular values
            and gives it to those of zero too, as trimming often leaves them; only rounding says in which directions, so
            that other machines find another update. Needs ``bases="factors"``.
        density: as ``sign``, ``zero`` and ``aggregate``, of TIES; see
            :class:`nsc_merge.methods.task_vectors.ties.TiesOptions`. The authors search it from 0.3.
        sign: of TIES.
        zero: of TIES.
        aggregate: of TIES.
        drop: as ``rescale`` and ``seed``, of DARE; see :class:`nsc_merge.methods.task_vectors.dare.DareOptions`.
        rescale: of DARE.
        seed: of DARE.
    """

    scale: float = 1.0
    merge: str = "ties"
    bases: str = "factors"
    isotropise: bool = False
    null_directions: bool = False
    density: float = 0.3
    sign: str = "sum"
    zero: str = "majority"
    aggregate: str = "mean"
    drop: float = 0.3
    rescale: str = "inverse"
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("scale", self.scale)
        check_choice("merge", self.merge, MERGES)
        check_choice("bases", self.bases, BASES)
        check_choice("isotropise", self.isotropise, (True, False))
        check_choice("null_directions", self.null_directions, (True, False))
        if self.null_directions and self.bases != "factors":
            raise ValueError(f"null_directions: expected bases='factors' with it, found bases={self.bases!r}")
        check_number("density", self.density, 0, 1, above=True)
        check_choice("sign", self.sign, SIGNS)
        check_choice("zero", self.zero, ZEROS)
        check_choice("aggregate", self.aggregate, AGGREGATES)
        check_drop(self)


def core_space(
    adapters: Mapping[str, Adapter], paths: Sequence[str], options: CoreSpaceOptions
) -> Iterator[tuple[str, Factor]]:
    """Path and merged update."""
    for path in paths:
        common = cores(present(adapters, path), options.null_directions)
        if options.bases == "updates":
            common = common.by_updates()
        merged = _merged(path, common.M, options)
        if options.isotropise:
            merged = isotropised(merged, options.null_directions)
        yield path, common.factor(options.scale * merged)


def isotropised(core: Tensor, null: bool) -> Tensor:
    """``core`` with each singular value above rounding replaced by their mean, all and by the mean of all with
    ``null``.
    """
    if null:
        left, sigma, right = torch.linalg.svd(core, full_matrices=False)
        return sigma.mean() * left @ right
    left, sigma, right = decomposed(core)
    return sigma.mean() * left @ right if len(sigma) else core


def _merged(path: str, parts: Mapping[str, Tensor], options: CoreSpaceOptions) -> Tensor:
    parts = {task: without_rounding(part) for task, part in parts.items()}
    if options.merge in ("dare", "dare_ties"):
        parts = {
            task: sparsify(part, options.drop, options.rescale, options.seed, task, path)
            for task, part in parts.items()
        }
    if options.merge in ("sum", "dare"):
        return torch.stack(list(parts.values())).sum(0)
    steps = Ties(options.density, "tensor", "next", options.sign, options.zero, options.aggregate)
    return ties_of(parts, steps)


def _of_factors(options: CoreSpaceOptions) -> bool:
    # A mean over all singular values is one over as many as the factors have directions.
    every_value = options.isotropise and options.null_directions
    return options.bases == "factors" and (options.merge != "sum" or every_value)


def _averages(options: CoreSpaceOptions) -> Averages:
    return options.merge in ("ties", "dare_ties") and averages(options)


METHODS = (
    gradient_free(
        "core_space",
        "merges small cores between bases that all adapters share",
        "Core Space, Panariello et al. 2025, arXiv 2509.17786",
        CoreSpaceOptions,
        in_float32(core_space),
        averages=_averages,
        of_factors=_of_factors,
    ),
)
