"""EMR-Merging (arXiv 2405.17461): elect, mask and rescale; one update per task, or its unified part alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nsc_merge.adapters import Adapter, Factor
from nsc_merge.attachment import merged_linears
from nsc_merge.methods.arithmetic import NoOptions
from nsc_merge.methods.base import Method, Problem, check_number, empty, gradient_free, low_rank_only
from nsc_merge.methods.elementwise import dense_factor, dense_update, tasks_by_path
from nsc_merge.result import MergeResult


@dataclass(frozen=True)
class UnifiedOptions:
    """Options of ``method="emr_unified"``.

    Attributes:
        scale: multiplies the unified update.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_number("scale", self.scale)


def unify(stack: Tensor) -> tuple[Tensor, Tensor]:
    """The unified update and the signs it was elected with, of ``stack [K, ...]``.

    The sign is that of the mean, negative where the mean is zero; the magnitude is the largest among the tasks that
    agree with it.
    """
    signs = torch.where(stack.mean(0) > 0, 1.0, -1.0)
    return signs * (stack * signs).clamp(min=0).amax(0), signs


def emr_unified(
    adapters: Mapping[str, Adapter], paths: Sequence[str], options: UnifiedOptions
) -> Iterator[tuple[str, Factor]]:
    """Path and unified update."""
    for path, tasks in tasks_by_path(adapters, paths).items():
        stack = torch.stack([dense_update(adapters[task].factors[path]) for task in tasks])
        yield path, dense_factor(options.scale * unify(stack)[0])


def emr(adapters: Mapping[str, Adapter], paths: Sequence[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Path and every task's update: the unified one where its sign agrees with the task's, rescaled.

    The rescaling is one number per task: the sum over modules of the mean magnitude of its own update, divided by that
    of the masked one. Two passes, one module in memory at a time.
    """
    tasks_at = tasks_by_path(adapters, paths)
    own, masked = dict.fromkeys(adapters, 0.0), dict.fromkeys(adapters, 0.0)
    for path, tasks in tasks_at.items():
        for task, update, kept in _masked(adapters, path, tasks):
            own[task] += float(update.abs().mean())
            masked[task] += float(kept.abs().mean())
    factor = {task: own[task] / masked[task] if masked[task] else 0.0 for task in adapters}
    for path, tasks in tasks_at.items():
        yield path, {task: factor[task] * kept for task, _, kept in _masked(adapters, path, tasks)}


def _masked(
    adapters: Mapping[str, Adapter], path: str, tasks: Sequence[str]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    updates = [dense_update(adapters[task].factors[path]) for task in tasks]
    unified, signs = unify(torch.stack(updates))
    for task, update in zip(tasks, updates, strict=True):
        yield task, update, unified * (update * signs > 0)


def _run(problem: Problem, given: Mapping[str, Any]) -> MergeResult:
    linears = merged_linears(problem.model, problem.adapters)
    low_rank = low_rank_only(problem.adapters)
    paths = [path for path in linears if any(path in adapter.factors for adapter in low_rank.values())]
    # Biases and modules trained in full stay the task's own, as its mask would make them.
    own: dict[str, dict[str, Factor]] = {
        task: {path: adapter.factors.get(path, empty(linear)) for path, linear in linears.items()}
        for task, adapter in problem.adapters.items()
    }
    for path, updates in emr(low_rank, paths):
        for task, update in updates.items():
            factor = own[task][path]
            bias = factor.bias_delta()
            own[task][path] = replace(dense_factor(update), bias=bias if bias is None else bias.float())
    return MergeResult("emr", {}, [], problem.adapters, {}, {}, problem.model, per_task=own)


METHODS = (
    Method(
        "emr",
        "a unified update, masked and rescaled for each task: one model per task",
        "EMR-Merging, Huang et al. 2024, arXiv 2405.17461",
        NoOptions,
        _run,
    ),
    gradient_free(
        "emr_unified",
        "the unified update of EMR for all tasks, without masks",
        "EMR-Merging, Huang et al. 2024, arXiv 2405.17461",
        UnifiedOptions,
        emr_unified,
    ),
)
