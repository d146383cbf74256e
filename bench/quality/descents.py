"""The objective of NSC, descended in other ways than NSC does.

AdamW moves every coefficient by about its rate in every step, however small the gradient. Whether it is the objective
that helps or harms, or this, is told by the same objective climbed instead, under plain gradient descent, within a
bound, and with coefficients that modules share.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nsc_merge.adapters import Adapter
from nsc_merge.calibration.batches import Batch, Calibration, streams
from nsc_merge.descent.coefficients import by_path, tasks_where
from nsc_merge.descent.null_space_objective import Objective
from nsc_merge.descent.optimisation import Optimisation
from nsc_merge.methods.gradient.nsc import objective_of
from nsc_merge.methods.gradient.nsc_options import resolve_options
from nsc_merge.models.attachment import adapted_linears, presence
from nsc_merge.models.families import family_of, scored_paths
from nsc_merge.results.result import MergeResult
from nsc_merge.utils.option_checks import check_choice

from .suite import Suite

DESCENTS = ("adamw", "plain", "bounded")


class _Steered:
    """An objective whose gradient is changed before it is followed."""

    def __init__(self, objective: Objective, change: Callable[[Tensor], Tensor]) -> None:
        self._objective, self.coefficients, self._change = objective, objective.coefficients, change

    @property
    def batch_tasks(self) -> bool | None:
        return self._objective.batch_tasks

    @batch_tasks.setter
    def batch_tasks(self, value: bool | None) -> None:
        self._objective.batch_tasks = value

    def accumulate(self, drawn: Sequence[Batch]) -> Tensor:
        omega = self._objective.accumulate(drawn)
        grad = self.coefficients.flat.grad
        assert grad is not None
        grad.copy_(self._change(grad))
        return omega

    def measure(self, drawn: Sequence[Batch]) -> Tensor:
        return self._objective.measure(drawn)

    def remembered(self) -> dict[str, Tensor]:
        return self._objective.remembered()

    def replay(self, drawn: Sequence[Batch]) -> None:
        self._objective.replay(drawn)

    def recall(self, tensors: Mapping[str, Tensor], dead: Tensor) -> None:
        self._objective.recall(tensors, dead)


def descended_nsc(
    suite: Suite,
    adapters: dict[str, Adapter],
    calibration: Calibration,
    *,
    climb: bool = False,
    share: str = "module",
    descent: str = "adamw",
    radius: float = 0.02,
    **options: Any,
) -> MergeResult:
    """NSC with another descent; the history shows the objective itself.

    Args:
        suite: has the model.
        adapters: task -> adapter.
        calibration: task -> batches.
        climb: maximise the objective.
        share: what has one coefficient per task: each ``"module"``, ``"block"``, or a ``"task"`` alone.
        descent: ``"adamw"``, as NSC; ``"plain"``, steps in proportion to the gradient, of which the first moves the
            coefficients by ``lr`` in the root mean square; or ``"bounded"``, steps along the gradient that move them by
            ``lr`` each, while they stay within ``radius`` of their start, both in the root mean square.
        radius: see there.
        options: of ``method="nsc"``.
    """
    check_choice("descent", descent, DESCENTS)
    model, tasks = suite.model, list(adapters)
    family = family_of(model)
    chosen = resolve_options(family, tasks, options)
    paths = list(adapted_linears(model, adapters))
    scored = scored_paths(family, model, paths, chosen.score_modules, chosen.score_blocks)
    present = presence(paths, adapters)
    drawn = list(streams(calibration, tasks).values())
    together = _together(paths, share, family.block)

    def change(grad: Tensor) -> Tensor:
        # Equal gradients keep coefficients equal, under Adam as well.
        grad = together @ grad * present
        return -grad if climb else grad

    with objective_of(model, adapters, family, scored, chosen) as objective:
        steered = _Steered(objective, change)
        dead: dict[str, list[str]] = {}
        if descent == "adamw":
            loop = Optimisation(steered, tasks, present, drawn, chosen, {})
            loop.run(lambda: None)
            history, dead = loop.history, tasks_where(loop.dead & present, paths, tasks)
        else:
            bound = radius if descent == "bounded" else None
            history = _plain(steered, drawn, present, chosen.steps, chosen.lr, bound)
        lam = objective.coefficients.flat.detach().clone()
    said = {"climb": climb, "share": share, "descent": descent, **options, "init": chosen.init}
    return MergeResult("nsc_descended", by_path(lam, paths, tasks), history, adapters, said, dead, model)


def _plain(
    objective: _Steered,
    drawn: Sequence[Iterator[Batch]],
    present: Tensor,
    steps: int,
    lr: float,
    radius: float | None,
) -> list[dict[str, Any]]:
    """Gradient descent, or within ``radius`` along the gradient's direction; see :func:`descended_nsc`."""
    flat = objective.coefficients.flat
    start = flat.detach().clone()
    history = []
    first = 0.0

    def size(values: Tensor) -> float:
        return values[present].square().mean().sqrt().item()

    for step in range(steps):
        flat.grad = torch.zeros_like(flat)
        omega = objective.accumulate([next(stream) for stream in drawn])
        grad = flat.grad
        first = first or size(grad)
        with torch.no_grad():
            flat.sub_(lr / (first if radius is None else size(grad)) * grad)
            if radius is not None:
                away = flat - start
                flat.copy_(start + away * min(1.0, radius / max(size(away), 1e-30)))
        history.append({"step": step, "objective": omega.mean().item()})
    return history


def _together(paths: Sequence[str], share: str, block: str) -> Tensor:
    """``[modules, modules]``: the sum over the modules that share a coefficient."""
    names = {
        "module": list(paths),
        "block": [found.group() if (found := re.search(block, path)) else path for path in paths],
        "task": [""] * len(paths),
    }[share]
    return torch.tensor([[float(one == other) for other in names] for one in names])
