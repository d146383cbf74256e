"""DARE (arXiv 2311.03099): entries dropped at random and the others scaled up, alone or before TIES."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from nsc_kernels import entries
from nsc_merge.adapters import Adapter, Factor
from nsc_merge.methods.gradient_free import gradient_free
from nsc_merge.methods.shared_options import check_weights, fill, weights_of
from nsc_merge.methods.task_vectors import draws, tiles
from nsc_merge.methods.task_vectors.elementwise import (
    Source,
    Ties,
    added,
    dense_updates,
    may_cancel,
    tasks_by_path,
    ties_merge,
    ties_of,
    trimmed,
    weighted,
    with_sum_of,
)
from nsc_merge.methods.task_vectors.in_factors import merged_in_factors
from nsc_merge.methods.task_vectors.ties import averages, check_ties, steps_of
from nsc_merge.utils.option_checks import check_choice, check_count, check_number

RESCALES = ("inverse", "l1", "none")
ORDERS = ("drop_first", "trim_first")
DROP_SCOPES = ("update", "factors")

_STEPS = ("drop", "rescale", "order", "density", "trim_scope", "keep", "sign", "zero", "aggregate", "scale")
PRESETS: dict[str, dict[str, Any]] = {
    name: dict(zip(_STEPS, values, strict=True))
    for name, values in {
        "canonical": (0.9, "inverse", "drop_first", 0.2, "global", "next", "sum", "majority", "mean", 1.0),
        "peft": (0.9, "inverse", "drop_first", 1.0, "tensor", "floor", "sum", "positive", "mean", 1.0),
        "mergekit": (0.9, "l1", "drop_first", 1.0, "tensor", "floor", "weighted", "positive", "sum", 1.0),
        "fusion_bench": (0.5, "inverse", "drop_first", 0.2, "global", "next", "sum", "majority", "sum", 0.5),
        "knots": (0.2, "inverse", "drop_first", 1.0, "global", "next", "sum", "majority", "mean", 0.6),
        "nsc": (0.9, "inverse", "trim_first", 0.2, "tensor", "round", "count", "positive", "sum", 0.3),
    }.items()
}


@dataclass(frozen=True)
class DareOptions:
    """Options of ``method="dare"``.

    Attributes:
        scale: multiplies the merged update.
        drop: probability that an entry is dropped.
        rescale: of what is left: ``"inverse"`` by 1 / (1 - drop), so that the expectation is the update itself;
            ``"l1"`` so that the sum of magnitudes is (mergekit); or ``"none"``.
        seed: each task and module draws from a generator of its own, made from this, its name and its path.
        drop_scope: drops entries of the ``"update"``, or of A and B separately (``"factors"``, PEFT's ``dare_linear``;
            see :class:`nsc_merge.methods.task_vectors.ties.TiesOptions`).
        weights: task -> weight of its update, 1 each when None.
    """

    scale: float = 1.0
    drop: float = 0.9
    rescale: str = "inverse"
    seed: int = 0
    drop_scope: str = "update"
    weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        check_number("scale", self.scale)
        check_drop(self)
        check_choice("drop_scope", self.drop_scope, DROP_SCOPES)
        check_weights(self.weights)


@dataclass(frozen=True)
class DareTiesOptions:
    """Options of ``method="dare_ties"``; those that are None are the preset's.

    Attributes:
        preset: ``"canonical"`` (what DARE's author states: DARE, then the TIES authors' code), ``"peft"``,
            ``"mergekit"``, ``"fusion_bench"``, ``"knots"`` (its published ViT-B/32 settings of plain DARE-TIES) or
            ``"nsc"``.
        scale: multiplies the merged update.
        drop: probability that an entry is dropped.
        rescale: as in :class:`DareOptions`.
        order: ``"drop_first"``, or ``"trim_first"`` as NSC's public code.
        density: as ``trim_scope``, ``keep``, ``sign``, ``zero``, ``aggregate`` and ``weights``, of TIES;
            see :class:`nsc_merge.methods.task_vectors.ties.TiesOptions`.
        trim_scope: of TIES. ``"factors"`` also drops in A and B separately (PEFT's ``dare_ties``).
        keep: of TIES.
        sign: of TIES.
        zero: of TIES.
        aggregate: of TIES.
        weights: of TIES.
        seed: as in :class:`DareOptions`.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS

    preset: str = "canonical"
    scale: float | None = None
    drop: float | None = None
    rescale: str | None = None
    order: str | None = None
    density: float | None = None
    trim_scope: str | None = None
    keep: str | None = None
    sign: str | None = None
    zero: str | None = None
    aggregate: str | None = None
    weights: Mapping[str, float] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        fill(self, self.presets)
        check_drop(self)
        check_choice("order", self.order, ORDERS)
        check_ties(self)
        check_weights(self.weights)


def check_drop(options: Any) -> None:
    """Refuse options of dropping that are none."""
    check_number("drop", options.drop, 0, 1)
    if options.drop == 1:
        raise ValueError("drop: expected a probability below 1, found 1: nothing would be left")
    check_choice("rescale", options.rescale, RESCALES)
    check_count("seed", options.seed, 0)


def sparsify(tensor: Tensor, drop: float, rescale: str, seed: int, *names: str) -> Tensor:
    """``tensor`` with entries dropped at random, by the generator of ``seed`` and ``names``."""
    stays = draws.kept(tensor.shape, draws.key_of(seed, *names), draws.threshold_of(drop))
    kept = tensor * stays.to(tensor.device)
    if rescale == "inverse":
        return kept * (1 / (1 - drop))
    return with_sum_of(tensor, kept) if rescale == "l1" else kept


def dare(
    adapters: Mapping[str, Adapter], paths: Sequence[str], options: DareOptions
) -> Iterator[tuple[str, Factor]]:
    """Path and the sum of all tasks' thinned updates; with ``drop_scope="factors"`` of low rank, else dense."""
    tasks = tasks_by_path(adapters, paths)
    weights = weights_of(options.weights, list(adapters))
    if options.drop_scope == "factors":

        def one(name: str, tensors: Mapping[str, Tensor], into: Mapping[str, float]) -> Tensor:
            source = _dropping(lambda path, task: tensors[task], options)
            return added([into[task] * source(name, task) for task in tensors])

        yield from merged_in_factors("drop_scope='factors'", adapters, paths, weights, options.scale, one)
        return
    adapters = weighted(adapters, weights)
    if tiles.serves(adapters, paths):
        layers = tiles.thinned(tiles.layers_of(adapters), options, tasks)
        for path in tasks:
            yield path, Factor.of_matrix(entries.added(layers(path)).mul_(options.scale))
        return
    source = _dropping(dense_updates(adapters), options)
    for path, row in tasks.items():
        yield path, Factor.of_matrix(options.scale * added([source(path, task) for task in row]))


def dare_ties(
    adapters: Mapping[str, Adapter], paths: Sequence[str], options: DareTiesOptions
) -> Iterator[tuple[str, Factor]]:
    """Path and merged update; with ``trim_scope="factors"`` of low rank, else dense."""
    assert options.scale is not None
    tasks = tasks_by_path(adapters, paths)
    weights = weights_of(options.weights, list(adapters))
    steps = steps_after(options)
    if options.trim_scope == "factors":

        def one(name: str, tensors: Mapping[str, Tensor], into: Mapping[str, float]) -> Tensor:
            source = thinned(lambda path, task: tensors[task], options, {name: list(tensors)})
            return ties_of({task: source(name, task) for task in tensors}, steps, into)

        yield from merged_in_factors("trim_scope='factors'", adapters, paths, weights, options.scale, one)
        return
    if tiles.serves(adapters, paths) and not may_cancel(steps.aggregate, weights.values()):
        layers = tiles.layers_of(adapters)
        if options.order == "trim_first":
            layers = tiles.trimmed(layers, tasks, steps_of(options))
        merged = tiles.ties_merge(tiles.thinned(layers, options, tasks), tasks, steps, weights)
    else:
        merged = ties_merge(thinned(dense_updates(adapters), options, tasks), tasks, steps, weights)
    for path, update in merged:
        yield path, Factor.of_matrix(update.mul_(options.scale))


def thinned(source: Source, options: Any, tasks: Mapping[str, Sequence[str]]) -> Source:
    """``source`` with entries dropped, after trimming if the options say so."""
    if options.order == "trim_first":
        source = trimmed(source, tasks, steps_of(options))
    return _dropping(source, options)


def _dropping(source: Source, options: Any) -> Source:
    def one(path: str, task: str) -> Tensor:
        return sparsify(source(path, task), options.drop, options.rescale, options.seed, task, path)

    return one


def steps_after(options: Any) -> Ties:
    """The three steps of TIES that come after :func:`thinned`, which has trimmed already if the options say so."""
    steps = steps_of(options)
    return replace(steps, density=1.0) if options.order == "trim_first" else steps


METHODS = (
    gradient_free(
        "dare",
        "drops entries at random, scales the others up, and adds the tasks",
        "DARE, Yu et al. 2023, arXiv 2311.03099",
        DareOptions,
        dare,
        gives="full rank",
        of_entries=True,
        low_rank_with={"drop_scope": "factors"},
    ),
    gradient_free(
        "dare_ties",
        "drops entries at random, then merges by TIES",
        "DARE, Yu et al. 2023, arXiv 2311.03099, with TIES-Merging, arXiv 2306.01708",
        DareTiesOptions,
        dare_ties,
        averages=averages,
        gives="full rank",
        of_entries=True,
        low_rank_with={"trim_scope": "factors"},
    ),
)
