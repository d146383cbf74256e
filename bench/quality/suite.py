"""What a quality suite is, and how merges are measured on one.

A suite is a base model, one PEFT adapter per task and the tasks' data. Each lives in a module of :mod:`.suites` with a
function ``load(work, seed, *, log, progress) -> Suite``, which trains what ``work`` does not hold yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from nsc_merge.evaluation import normalise
from nsc_merge.evaluation import suite as evaluation
from nsc_merge.evaluation.normalise import Scores
from nsc_merge.evaluation.scoring import Candidate, predict, score

Log = Callable[[str], None]


@dataclass(frozen=True)
class TaskInfo(evaluation.TaskInfo):
    """One task of a suite.

    Attributes:
        kind: ``"classification"``, ``"regression"``, ``"dense"`` or ``"generation"``.
    """

    kind: str

    @property
    def has_classes(self) -> bool:
        """Whether outputs are logits: a dense task's are if its metric is an intersection over union."""
        return self.kind in ("classification", "generation") or "IoU" in self.metric


class Suite(evaluation.Suite, Protocol):
    """What :class:`nsc_merge.evaluation.suite.Suite` has, and adapters with data to merge them by.

    Everything is fixed by ``name`` and ``seed``. What the other leaves open: logits have their classes in the last
    axis, and a sample's quality is 0 or 1, intersection over union, or the negative error.

    Attributes:
        name: of the suite.
        seed: of what differs between repetitions.
        tasks: name -> description, in the order of every table.
        adapters: task -> folder written by PEFT.
    """

    name: str
    seed: int
    tasks: dict[str, TaskInfo]
    adapters: dict[str, Path]

    def calibration(self, batch: int, steps: int) -> dict[str, list[dict[str, Tensor]]]:
        """Task -> ``steps`` batches of unlabelled validation inputs. Tasks on the same data share the objects."""
        ...

    def loss(self, task: str, output: Tensor, label: Tensor) -> Tensor:
        """The task's training loss, a scalar."""
        ...


class Subset:
    """Some tasks of a suite, as a suite."""

    def __init__(self, suite: Suite, tasks: Sequence[str]) -> None:
        unknown = [task for task in tasks if task not in suite.tasks]
        if unknown or len(tasks) < 2 or len(set(tasks)) < len(tasks):
            raise ValueError(f"tasks: expected two or more different ones of {list(suite.tasks)}, found {list(tasks)}")
        self._suite = suite
        self.name, self.seed, self.model = suite.name, suite.seed, suite.model
        self.tasks = {task: info for task, info in suite.tasks.items() if task in tasks}
        self.adapters = {task: suite.adapters[task] for task in self.tasks}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._suite, name)

    def calibration(self, batch: int, steps: int) -> dict[str, list[dict[str, Tensor]]]:
        batches = self._suite.calibration(batch, steps)
        return {task: batches[task] for task in self.tasks}


def evaluate(suite: Suite, candidate: Candidate, split: str) -> Scores:
    """Metric and loss of every task on ``split``; tasks on the same inputs share a forward."""
    return score(suite, predict(suite, candidate, split, share=True))


def normalised(suite: Suite, scores: Scores, reference: Scores) -> dict[str, float]:
    """Percent of ``reference``, the fine-tuned models, per task; higher is better.

    The quotient comes first, unlike in :mod:`nsc_merge.evaluation.normalise`, so that the reference itself has exactly
    100; and what cannot be divided is an error, which costs a row, where that module has NaN.
    """
    percents = {}
    for task, ours in scores.metrics.items():
        theirs = reference.metrics[task]
        percents[task] = 100 * (theirs / ours if suite.tasks[task].lower_is_better else ours / theirs)
    return percents


def average(suite: Suite, scores: Scores, reference: Scores) -> float:
    """Mean of :func:`normalised` over the tasks."""
    return normalise.average(normalised(suite, scores, reference))
