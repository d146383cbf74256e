"""What a quality suite is, and how merged models are measured on one.

A suite is a base model, one PEFT adapter per task and the tasks' data. Each lives in a module of its own with a
function ``load(work, seed, *, log, progress) -> Suite``, which trains what ``work`` does not hold yet.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nsc_merge.forwards import shared_forward
from nsc_merge.result import MergeResult

Log = Callable[[str], None]
Inputs = Mapping[str, Tensor]
Models = nn.Module | Mapping[str, nn.Module]


@dataclass(frozen=True)
class TaskInfo:
    """One task of a suite.

    Attributes:
        name: of the task and its adapter.
        metric: short name of what :meth:`Suite.measure` returns, with its unit.
        lower_is_better: direction of the metric.
        kind: ``"classification"``, ``"regression"``, ``"dense"`` or ``"generation"``.
    """

    name: str
    metric: str
    lower_is_better: bool
    kind: str

    @property
    def has_classes(self) -> bool:
        """Whether outputs are logits: a dense task's are if its metric is an intersection over union."""
        return self.kind in ("classification", "generation") or "IoU" in self.metric


class Suite(Protocol):
    """Base model, adapters and data; everything is fixed by ``name`` and ``seed``.

    Attributes:
        name: of the suite.
        seed: of what differs between repetitions.
        tasks: name -> description, in the order of every table.
        model: the base, a transformers model in float32 and evaluation mode.
        adapters: task -> folder written by PEFT.
    """

    name: str
    seed: int
    tasks: dict[str, TaskInfo]
    model: nn.Module
    adapters: dict[str, Path]

    def calibration(self, batch: int, steps: int) -> dict[str, list[dict[str, Tensor]]]:
        """Task -> ``steps`` batches of unlabelled validation inputs. Tasks on the same data share the objects."""
        ...

    def labelled(self, task: str, split: str) -> list[tuple[dict[str, Tensor], Tensor]]:
        """All of ``"val"`` or ``"test"`` as batches of model inputs and labels."""
        ...

    def output(self, task: str, model: nn.Module, batch: Inputs) -> Tensor:
        """What the task's head makes of the model's features; logits have their classes in the last axis."""
        ...

    def loss(self, task: str, output: Tensor, label: Tensor) -> Tensor:
        """The task's training loss, a scalar."""
        ...

    def measure(self, task: str, outputs: Tensor, labels: Tensor) -> float:
        """The task's metric over a whole split."""
        ...

    def quality(self, task: str, outputs: Tensor, labels: Tensor) -> Tensor:
        """Per sample, higher is better: 0 or 1, intersection over union, or the negative error."""
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


@dataclass(frozen=True)
class Scores:
    """Metric of every task in its own unit, and loss of every task."""

    metrics: dict[str, float]
    losses: dict[str, float]

    def normalised(self, suite: Suite, reference: Scores) -> dict[str, float]:
        """Percent of ``reference``, the fine-tuned models, per task; higher is better."""
        percents = {}
        for task, value in self.metrics.items():
            ours, theirs = value, reference.metrics[task]
            percents[task] = 100 * (theirs / ours if suite.tasks[task].lower_is_better else ours / theirs)
        return percents

    def average(self, suite: Suite, reference: Scores) -> float:
        """Mean of :meth:`normalised` over the tasks."""
        percents = self.normalised(suite, reference)
        return sum(percents.values()) / len(percents)

    def relative_loss(self, reference: Scores) -> float:
        """Mean over the tasks of loss divided by the fine-tuned model's loss."""
        return sum(self.losses[task] / reference.losses[task] for task in self.losses) / len(self.losses)


@torch.inference_mode()
def predict(suite: Suite, models: Models, split: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Task -> outputs and labels over a whole split. Tasks on the same inputs share a forward of a shared model."""
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {task: [] for task in suite.tasks}
    batches = {task: suite.labelled(task, split) for task in suite.tasks}
    for number in range(max(map(len, batches.values()))):
        shared = ExitStack()
        with shared:
            for model in {id(model): model for model in _per_task(suite, models).values()}.values():
                shared.enter_context(shared_forward(model))
            for task, model in _per_task(suite, models).items():
                if number < len(batches[task]):
                    inputs, label = batches[task][number]
                    parts[task].append((suite.output(task, model, inputs), label))
    return {
        task: (torch.cat([output for output, _ in pairs]), torch.cat([label for _, label in pairs]))
        for task, pairs in parts.items()
    }


def score(suite: Suite, predicted: Mapping[str, tuple[Tensor, Tensor]]) -> Scores:
    """Metric and loss of what :func:`predict` returned."""
    return Scores(
        {task: suite.measure(task, *pair) for task, pair in predicted.items()},
        {task: float(suite.loss(task, *pair)) for task, pair in predicted.items()},
    )


def evaluate(suite: Suite, models: Models, split: str) -> Scores:
    """Metric and loss of every task on ``split``, of one model or of one model per task."""
    return score(suite, predict(suite, models, split))


def merged(suite: Suite, result: MergeResult) -> Models:
    """The base with the merged update, or one model per task where every task has an update of its own."""
    if not result.per_task:
        return result.apply(copy.deepcopy(suite.model)).eval()
    return {task: result.for_task(task).apply(copy.deepcopy(suite.model)).eval() for task in suite.tasks}


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the name ``folder`` once everything is there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    unfinished.mkdir()
    try:
        yield unfinished
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def train_missing(
    work: Path,
    suite: str,
    seed: int,
    tasks: Sequence[str],
    permuted: Iterable[str],
    train_one: Callable[[Path, str, bool], str],
    log: Log,
) -> Path:
    """Train what ``work`` does not hold yet of a suite's seed, each task from a state of torch's generator of its own.

    Args:
        work: folder for trained parts.
        suite: its name.
        seed: of what differs between repetitions.
        tasks: all of the suite.
        permuted: tasks to train once more, with their labels in a wrong order.
        train_one: trains into a folder the task of that name, with permuted labels if so told; returns a line.
        log: receives the lines.

    Returns:
        The seed's folder.
    """
    folder = work / suite / f"seed{seed}"
    for kind, names in (("adapters", tasks), ("permuted", permuted)):
        for name in names:
            if not (folder / kind / name).is_dir():
                torch.manual_seed(1000 * seed + tasks.index(name))
                with building(folder / kind / name) as part:
                    line = train_one(part, name, kind == "permuted")
                log(f"{suite} seed {seed} {kind}: {line}")
    return folder


def _per_task(suite: Suite, models: Models) -> Mapping[str, nn.Module]:
    return models if isinstance(models, Mapping) else dict.fromkeys(suite.tasks, models)
