"""How sure a figure is over the test samples, by the jackknife: what it is without each of some groups of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nsc_merge.evaluation.metrics import IGNORE
from nsc_merge.evaluation.suite import RecipeSuite

GROUPS = 20


def without_each(suite: RecipeSuite, task: str, outputs: Any, labels: Tensor) -> list[float]:
    """The task's metric without each of :data:`GROUPS` groups of samples; empty for fewer samples than groups, and
    where some rest has no figure.

    Samples are dealt to the groups in turn, so that each has some of everything in sorted data, and the same ones for
    every model and every task on the same inputs: figures can be subtracted and averaged group by group.

    Args:
        suite: with the task.
        task: its name.
        outputs: of all samples.
        labels: of all samples.
    """
    if len(labels) < GROUPS:
        return []
    dealt = torch.arange(len(labels), device="cpu") % GROUPS
    found: list[float] = []
    if (of_samples := suite.metric(task).of_samples) is not None:
        quality = suite.quality(task, outputs, labels).double()
        counts = (labels != IGNORE).reshape(len(labels), -1).sum(1).double()
        found = [of_samples(quality[dealt != number], counts[dealt != number]) for number in range(GROUPS)]
        return found if all(map(math.isfinite, found)) else []
    for number in range(GROUPS):
        gone = dealt == number
        try:
            if suite.metric(task).writes:
                found.append(suite.measure(task, outputs[~gone], labels[~gone]))
            else:
                # Outputs may be large: a sample without a known label does not count, and nothing is copied.
                rest = labels.clone()
                rest[gone] = torch.nan if labels.is_floating_point() else IGNORE
                found.append(suite.measure(task, outputs, rest))
        except ValueError:
            return []
    return found if all(map(math.isfinite, found)) else []


def standard_error(values: Sequence[float]) -> float | None:
    """Of a figure, by what it is without each group; None without such."""
    if not values:
        return None
    mean = statistics.fmean(values)
    return math.sqrt((len(values) - 1) / len(values) * sum((value - mean) ** 2 for value in values))
