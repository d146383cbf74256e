"""Calibration batches: drawn for every task, and put together into forward passes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Batch = Mapping[str, Tensor]
Calibration = Mapping[str, Iterable[Batch]]


@dataclass(frozen=True)
class Pass:
    """One forward.

    Attributes:
        inputs: of the model.
        sources: the batches it was made of; kept so that their identity stays theirs.
        tasks: per source, the numbers of the tasks that it belongs to.
        sizes: per source, its rows; None where the inputs were not concatenated and need not have rows.
    """

    inputs: dict[str, Any]
    sources: tuple[Batch, ...]
    tasks: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...] | None = None

    @property
    def key(self) -> tuple[int, ...]:
        """Identity of the batches: equal for passes over the same objects."""
        return tuple(id(batch) for batch in self.sources)


def streams(calibration: Calibration | None, tasks: Sequence[str]) -> dict[str, Iterator[Batch]]:
    """Per task, its batches in order, again and again.

    Raises:
        ValueError: if ``calibration`` is not a mapping with exactly these tasks; on drawing, if a task has no
            batch or one that is not a mapping.
    """
    if not isinstance(calibration, Mapping) or set(calibration) != set(tasks):
        found = sorted(calibration) if isinstance(calibration, Mapping) else type(calibration).__name__
        raise ValueError(f"calibration: expected batches for each of {list(tasks)}, found {found}")
    return {task: _endless(task, calibration[task]) for task in tasks}


def one_by_one(drawn: Sequence[Batch], device: torch.device) -> list[Pass]:
    """One pass per batch of ``drawn``, which holds one for each task.

    Tasks that drew the same object, not merely equal values, share a pass.
    """
    shared: dict[int, tuple[Batch, list[int]]] = {}
    for number, batch in enumerate(drawn):
        shared.setdefault(id(batch), (batch, []))[1].append(number)
    return [
        Pass(_on_device(batch, device), (batch,), (tuple(numbers),)) for batch, numbers in shared.values()
    ]


def concatenated(passes: Sequence[Pass]) -> list[Pass]:
    """As few passes as shapes allow: those that agree in everything but their number of rows become one."""
    groups: list[list[Pass]] = []
    for single in passes:
        fitting = (group for group in groups if _stackable(group[0].inputs, single.inputs))
        group = next(fitting, None)
        if group is None:
            groups.append([single])
        else:
            group.append(single)
    return [_concatenate(group) if len(group) > 1 else group[0] for group in groups]


def _concatenate(group: Sequence[Pass]) -> Pass:
    inputs = {
        name: torch.cat([single.inputs[name] for single in group]) if isinstance(value, Tensor) else value
        for name, value in group[0].inputs.items()
    }
    return Pass(
        inputs,
        tuple(single.sources[0] for single in group),
        tuple(single.tasks[0] for single in group),
        tuple(_rows(single.inputs) or 0 for single in group),
    )


def _stackable(first: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    if first.keys() != other.keys() or _rows(first) is None or _rows(other) is None:
        return False
    for name, value in first.items():
        match = other[name]
        if isinstance(value, Tensor) != isinstance(match, Tensor):
            return False
        if isinstance(value, Tensor):
            if value.dtype is not match.dtype or value.shape[1:] != match.shape[1:]:
                return False
        elif value is not match and (type(value) is not type(match) or value != match):
            return False
    return True


def _rows(inputs: Mapping[str, Any]) -> int | None:
    """The one length of the first dimension of all tensors, None if there is no such length."""
    lengths = {
        value.shape[0] if value.dim() else None for value in inputs.values() if isinstance(value, Tensor)
    }
    return lengths.pop() if len(lengths) == 1 else None


def _on_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _endless(task: str, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches in order, again and again; an iterator, which cannot be restarted, is remembered."""
    once = isinstance(batches, Iterator)
    seen: list[Batch] = []
    while True:
        empty = True
        for batch in seen if once and seen else batches:
            if not isinstance(batch, Mapping) or not batch:
                raise ValueError(
                    f"calibration[{task!r}]: expected dictionaries of model inputs, "
                    f"found {type(batch).__name__}"
                )
            empty = False
            if once:
                seen.append(batch)
            yield batch
        if empty:
            raise ValueError(f"calibration[{task!r}]: expected at least one batch, found none")
