"""Classification tasks as one: every sample is scored against the classes of all tasks together.

The joint-task protocol of KnOTS (arXiv 2410.19735), whose figure is Hits@k: the share of samples whose true class is
among the k highest of the union. Which task a sample comes from is not told to the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HITS = (1, 3, 5)
SCORES = ("logits", "probabilities")


@dataclass(frozen=True)
class Union:
    """The classes of several tasks in one space.

    Attributes:
        columns: task -> place in the union of each of its classes.
        size: classes in the union.
    """

    columns: dict[str, list[int]]
    size: int

    @classmethod
    def of(cls, classes: Mapping[str, int], names: Mapping[str, Sequence[str]] | None = None) -> Union:
        """The union of tasks with so many classes each.

        Args:
            classes: task -> number of classes.
            names: task -> names of its classes; classes of the same name, in any task, are one. Without names every
                class is one of its own.

        Raises:
            ValueError: if the names of a task are not as many as its classes.
        """
        columns: dict[str, list[int]] = {}
        places: dict[str, int] = {}
        size = 0
        for task, count in classes.items():
            given = list(names[task]) if names and task in names else None
            if given is not None and len(given) != count:
                raise ValueError(f"classes.{task}: expected {count} names, found {len(given)}")
            columns[task] = []
            for number in range(count):
                place = places.setdefault(given[number], size) if given is not None else size
                size = max(size, place + 1)
                columns[task].append(place)
        return cls(columns, size)

    def scores(self, outputs: Mapping[str, Tensor], kind: str = "logits") -> Tensor:
        """Scores ``[N, size]`` from every task's logits ``[N, C]``; a class of several tasks gets its highest.

        Args:
            outputs: task -> logits, of the same samples.
            kind: ``"logits"`` as they are, for heads on one scale such as similarities to texts; ``"probabilities"``
                within each task, for heads trained apart.
        """
        first = next(iter(outputs.values()))
        union = first.new_full((len(first), self.size), -torch.inf)
        for task, logits in outputs.items():
            values = logits.softmax(-1) if kind == "probabilities" else logits
            index = torch.tensor(self.columns[task], device=logits.device).expand(len(values), -1)
            union.scatter_reduce_(1, index, values, "amax")
        return union

    def labels(self, task: str, labels: Tensor) -> Tensor:
        """Class indices ``[N]`` of a task as places in the union."""
        return torch.tensor(self.columns[task], device=labels.device)[labels]


def hits(scores: Tensor, labels: Tensor, counts: Sequence[int] = HITS) -> dict[int, float]:
    """Hits@k: the share of samples whose label is among the k highest scores; equal scores rank by index, and a
    label whose score is NaN is among none.

    Args:
        scores: ``[N, C]``.
        labels: ``[N]``, integers.
        counts: values of k.

    Raises:
        ValueError: for other shapes or labels outside of the classes.
    """
    if scores.dim() != 2 or labels.shape != scores.shape[:1] or not len(labels):
        raise ValueError(
            f"scores: expected [N, C] for labels [N], found {list(scores.shape)} and {list(labels.shape)}"
        )
    if bool(((labels < 0) | (labels >= scores.shape[1])).any()):
        raise ValueError(f"labels: expected classes from 0 to {scores.shape[1] - 1}, found others")
    own = scores.gather(1, labels[:, None])
    earlier = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    rank = ((scores > own) | ((scores == own) & earlier)).sum(1)
    known = ~own[:, 0].isnan()
    return {count: (known & (rank < count)).double().mean().item() for count in counts}
