"""Model Breadcrumbs (arXiv 2312.06795) and DELLA (arXiv 2406.11617): entries left out by their magnitude, at both ends
or by chance; what is left is added up, or merged by the election of TIES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nsc_merge.adapters import Adapter, Factor
from nsc_merge.methods.gradient_free import gradient_free
from nsc_merge.methods.method import Averages
from nsc_merge.methods.shared_options import check_weights, weights_of
from nsc_merge.methods.task_vectors.draws import key_of
from nsc_merge.methods.task_vectors.elementwise import (
    AGGREGATES,
    Ties,
    dense_update,
    tasks_by_path,
    ties_of,
    with_sum_of,
)
from nsc_merge.methods.task_vectors.ties import averages
from nsc_merge.utils.option_checks import check_choice, check_count, check_number

# How many entries are worked on at once, so that all that is computed of them stays in a core's cache.
_BLOCK = 1 << 18
# (update, task, path): sets what is left out of the update to zero, in place.
Mask = Callable[[Tensor, str, str], None]


@dataclass(frozen=True)
class BreadcrumbsOptions:
    """Options of ``method="breadcrumbs"``.

    Attributes:
        scale: multiplies the merged update.
        density: share of a task's entries in a module that stays; the paper's, which leaves out the smallest 85 %.
        outliers: share of the entries that goes at the upper end, the largest; mergekit's ``gamma``. Where ``density``
            leaves less than that out, all that it leaves out.
        rescale: of what is left: ``"none"`` (the paper's), or ``"l1"`` so that the sum of magnitudes is the update's.
        elect: elect a sign in every position and leave out what disagrees, as TIES does (mergekit's
            ``breadcrumbs_ties``).
        aggregate: of what is elected; see :class:`nsc_merge.methods.task_vectors.ties.TiesOptions`.
        weights: task -> weight of its update, 1 each when None.
    """

    scale: float = 1.0
    density: float = 0.143
    outliers: float = 0.007
    rescale: str = "none"
    elect: bool = False
    aggregate: str = "sum"
    weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        _check(self, ("none", "l1"))
        check_number("outliers", self.outliers, 0, 1)


@dataclass(frozen=True)
class DellaOptions:
    """Options of ``method="della"``.

    Attributes:
        scale: multiplies the merged update.
        density: the mean probability with which an entry stays.
        epsilon: the probability of the largest entry of a row is ``density + epsilon``, that of the smallest
            ``density - epsilon``, and between them it grows with the rank (mergekit's; the paper's is twice that).
        rescale: of what is left: ``"inverse"`` by one over its probability, so that the expectation is the update
            itself (the paper's); ``"l1"`` so that the sum of magnitudes is (mergekit); or ``"none"``.
        elect: elect a sign in every position and leave out what disagrees, as TIES does; False adds all up (mergekit's
            ``della_linear``).
        aggregate: of what is elected; see :class:`nsc_merge.methods.task_vectors.ties.TiesOptions`. The authors and
            mergekit divide by the weights.
        weights: task -> weight of its update, 1 each when None.
        seed: each task and module draws from a generator of its own, made from this, its name and its path.
    """

    scale: float = 1.0
    density: float = 0.5
    epsilon: float = 0.15
    rescale: str = "inverse"
    elect: bool = True
    aggregate: str = "weight"
    weights: Mapping[str, float] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self, ("inverse", "l1", "none"))
        check_number("epsilon", self.epsilon, 0, 1)
        check_count("seed", self.seed, 0)
        if self.density < 1 and not self.epsilon < min(self.density, 1 - self.density):
            raise ValueError(
                f"epsilon: expected density - epsilon and density + epsilon between 0 and 1, found density "
                f"{self.density:g} and epsilon {self.epsilon:g}"
            )


def _check(options: Any, rescales: Sequence[str]) -> None:
    check_number("scale", options.scale)
    check_number("density", options.density, 0, 1, above=True)
    check_choice("rescale", options.rescale, rescales)
    check_choice("elect", options.elect, (True, False))
    check_choice("aggregate", options.aggregate, AGGREGATES)
    check_weights(options.weights)


def between(update: Tensor, density: float, outliers: float) -> Tensor:
    """Which entries of a float32 matrix stay, as bool, once the smallest and the share ``outliers`` of the largest are
    gone; of equal ones the first count as smaller.
    """
    entries = update.numel()
    kept = int(density * entries)
    above = min(int(outliers * entries), entries - kept)
    stays = torch.zeros(entries, dtype=torch.bool, device=update.device)
    if kept:
        first, last = entries - above - kept, entries - above - 1
        blocks = update.reshape(-1).split(_BLOCK)
        counts = torch.zeros(1 << 15, dtype=torch.int64, device=update.device)
        for block in blocks:
            counts += torch.bincount(_upper(block), minlength=len(counts))
        up_to = counts.cumsum(0)
        low, high = torch.searchsorted(up_to, up_to.new_tensor([first, last]), right=True).tolist()
        for block, out in zip(blocks, stays.split(_BLOCK), strict=True):
            upper = _upper(block)
            torch.logical_and(upper > low, upper < high, out=out)
        # Of the entries that share an upper half with the first or the last that stays, their order decides.
        for half in {low, high}:
            ordered = _in_order(blocks, half)
            before = int(up_to[half]) - len(ordered)
            stays[ordered[max(first - before, 0) : last + 1 - before]] = True
    return stays.view(update.shape)


def _upper(block: Tensor) -> Tensor:
    """The upper halves of the magnitudes' bit patterns, which are ordered as non-negative floats are."""
    return block.abs().view(torch.int32) >> 16


def _in_order(blocks: Sequence[Tensor], half: int) -> Tensor:
    """The places of the entries with this upper half, the smallest entry first; of equal ones the first."""
    places = [(_upper(block) == half).nonzero()[:, 0] for block in blocks]
    found = torch.cat([block[here].abs() for block, here in zip(blocks, places, strict=True)])
    return torch.cat([_BLOCK * k + here for k, here in enumerate(places)])[found.sort(stable=True).indices]


def probabilities(update: Tensor, density: float, epsilon: float) -> Tensor:
    """The probability of each entry of ``[rows, n]`` to stay: that of its rank by magnitude in its row."""
    n = update.shape[1]
    ends = (-1, 1) if n > 1 else (0, 0)
    steps = torch.linspace(*ends, n, dtype=torch.float64, device="cpu")
    by_rank = density + epsilon * steps
    return torch.empty_like(update).scatter_(1, _by_magnitude(update), by_rank.to(update).expand_as(update))


def _by_magnitude(update: Tensor) -> Tensor:
    """The columns of each row of a float32 matrix, the smallest entry first; of equal ones the first."""
    columns = torch.arange(update.shape[1], device=update.device)
    # Non-negative floats are ordered as their bit patterns are. NumPy sorts them eight times as fast as PyTorch.
    keys = update.abs().contiguous().view(torch.int32).long() << 32 | columns
    return torch.from_numpy(np.sort(keys.cpu().numpy(), axis=1)).to(update.device) & 0xFFFFFFFF


def breadcrumbs(
    adapters: Mapping[str, Adapter], paths: Sequence[str], options: BreadcrumbsOptions
) -> Iterator[tuple[str, Factor]]:
    """Path and merged update, dense."""

    def mask(update: Tensor, task: str, path: str) -> None:
        stays = between(update, options.density, options.outliers)
        for rows, here in zip(_in_rows(update), _in_rows(stays), strict=True):
            rows *= here

    return _merged(adapters, paths, options, mask)


def della(
    adapters: Mapping[str, Adapter], paths: Sequence[str], options: DellaOptions
) -> Iterator[tuple[str, Factor]]:
    """Path and merged update, dense."""

    def mask(update: Tensor, task: str, path: str) -> None:
        generator = torch.Generator().manual_seed(key_of(options.seed, task, path))
        for rows in _in_rows(update):
            likely = probabilities(rows, options.density, options.epsilon)
            drawn = torch.rand(rows.shape, generator=generator, dtype=torch.float32, device="cpu").to(update.device)
            rows.masked_fill_(drawn >= likely, 0.0)
            if options.rescale == "inverse":
                rows /= likely

    return _merged(adapters, paths, options, mask)


def _in_rows(matrix: Tensor) -> Sequence[Tensor]:
    """Views of some rows each, :data:`_BLOCK` entries in all."""
    return matrix.split(max(1, _BLOCK // max(1, matrix.shape[1])))


def _merged(
    adapters: Mapping[str, Adapter], paths: Sequence[str], options: Any, mask: Mask
) -> Iterator[tuple[str, Factor]]:
    weights = weights_of(options.weights, list(adapters))
    # Trims nothing, and elects as mergekit does.
    steps = Ties(1.0, "tensor", "floor", "weighted", "positive", options.aggregate)

    def kept(path: str, task: str) -> Tensor:
        update = dense_update(adapters[task].factors[path])
        if options.density >= 1:
            return update
        whole = update.clone() if options.rescale == "l1" else update
        mask(update, task, path)
        return with_sum_of(whole, update) if options.rescale == "l1" else update

    for path, row in tasks_by_path(adapters, paths).items():
        if options.elect:
            blocks = zip(*(_in_rows(kept(path, task)) for task in row), strict=True)
            merged = torch.cat([ties_of(dict(zip(row, block, strict=True)), steps, weights) for block in blocks])
        else:
            merged = kept(path, row[0]).mul_(weights[row[0]])
            for task in row[1:]:
                merged += kept(path, task).mul_(weights[task])
        yield path, Factor.of_matrix(merged.mul_(options.scale))


def _averages(options: Any) -> Averages:
    return averages(options) if options.elect else False


METHODS = (
    gradient_free(
        "breadcrumbs",
        "leaves out each task's smallest entries and its few largest, and adds the tasks",
        "Model Breadcrumbs, Davari and Belilovsky 2023, arXiv 2312.06795",
        BreadcrumbsOptions,
        breadcrumbs,
        averages=_averages,
        gives="full rank",
        of_entries=True,
    ),
    gradient_free(
        "della",
        "drops entries at random, small ones sooner, and averages those that agree in sign",
        "DELLA-Merging, Deep et al. 2024, arXiv 2406.11617",
        DellaOptions,
        della,
        averages=_averages,
        gives="full rank",
        of_entries=True,
    ),
)
