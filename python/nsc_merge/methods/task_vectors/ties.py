"""TIES-Merging (arXiv 2306.01708) with the variants of public codebases as presets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from nsc_merge.adapters import Adapter, Factor
from nsc_merge.methods.gradient_free import gradient_free
from nsc_merge.methods.method import Averages
from nsc_merge.methods.shared_options import check_weights, fill, weights_of
from nsc_merge.methods.task_vectors import tiles
from nsc_merge.methods.task_vectors.elementwise import (
    AGGREGATES,
    KEEPS,
    SIGNS,
    TRIM_SCOPES,
    ZEROS,
    Ties,
    dense_updates,
    may_cancel,
    tasks_by_path,
    ties_merge,
    ties_of,
)
from nsc_merge.methods.task_vectors.in_factors import merged_in_factors
from nsc_merge.utils.option_checks import check_choice, check_number

_STEPS = ("density", "trim_scope", "keep", "sign", "zero", "aggregate", "scale")
PRESETS: dict[str, dict[str, Any]] = {
    name: dict(zip(_STEPS, values, strict=True))
    for name, values in {
        "canonical": (0.2, "global", "next", "sum", "majority", "mean", 1.0),
        "peft": (0.2, "tensor", "floor", "sum", "positive", "mean", 1.0),
        "mergekit": (1.0, "tensor", "floor", "weighted", "positive", "weight", 1.0),
        "knots": (0.3, "global", "next", "sum", "majority", "mean", 0.3),
        "adamerging": (0.2, "global", "next", "sum", "majority", "sum", 0.3),
        "nsc": (0.2, "tensor", "round", "count", "positive", "sum", 0.3),
    }.items()
}


def check_ties(options: Any) -> None:
    """Refuse options of the three steps that are none."""
    check_number("density", options.density, 0, 1, above=True)
    check_choice("trim_scope", options.trim_scope, (*TRIM_SCOPES, "factors"))
    check_choice("keep", options.keep, KEEPS)
    check_choice("sign", options.sign, SIGNS)
    check_choice("zero", options.zero, ZEROS)
    check_choice("aggregate", options.aggregate, AGGREGATES)
    check_number("scale", options.scale)


def steps_of(options: Any) -> Ties:
    """The options of the three steps."""
    return Ties(*(getattr(options, step.name) for step in fields(Ties)))


def averages(options: Any) -> Averages:
    """Whether the three steps divide what they add up, as :func:`nsc_merge.methods.gradient_free.gradient_free`
    asks.
    """
    return "weight" if options.aggregate == "weight" else options.aggregate == "mean"


@dataclass(frozen=True)
class TiesOptions:
    """Options of ``method="ties"``; those that are None are the preset's.

    Attributes:
        preset: ``"canonical"`` (the authors'), ``"peft"`` (its ``ties_svd``, before the SVD), ``"mergekit"``,
            ``"knots"`` (its published ViT-B/32 settings of plain TIES), ``"adamerging"`` (also FusionBench's) or
            ``"nsc"`` (that of NSC's public code, with the density of the paper).
        scale: multiplies the merged update.
        density: share of a task's entries that trimming keeps, the largest by magnitude; 1 does not trim.
        keep: how many that is, of N entries: ``"next"``, density times N rounded down and one more, and all that are as
            large as the last of them (the authors', KnOTS', AdaMerging's and FusionBench's code); ``"floor"``, exactly
            density times N rounded down (PEFT and mergekit, which keeps one where that is none); ``"round"``, exactly
            density times N rounded to the nearest, halves to even, but at least one (NSC's); or ``"complement"``, N
            less (1 - density) times N rounded down, and one more, and all as large (RobustMerge, MergeLM). Of equally
            large entries an exact number takes the first, as nothing else is defined by those codebases.
        trim_scope: counts a task's entries over all modules that its adapter has (``"global"``), those of a module that
            training left at zero among them, in each module (``"tensor"``), or in A and B separately (``"factors"``,
            PEFT's ``ties``: the factors are merged, weighted by the root of weight times scaling, and their product has
            cross terms between tasks; all ranks must be equal, and unlike with the others the result depends on how an
            update is factored).
        sign: that a position is given: of the ``"sum"`` of the values, of their ``"weighted"`` sum (mergekit's), or of
            the ``"count"`` of their signs. With a negative weight, ``"weighted"`` elects and compares turned values.
        zero: what a tie becomes: ``"positive"``, ``"negative"``, or ``"majority"``, the more frequent sign
            among all that ``trim_scope`` counts together, negative if there is none.
        aggregate: of the values that agree with the sign: ``"mean"``, ``"sum"``, or ``"weight"``, their sum divided by
            the sum of their weights.
        weights: task -> weight of its values, 1 each when None.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS

    preset: str = "canonical"
    scale: float | None = None
    density: float | None = None
    trim_scope: str | None = None
    keep: str | None = None
    sign: str | None = None
    zero: str | None = None
    aggregate: str | None = None
    weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        fill(self, self.presets)
        check_ties(self)
        check_weights(self.weights)


def ties(
    adapters: Mapping[str, Adapter], paths: Sequence[str], options: TiesOptions
) -> Iterator[tuple[str, Factor]]:
    """Path and merged update; with ``trim_scope="factors"`` of low rank, else dense."""
    assert options.scale is not None
    weights, steps = weights_of(options.weights, list(adapters)), steps_of(options)
    if options.trim_scope == "factors":

        def one(name: str, tensors: Mapping[str, Tensor], into: Mapping[str, float]) -> Tensor:
            return ties_of(tensors, steps, into)

        yield from merged_in_factors("trim_scope='factors'", adapters, paths, weights, options.scale, one)
        return
    tasks = tasks_by_path(adapters, paths)
    if tiles.serves(adapters, paths) and not may_cancel(steps.aggregate, weights.values()):
        merged = tiles.ties_merge(tiles.layers_of(adapters), tasks, steps, weights)
    else:
        merged = ties_merge(dense_updates(adapters), tasks, steps, weights)
    for path, update in merged:
        yield path, Factor.of_matrix(update.mul_(options.scale))


METHODS = (
    gradient_free(
        "ties",
        "keeps each task's largest entries, elects a sign per entry, and averages those that agree",
        "TIES-Merging, Yadav et al. 2023, arXiv 2306.01708",
        TiesOptions,
        ties,
        averages=averages,
        gives="full rank",
        of_entries=True,
        low_rank_with={"trim_scope": "factors"},
    ),
)
