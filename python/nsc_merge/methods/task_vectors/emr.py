"""EMR-Merging (arXiv 2405.17461): elect, mask and rescale; one update per task, or its unified part alone.

In every entry the sign of the mean over tasks is elected, negative where the mean is zero, and the unified update has
the largest magnitude among the tasks of that sign. ``emr`` keeps of it, for task k, the entries whose sign is that of
the task's own update, and multiplies them by one number: the mean magnitude of the task's own update, summed over
modules, divided by that of the entries kept (the authors' code; their script for thirty models, and the paper's
equation, count the entries of all modules alike). ``emr_unified`` is ``scale`` times the unified update.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nsc_kernels import entries
from nsc_merge.adapters import Adapter, Factor
from nsc_merge.methods.gradient_free import empty, gradient_free, low_rank_part, present
from nsc_merge.methods.method import Method, NoOptions, Problem
from nsc_merge.methods.task_vectors import tiles
from nsc_merge.methods.task_vectors.elementwise import added, dense_update
from nsc_merge.results.result import MergeResult
from nsc_merge.utils.option_checks import check_number


@dataclass(frozen=True)
class UnifiedOptions:
    """Options of ``method="emr_unified"``.

    Attributes:
        scale: multiplies the unified update.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_number("scale", self.scale)


class UnifiedUpdates:
    """The unified update of one module at a time, and what it is for a task; shared by the updates of all tasks.

    Whoever goes from module to module, and asks for all tasks in each, has each unified update formed once.

    Args:
        adapters: task -> adapter with low-rank factors only.
    """

    def __init__(self, adapters: Mapping[str, Adapter]) -> None:
        self.adapters = adapters
        self._unified: tuple[str, Tensor] | None = None
        # Whoever merges a module asks for it several times in a row.
        self._last: tuple[tuple[str, str], Tensor] | None = None

    def masked(self, path: str, task: str, scale: float) -> Tensor:
        """``scale`` times the unified update where its sign agrees with the task's, else zero."""
        if self._last is None or self._last[0] != (path, task):
            self._last = None
            self._last = (path, task), self._masked(path, task, scale)
        return self._last[1]

    def _masked(self, path: str, task: str, scale: float) -> Tensor:
        if self._unified is None or self._unified[0] != path:
            self._unified = None
            self._unified = path, unified_update(self.adapters, path)
        unified = self._unified[1]
        own = {task: self.adapters[task]}
        if tiles.serves(own, [path]):
            return entries.masked(tiles.layers_of(own)(path), unified, scale)
        signs = dense_update(own[task].factors[path]).sign() * unified.sign()
        return scale * (unified * (signs > 0))


class Modulated(Mapping[str, Factor]):
    """One task's update of every module: the unified one where its sign agrees with the task's, rescaled.

    Computed when asked for, as the dense updates of all tasks together would be K times the size of the merged layers.

    Args:
        task: of the adapters.
        shared: with the updates of all tasks.
        own: path -> the task's own update; what has no low-rank factors in its adapter stays as it is.
        rescale: see :func:`rescaling`.
    """

    def __init__(self, task: str, shared: UnifiedUpdates, own: Mapping[str, Factor], rescale: float) -> None:
        self.task, self.shared, self.own, self.rescale = task, shared, own, rescale

    def __getitem__(self, path: str) -> Factor:
        if path not in self.shared.adapters[self.task].factors:
            return self.own[path]
        own = self.own[path]
        bias = own.bias_delta()
        gain = None if own.gain is None else own.scaling * own.gain
        update = self.shared.masked(path, self.task, self.rescale)
        return replace(Factor.of_matrix(update), bias=bias if bias is None else bias.float(), gain=gain)

    def __iter__(self) -> Iterator[str]:
        return iter(self.own)

    def __len__(self) -> int:
        return len(self.own)


def dense_updates(adapters: Mapping[str, Adapter], path: str) -> dict[str, Tensor]:
    """Task -> dense update, of the tasks whose adapter touches a module."""
    return {task: dense_update(factor) for task, factor in present(adapters, path).items()}


def unify(updates: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The unified update and the signs it was elected with.

    The sign is that of the mean, negative where the mean is zero; the magnitude is the largest among the updates that
    agree with it.
    """
    signs = torch.where(added(updates) > 0, 1.0, -1.0).float()
    largest = torch.zeros_like(signs)
    for update in updates:
        torch.maximum(largest, update * signs, out=largest)
    return largest.mul_(signs), signs


def unified_update(adapters: Mapping[str, Adapter], path: str) -> Tensor:
    """The unified update of the tasks whose adapter touches a module."""
    if tiles.serves(adapters, [path]):
        return entries.unified(tiles.layers_of(adapters)(path))
    return unify(list(dense_updates(adapters, path).values()))[0]


def emr_unified(
    adapters: Mapping[str, Adapter], paths: Sequence[str], options: UnifiedOptions
) -> Iterator[tuple[str, Factor]]:
    """Path and unified update."""
    for path in paths:
        yield path, Factor.of_matrix(unified_update(adapters, path).mul_(options.scale))


def rescaling(adapters: Mapping[str, Adapter], paths: Sequence[str]) -> dict[str, float]:
    """Task -> the sum over modules of the mean magnitude of its own update, divided by that of the masked one.

    One module in memory at a time; modules that a task does not touch count for neither.
    """
    own, masked = dict.fromkeys(adapters, 0.0), dict.fromkeys(adapters, 0.0)
    for path in paths:
        tasks = list(present(adapters, path))
        if tiles.serves(adapters, [path]):
            one = tiles.layers_of(adapters)(path)
            means = (entries.unified_sums(one) / math.prod(one.shape)).tolist()
        else:
            updates = list(dense_updates(adapters, path).values())
            unified, signs = unify(updates)
            alike = [unified * (update * signs > 0) for update in updates]
            means = [[float(part.abs().mean()) for part in parts] for parts in zip(updates, alike, strict=True)]
        for task, (mean, masked_mean) in zip(tasks, means, strict=True):
            own[task] += mean
            masked[task] += masked_mean
    return {task: own[task] / masked[task] if masked[task] else 0.0 for task in adapters}


def emr(problem: Problem, given: Mapping[str, Any]) -> MergeResult:
    """One update per task. Biases and modules trained in full stay the task's own, which the authors' code approximates
    by mask and factor as it does updates.
    """
    linears, low_rank, paths = low_rank_part(problem)
    rescale, shared = rescaling(low_rank, paths), UnifiedUpdates(low_rank)
    per_task = {
        task: Modulated(
            task,
            shared,
            {path: adapter.factors.get(path, empty(linear)) for path, linear in linears.items()},
            rescale[task],
        )
        for task, adapter in problem.adapters.items()
    }
    return MergeResult("emr", {}, [], problem.adapters, {}, {}, problem.model, per_task=per_task)


METHODS = (
    Method(
        "emr",
        "a unified update, masked and rescaled for each task: one model per task",
        "EMR-Merging, Huang et al. 2024, arXiv 2405.17461",
        NoOptions,
        emr,
        gives="full rank",
        per_task=True,
    ),
    gradient_free(
        "emr_unified",
        "the unified update of EMR for all tasks, without masks",
        "EMR-Merging, Huang et al. 2024, arXiv 2405.17461",
        UnifiedOptions,
        emr_unified,
        averages=True,
        gives="full rank",
        of_entries=True,
    ),
)
