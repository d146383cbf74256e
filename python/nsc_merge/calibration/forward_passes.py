"""Calibration batches: drawn for every task, and put together into forward passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from nsc_merge.calibration.batches import Batch

# Padding may add this share of the tokens that are there: it costs as much as they do, and saves what a pass costs
# whatever its size. Measured on a CPU (d = 512, 13 % added): batches of about 50 tokens take 0.80 of the time of passes
# of their own, batches of about 230 tokens 1.07.
SPARE, FEW = 0.25, 128


@dataclass(frozen=True)
class Padding:
    """How batches of unequal lengths are made alike: at their end, where no real token of a causal model looks.

    Attributes:
        tokens: name of the input ``[rows, tokens]`` of token numbers.
        mask: name of the input of the same shape that is 0 at padding.
        filler: token number to pad with.
        most: batches of more tokens are left as they are; None pads batches of any size.
    """

    tokens: str
    mask: str
    filler: int = 0
    most: int | None = None

    def width(self, inputs: Mapping[str, Any]) -> int:
        """How many tokens the rows have; 0 for inputs that it does not apply to."""
        ids, mask = inputs.get(self.tokens), inputs.get(self.mask)
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            return 0
        fits = mask is None or (isinstance(mask, Tensor) and mask.shape == ids.shape)
        fits = fits and (self.most is None or ids.numel() <= self.most)
        return ids.shape[1] if fits else 0

    def kind(self, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
        """What has to agree besides all other inputs."""
        ids = inputs[self.tokens]
        return ids.dtype, inputs.get(self.mask, ids).dtype

    def others(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in inputs.items() if name not in (self.tokens, self.mask)}

    def to(self, inputs: Mapping[str, Any], width: int) -> dict[str, Any]:
        """``inputs`` with rows of ``width`` tokens and a mask that says which of them were there."""
        ids = inputs[self.tokens]
        mask = inputs.get(self.mask)
        added = (0, width - ids.shape[1])
        return {
            **inputs,
            self.tokens: pad(ids, added, value=self.filler),
            self.mask: pad(torch.ones_like(ids) if mask is None else mask, added),
        }


@dataclass(frozen=True)
class Pass:
    """One forward.

    Attributes:
        inputs: of the model.
        sources: the batches it was made of; kept so that their identity stays theirs.
        tasks: per source, the numbers of the tasks that it belongs to.
        sizes: per source, its rows; None where the inputs were not concatenated and need not have rows.
        inside: ``[rows, tokens]`` bool, False where concatenating added padding; None where it added none.
    """

    inputs: dict[str, Any]
    sources: tuple[Batch, ...]
    tasks: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...] | None = None
    inside: Tensor | None = None

    @property
    def key(self) -> tuple[int, ...]:
        """Identity of the batches: equal for passes over the same objects."""
        return tuple(id(batch) for batch in self.sources)

    @property
    def elements(self) -> int:
        """How many numbers the inputs hold."""
        return sum(value.numel() for value in self.inputs.values() if isinstance(value, Tensor))


def one_by_one(
    drawn: Sequence[Batch],
    device: torch.device,
    restrict: Callable[[Batch], Mapping[str, Any]] | None = None,
) -> list[Pass]:
    """One pass per batch of ``drawn``, which holds one for each task.

    Tasks that drew the same object, not merely equal values, share a pass.

    Args:
        restrict: makes the model's inputs from a batch; they are the batch itself when None.
    """
    shared: dict[int, tuple[Batch, list[int]]] = {}
    for number, batch in enumerate(drawn):
        shared.setdefault(id(batch), (batch, []))[1].append(number)
    return [
        Pass(
            _on_device(batch if restrict is None else restrict(batch), device), (batch,), (tuple(numbers),)
        )
        for batch, numbers in shared.values()
    ]


def concatenated(passes: Sequence[Pass], padding: Padding | None = None) -> list[Pass]:
    """As few passes as shapes allow: those that agree in everything but their number of rows become one, and with
    ``padding`` also those that differ in length, while it adds little.
    """
    widths = [0 if padding is None else padding.width(single.inputs) for single in passes]
    groups: list[list[Pass]] = []
    # From the longest to the shortest, so that the first of a group has its length.
    for _, single in sorted(zip(widths, passes, strict=True), key=lambda pair: -pair[0]):
        group = next((group for group in groups if _fits(group, single, padding)), None)
        if group is None:
            groups.append([single])
        else:
            group.append(single)
    return [_concatenate(group, padding) if len(group) > 1 else group[0] for group in groups]


def _fits(group: Sequence[Pass], single: Pass, padding: Padding | None) -> bool:
    first, other = group[0].inputs, single.inputs
    if _rows(first) is None or _rows(other) is None:
        return False
    if _alike(first, other):
        return True
    if padding is None or not padding.width(first) or not padding.width(other):
        return False
    if padding.kind(first) != padding.kind(other) or not _alike(padding.others(first), padding.others(other)):
        return False
    tokens = sum(one.inputs[padding.tokens].numel() for one in (*group, single))
    rows = sum(len(one.inputs[padding.tokens]) for one in (*group, single))
    return rows * padding.width(first) <= (1 + SPARE) * tokens


def _concatenate(group: Sequence[Pass], padding: Padding | None) -> Pass:
    parts: list[Mapping[str, Any]] = [single.inputs for single in group]
    inside = None
    if padding is not None and not all(_alike(parts[0], part) for part in parts[1:]):
        width = padding.width(parts[0])
        there = [torch.ones_like(part[padding.tokens], dtype=torch.bool) for part in parts]
        inside = torch.cat([pad(part, (0, width - part.shape[1])) for part in there])
        parts = [padding.to(part, width) for part in parts]
    inputs = {
        name: torch.cat([part[name] for part in parts]) if isinstance(value, Tensor) else value
        for name, value in parts[0].items()
    }
    return Pass(
        inputs,
        tuple(single.sources[0] for single in group),
        tuple(single.tasks[0] for single in group),
        tuple(_rows(single.inputs) or 0 for single in group),
        inside,
    )


def _alike(first: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether they agree in everything but the first dimension of tensors."""
    if first.keys() != other.keys():
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
