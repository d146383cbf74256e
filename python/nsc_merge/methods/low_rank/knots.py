"""KnOTS (arXiv 2410.19735): updates aligned by the SVD of all of them next to one another, merged in that basis."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from nsc_merge.adapters import Adapter, Factor
from nsc_merge.methods.gradient_free import gradient_free, present
from nsc_merge.methods.low_rank.common_bases import cores, in_float32, numerical_rank, without_rounding
from nsc_merge.methods.shared_options import weights_of
from nsc_merge.methods.task_vectors import dare, ties
from nsc_merge.methods.task_vectors.dare import DareTiesOptions, steps_after, thinned
from nsc_merge.methods.task_vectors.elementwise import Source, tasks_by_path, ties_merge
from nsc_merge.methods.task_vectors.ties import TiesOptions, averages, steps_of
from nsc_merge.utils.option_checks import check_choice, check_number

ALONG = ("columns", "rows")
VECTORS = ("scaled", "plain")

# (source, tasks by path) -> path and merged tensor.
Combine = Callable[[Source, Mapping[str, Sequence[str]]], Iterator[tuple[str, Tensor]]]


@dataclass(frozen=True)
class KnotsTiesOptions(TiesOptions):
    """Options of ``method="knots_ties"``: those of :class:`nsc_merge.methods.task_vectors.ties.TiesOptions`, and four.

    Attributes:
        preset: as in :class:`nsc_merge.methods.task_vectors.ties.TiesOptions`; ``"knots"`` by default, here its
            published ViT-B/32 settings of KnOTS-TIES; those of LLaMA-3-8B are density 1, scale 0.5.
        scale: multiplies the merged update.
        density: as ``trim_scope`` and all below, of TIES, here on the aligned vectors.
        trim_scope: of TIES: ``"global"`` over all modules, or ``"tensor"``.
        keep: of TIES.
        sign: of TIES. Where votes are equal, which ``"count"`` makes frequent, what wins depends on which way the
            decomposition turns a singular vector, in NSC's code as here.
        zero: of TIES.
        aggregate: of TIES.
        weights: of TIES.
        along: updates stand next to one another and share their output space (``"columns"``), or on top of one
            another and share their input space (``"rows"``; ``concat_across_output`` False in the authors' code).
        vectors: what is merged: right singular vectors times singular values (``"scaled"``, the authors' code), or
            ``"plain"`` ones (the paper's text, and Core Space's code for KnOTS).
        atol: as ``rtol``, of singular values: those at or below ``max(atol, rtol * the largest of the module)`` are
            dropped. The authors' is absolute, so that weak updates lose more.
        rtol: see ``atol``.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **ties.PRESETS,
        "knots": {**ties.PRESETS["knots"], "density": 0.2, "scale": 0.6},
    }

    preset: str = "knots"
    along: str = "columns"
    vectors: str = "scaled"
    atol: float = 1e-5
    rtol: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self)


@dataclass(frozen=True)
class KnotsDareTiesOptions(DareTiesOptions):
    """Options of ``method="knots_dare_ties"``: those of :class:`nsc_merge.methods.task_vectors.dare.DareTiesOptions`,
    and four.

    Attributes:
        preset: as in :class:`nsc_merge.methods.task_vectors.dare.DareTiesOptions`; ``"knots"`` by default, here its
            published ViT-B/32 settings of KnOTS-DARE-TIES, which do not trim; those of LLaMA-3-8B are drop 0.8, scale
            0.4.
        scale: multiplies the merged update.
        drop: of DARE, here on the aligned vectors; as ``rescale``, ``order`` and ``seed``.
        rescale: of DARE.
        order: of DARE.
        density: as ``trim_scope`` and all below, of TIES.
        trim_scope: of TIES.
        keep: of TIES.
        sign: of TIES.
        zero: of TIES.
        aggregate: of TIES.
        weights: of TIES.
        seed: of DARE.
        along: as ``vectors``, ``atol`` and ``rtol``, in :class:`KnotsTiesOptions`.
        vectors: see there.
        atol: see there.
        rtol: see there.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **dare.PRESETS,
        "knots": {**dare.PRESETS["knots"], "drop": 0.1, "scale": 0.7},
    }

    preset: str = "knots"
    along: str = "columns"
    vectors: str = "scaled"
    atol: float = 1e-5
    rtol: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self)


def _check(options: Any) -> None:
    check_choice("trim_scope", options.trim_scope, ("global", "tensor"))
    check_choice("along", options.along, ALONG)
    check_choice("vectors", options.vectors, VECTORS)
    check_number("atol", options.atol, 0)
    check_number("rtol", options.rtol, 0, 1)


@dataclass(frozen=True)
class Aligned:
    """The updates of one module in their common basis: ``s_k B_k A_k = basis @ parts[k]``.

    Attributes:
        basis: ``[d_out, p]``; with plain vectors it holds the singular values.
        parts: task -> ``[p, d_in]``.
    """

    basis: Tensor
    parts: dict[str, Tensor]


def align(factors: Mapping[str, Factor], vectors: str, atol: float, rtol: float) -> Aligned:
    """The SVD of ``[s_1 B_1 A_1, ..., s_K B_K A_K]``, K times as wide as the layer, from cores of the ranks' size."""
    common = cores(factors)
    # Next to one another, U [M_1 V, ..., M_K V]: the rows of V are orthonormal, so the M_k alone have the same
    # singular values and left vectors.
    stacked = torch.cat(list(common.M.values()), 1)
    left, sigma, _ = torch.linalg.svd(stacked, full_matrices=False)
    kept = sigma > max(atol, rtol * float(sigma[:1].sum()))
    # What is rounding is no direction, whatever the bounds: a plain vector of it would be as long as the others.
    kept[numerical_rank(stacked) :] = False
    left, sigma = left[:, kept], sigma[kept]
    # left.T @ M_k is the singular values times the task's block of right vectors.
    blocks = {task: left.t() @ part for task, part in common.M.items()}
    basis = common.U @ left
    if vectors == "plain":
        blocks = {task: block / sigma[:, None] for task, block in blocks.items()}
        basis = basis * sigma
    return Aligned(basis, {task: without_rounding(block @ common.V) for task, block in blocks.items()})


def knots(
    adapters: Mapping[str, Adapter], paths: Sequence[str], options: Any, combine: Combine
) -> Iterator[tuple[str, Factor]]:
    """Path and merged update, of the ranks' sum at most: ``basis @ merged parts``."""
    across = options.along == "rows"

    @functools.lru_cache(maxsize=1)
    def aligned(path: str) -> Aligned:
        factors = present(adapters, path)
        if across:
            factors = {task: _transposed(factor) for task, factor in factors.items()}
        return align(factors, options.vectors, options.atol, options.rtol)

    def source(path: str, task: str) -> Tensor:
        return aligned(path).parts[task]

    kept, dropped = False, ""
    for path, merged in combine(source, tasks_by_path(adapters, paths)):
        factor = Factor(merged, options.scale * aligned(path).basis, 1.0)
        kept = kept or factor.rank > 0
        if not dropped and any(one.scaling and one.A.any() and one.B.any() for one in present(adapters, path).values()):
            dropped = path
        yield path, _transposed(factor) if across else factor
    if dropped and not kept:
        raise ValueError(
            f"atol: no singular value of any module, such as {dropped}, is above {options.atol:g}, so that nothing is "
            "left of the updates; expected a lower atol, or 0 and an rtol, which is relative, of 1e-5"
        )


def _transposed(factor: Factor) -> Factor:
    return replace(factor, A=factor.B.t(), B=factor.A.t())


def knots_ties(
    adapters: Mapping[str, Adapter], paths: Sequence[str], options: KnotsTiesOptions
) -> Iterator[tuple[str, Factor]]:
    """Path and merged update."""
    weights = weights_of(options.weights, list(adapters))

    def combine(source: Source, tasks: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, Tensor]]:
        return ties_merge(source, tasks, steps_of(options), weights)

    return knots(adapters, paths, options, combine)


def knots_dare_ties(
    adapters: Mapping[str, Adapter], paths: Sequence[str], options: KnotsDareTiesOptions
) -> Iterator[tuple[str, Factor]]:
    """Path and merged update."""
    weights = weights_of(options.weights, list(adapters))

    def combine(source: Source, tasks: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, Tensor]]:
        return ties_merge(thinned(source, options, tasks), tasks, steps_after(options), weights)

    return knots(adapters, paths, options, combine)


METHODS = (
    gradient_free(
        "knots_ties",
        "TIES on updates aligned by a joint SVD",
        "KnOTS, Stoica et al. 2024, arXiv 2410.19735",
        KnotsTiesOptions,
        in_float32(knots_ties),
        averages=averages,
    ),
    gradient_free(
        "knots_dare_ties",
        "DARE, then TIES, on updates aligned by a joint SVD",
        "KnOTS, Stoica et al. 2024, arXiv 2410.19735",
        KnotsDareTiesOptions,
        in_float32(knots_dare_ties),
        averages=averages,
    ),
)
