"""The papers' summary of a table: percent of the fine-tuned model, and their mean over tasks.

As in Section 4.1 of arXiv 2603.26317: a score is divided by the fine-tuned model's, or that one by the score where
lower is better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


def normalised(value: float, reference: float, lower_is_better: bool) -> float:
    """Percent of ``reference``, the fine-tuned model's score; higher is better in both directions.

    NaN where the quotient means nothing: where the fine-tuned score, or the divisor, is 0 or below.
    """
    above, below = (reference, value) if lower_is_better else (value, reference)
    return 100.0 * above / below if reference > 0 and below > 0 else math.nan


def average(percents: Mapping[str, float]) -> float:
    """Mean over tasks, each counting the same; NaN if some task has none."""
    return sum(percents.values()) / len(percents)


@dataclass(frozen=True)
class Scores:
    """Metric of every task in its own unit, and its loss where the metric has one."""

    metrics: dict[str, float]
    losses: dict[str, float]

    def normalised(self, reference: Scores, lower_is_better: Mapping[str, bool]) -> dict[str, float]:
        """Task -> :func:`normalised` by the fine-tuned models' scores."""
        return {
            task: normalised(value, reference.metrics[task], lower_is_better[task])
            for task, value in self.metrics.items()
        }
