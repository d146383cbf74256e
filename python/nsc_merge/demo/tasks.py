"""The six tasks of the demo: what each predicts, how it is trained and how it is measured.

Four dense tasks share the ``photo`` scenes, as the NYUD-v2 tasks of the paper share their images; a
classification and a scalar regression live on the ``shaded`` scenes, so that the mix is heterogeneous in kind
and in data. Six is few enough that the paper's starting coefficient of 0.4 lies near the scale that labels
would choose (0.3). The set was fixed before any merge on it was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from nsc_merge.demo.data import Scene
from nsc_merge.evaluation import metrics, normalise


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: key in :attr:`SceneSet.labels` and name of the adapter.
        scene: kind of scene it lives on.
        dense: whether it predicts a map (per pixel) or one vector per image.
        channels: outputs per pixel or per image.
        metric: short name of the metric: deg is the mean angular error in degrees, acc the accuracy.
        lower_is_better: direction of the metric.
    """

    name: str
    scene: Scene
    dense: bool
    channels: int
    metric: str
    lower_is_better: bool

    @property
    def classes(self) -> bool:
        """Whether it predicts classes, rather than values."""
        return self.metric in ("mIoU", "acc")


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("depth", "photo", dense=True, channels=1, metric="RMSE", lower_is_better=True),
        Task("normal", "photo", dense=True, channels=3, metric="deg", lower_is_better=True),
        Task("edge", "photo", dense=True, channels=1, metric="L1", lower_is_better=True),
        Task("semseg", "photo", dense=True, channels=3, metric="mIoU", lower_is_better=False),
        Task("count", "shaded", dense=False, channels=4, metric="acc", lower_is_better=False),
        Task("angle", "shaded", dense=False, channels=1, metric="deg", lower_is_better=True),
    )
}

_DEGREES_PER_UNIT = 45.0


def loss(task: Task, output: Tensor, label: Tensor) -> Tensor:
    """Training loss of ``task``, a scalar.

    Args:
        output: ``[N, C, 24, 24]`` for a dense task, ``[N, C]`` otherwise.
        label: as in :attr:`SceneSet.labels`.
    """
    if task.name == "depth":
        return F.mse_loss(output[:, 0], label)
    if task.name == "normal":
        return (1 - metrics.cosine(output, label, dim=1)).mean()
    if task.name == "edge":
        return F.l1_loss(output[:, 0], label)
    if task.name == "angle":
        return F.smooth_l1_loss(output[:, 0], label, beta=0.2)
    return F.cross_entropy(output, label)


def measure(task: Task, output: Tensor, label: Tensor) -> float:
    """Metric of ``task`` over a whole set, in the unit of ``task.metric``; shapes as in :func:`loss`."""
    if task.name == "normal":
        return metrics.mean_angle(output.movedim(1, -1), label.movedim(1, -1))
    if task.name == "depth":
        return metrics.rmse(output[:, 0], label)
    if task.name == "edge":
        return metrics.l1(output[:, 0], label)
    if task.name == "angle":
        return _DEGREES_PER_UNIT * metrics.l1(output[:, 0], label)
    found = metrics.accuracy if task.metric == "acc" else metrics.mean_iou
    return found(output.movedim(1, -1), label)


def normalised(task: Task, value: float, reference: float) -> float:
    """Percent of the task's own fine-tuned model, as the paper reports it; higher is better."""
    return normalise.normalised(value, reference, task.lower_is_better)
