"""Rows that no merge method is: what shows whether a method's gains come from where it says they do.

Those in :data:`CONTROLS` take a suite, its adapters as fitted to the model, and calibration batches. All return a
:class:`nsc_merge.MergeResult` as a method would. :mod:`.descents` has the rest of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import nsc_merge
from nsc_merge.adapters import Adapter
from nsc_merge.calibration.batches import Calibration
from nsc_merge.descent.coefficients import Coefficients, by_path
from nsc_merge.evaluation.normalise import Scores
from nsc_merge.models.attachment import attach
from nsc_merge.models.forward_contexts import shared_forward
from nsc_merge.results.result import MergeResult
from nsc_merge.utils.progress import Progress

from .descents import descended_nsc
from .suite import Suite, evaluate


def shuffled(found: MergeResult, shuffle: int, seed: int) -> MergeResult:
    """A learnt merge with its changes of the coefficients permuted at random over modules and tasks."""
    start = found.options["init"]
    lam = torch.tensor([list(row.values()) for row in found.coefficients.values()], dtype=torch.float64)
    generator = torch.Generator().manual_seed(1000 * seed + shuffle)
    moved = (lam - start).flatten()[torch.randperm(lam.numel(), generator=generator)].view_as(lam)
    return replace(
        found,
        method="shuffled_nsc",
        coefficients=by_path(start + moved, list(found.coefficients), found.tasks),
        history=[],
    )


def oracle(
    suite: Suite,
    adapters: dict[str, Adapter],
    calibration: Calibration,
    *,
    lr: float = 1e-2,
    steps: int = 200,
    init: float = 0.4,
    batch: int = 32,
    weight_decay: float = 0.01,
    progress: bool | None = None,
) -> MergeResult:
    """The same coefficients learnt from validation labels: the mean over the tasks of loss / fine-tuned loss.

    What any choice of these coefficients can reach at most, roughly. ``calibration`` is not looked at.
    """
    reference = finetuned_scores(suite, adapters, "val")
    model, tasks = suite.model, list(adapters)
    data = {task: suite.labelled(task, "val") for task in tasks}
    generator = torch.Generator().manual_seed(suite.seed)
    history: list[dict[str, Any]] = []
    with attach(model, adapters, init) as attached, Progress("labelled oracle", steps, progress) as bar:
        coefficients = Coefficients(attached)
        optimiser = torch.optim.AdamW([coefficients.flat], lr=lr, weight_decay=weight_decay)
        for step in range(steps):
            coefficients.spread()
            drawn = _subsample({task: pairs[step % len(pairs)] for task, pairs in data.items()}, batch, generator)
            with shared_forward(model):
                losses = [
                    suite.loss(task, suite.output(task, model, inputs), label) / reference.losses[task]
                    for task, (inputs, label) in drawn.items()
                ]
            objective = torch.stack(losses).mean()
            optimiser.zero_grad()
            objective.backward()
            optimiser.step()
            history.append({"step": step, "objective": objective.item()})
            bar.update(loss=f"{history[-1]['objective']:.4f}")
        lam = coefficients.flat.detach().clone()
        paths = list(attached)
    options = {"lr": lr, "steps": steps, "init": init, "batch": batch, "weight_decay": weight_decay}
    return MergeResult("oracle", by_path(lam, paths, tasks), history, adapters, options, {}, model)


CONTROLS: dict[str, Callable[..., MergeResult]] = {
    "anti_nsc": partial(descended_nsc, climb=True),
    "nsc_descended": descended_nsc,
    "oracle": oracle,
}


def finetuned_scores(suite: Suite, adapters: dict[str, Adapter], split: str) -> Scores:
    """Every task with its own adapter alone, which scores are normalised by."""
    return evaluate(suite, nsc_merge.merge(suite.model, adapters, method="finetuned"), split)


def _subsample(
    drawn: Mapping[str, tuple[dict[str, Tensor], Tensor]], size: int, generator: torch.Generator
) -> dict[str, tuple[dict[str, Tensor], Tensor]]:
    """``size`` rows of every batch; tasks that share their inputs as objects still do."""
    known: dict[int, tuple[dict[str, Tensor], Tensor]] = {}
    smaller = {}
    for task, (inputs, label) in drawn.items():
        if id(inputs) not in known:
            rows = torch.randperm(len(label), generator=generator)[:size]
            known[id(inputs)] = {name: value[rows] for name, value in inputs.items()}, rows
        some, rows = known[id(inputs)]
        smaller[task] = some, label[rows]
    return smaller
