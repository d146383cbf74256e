"""Calibration batches of all tasks, put together into forward passes, and these divided among processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from nsc_merge.calibration.batches import Batch, each_tensor, holds_arrays
from nsc_merge.processes.group import Group, current

# Padding may add this share of the tokens that are there: it costs as much as they do, and saves what a pass costs
# whatever its size. Measured on a CPU (d = 512, 13 % added): batches of about 50 tokens take 0.80 of the time of passes
# of their own, batches of about 230 tokens 1.07.
SPARE, FEW = 0.25, 128
# Input of images or audio -> the token of a text that says where one is.
Places = Mapping[str, int]


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
class Part:
    """What one of several processes runs of a pass.

    Attributes:
        inputs: of the whole pass, the same in every process.
        rows: those that this process runs; None where the inputs were not cut by rows, so that it runs them all.
        total: how many rows there are; None likewise.
        counts: False where the process runs them only because the others run something meanwhile: whatever it finds
            must weigh nothing.
    """

    inputs: dict[str, Any]
    rows: slice | None = None
    total: int | None = None
    counts: bool = True

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for parts of passes of one shape that are weighted alike."""
        return (self.rows and (self.rows.start, self.rows.stop), self.total, self.counts)


@dataclass(frozen=True)
class Pass:
    """One forward.

    Attributes:
        inputs: of the model.
        sources: the batches it was made of; kept so that their identity stays theirs.
        tasks: per source, the numbers of the tasks that it belongs to.
        sizes: per source, its rows; None where the inputs were not concatenated and need not have rows.
        inside: ``[rows, tokens]`` bool, False where concatenating added padding; None where it added none.
        part: where several processes share the work, what this one runs: then ``inputs`` are of its rows alone, and
            everything else is of the whole pass, as :attr:`whole` is.
    """

    inputs: dict[str, Any]
    sources: tuple[Batch, ...]
    tasks: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...] | None = None
    inside: Tensor | None = None
    part: Part | None = None

    @property
    def whole(self) -> Mapping[str, Any]:
        """The inputs of all processes together."""
        return self.inputs if self.part is None else self.part.inputs

    @property
    def share(self) -> float:
        """The part of all rows that this process runs; all processes' shares add up to 1. A mean over rows, times
        this, adds up over the processes to the mean over all of them.
        """
        if self.part is None or not self.part.counts:
            return 1.0 if self.part is None else 0.0
        if self.part.rows is None or not self.part.total:
            return 1.0
        return (self.part.rows.stop - self.part.rows.start) / self.part.total

    def mine(self, values: Tensor) -> Tensor:
        """This process's rows of ``values [rows, ...]``, which are of the whole pass; zero where they must not count.
        Weights that add up to 1 over the whole pass do so over the processes then.
        """
        if self.part is None:
            return values
        if not self.part.counts:
            values = torch.zeros_like(values)
        return values if self.part.rows is None else values[self.part.rows]

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


def split(passes: Sequence[Pass], group: Group, *, alike: bool = True, places: Places | None = None) -> list[Pass]:
    """What this process runs of ``passes``, which all processes of ``group`` hold in the same order.

    Every process gets equally many, so that processes that gather the same weights at the same layers never wait for
    one that has finished. Passes of at least as many rows as there are processes are cut by rows. The others, and those
    whose inputs have no common rows, are dealt out whole, one to each process in turn; a process that none is left for
    runs another's, which then does not count (:attr:`Part.counts`): it must go through forward and backward as if it
    did.

    Args:
        passes: of the whole work.
        group: the processes that share it.
        alike: whether passes that are not cut run the same forwards, so that processes may run different ones at the
            same time; otherwise all run the same, which counts in one of them.
        places: input of images or audio -> the token that says in a text where one is; rows with several beside rows
            with none are not cut.

    What is measured must be added up over the processes, weighted by :attr:`Pass.share` or :meth:`Pass.mine`; see
    :meth:`nsc_merge.processes.group.Group.add`.
    """
    if group.size == 1:
        return list(passes)
    parts, uncut = [], []
    for one in passes:
        rows = _cuttable_rows(one.inputs, places or {})
        if rows is None or rows < group.size:
            uncut.append(one)
            continue
        own = slice(rows * group.rank // group.size, rows * (group.rank + 1) // group.size)
        inputs = {name: value[own] if isinstance(value, Tensor) else value for name, value in one.inputs.items()}
        parts.append(replace(one, inputs=inputs, part=Part(one.inputs, own, rows)))
    if not alike:
        for number, one in enumerate(uncut):
            parts.append(replace(one, part=Part(one.inputs, counts=number % group.size == group.rank)))
        return parts
    for first in range(0, len(uncut), group.size):
        dealt = uncut[first : first + group.size]
        one = dealt[min(group.rank, len(dealt) - 1)]
        parts.append(replace(one, part=Part(one.inputs, counts=group.rank < len(dealt))))
    return parts


def of_the_whole(one: Pass, value: Tensor) -> Tensor:
    """What ``value``, measured on a process's part of a pass and weighted by it, adds up to over the processes that
    hold the other parts; without its gradient.
    """
    value = value.detach().clone()
    if one.part is not None and one.part.rows is not None:
        current().add([value])
    return value


def _cuttable_rows(inputs: Mapping[str, Any], places: Places) -> int | None:
    """How many rows inputs have that can be told apart by row: of lists nobody knows what belongs to which. Of as many
    images or recordings as rows each row has its own, if none has none.
    """
    text = inputs.get("input_ids")
    for name, token in places.items():
        if isinstance(text, Tensor) and name in inputs and bool((~text.eq(token).any(-1)).any()):
            return None
    plain = all(value is None or isinstance(value, (Tensor, bool, int, float, str)) for value in inputs.values())
    return _rows(inputs) if plain else None


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
        elif value is not match and (holds_arrays(value) or type(value) is not type(match) or value != match):
            return False
    return True


def _rows(inputs: Mapping[str, Any]) -> int | None:
    """The one length of the first dimension of all tensors, None if there is no such length."""
    lengths = {
        value.shape[0] if value.dim() else None for value in inputs.values() if isinstance(value, Tensor)
    }
    return lengths.pop() if len(lengths) == 1 else None


def _on_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    # Embeddings that were looked up beforehand may have a graph, through which a backward goes once.
    moved: dict[str, Any] = each_tensor(batch, lambda value: value.detach().to(device))
    return moved
