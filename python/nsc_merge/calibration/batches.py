"""Calibration batches: drawn for every task, in order, again and again."""

from __future__ import annotations

import hashlib
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from nsc_merge.models.real_tokens import of_tokens
from nsc_merge.processes.group import current

Batch = Mapping[str, Tensor]
Calibration = Mapping[str, Iterable[Batch]]

# The input that is 0 at padding, of every model that has one.
MASK = "attention_mask"
# Inputs that are tensors for every model. Others may be lists, such as sizes of pictures.
_TENSORS = (MASK, "input_ids", "inputs_embeds", "pixel_values", "position_ids", "token_type_ids")


def streams(calibration: Calibration | None, tasks: Sequence[str]) -> dict[str, Iterator[Batch]]:
    """Per task, its batches in order, again and again.

    Raises:
        ValueError: if ``calibration`` is not a mapping with exactly these tasks; on drawing, if a task has no
            batch, one that is not a mapping, lists in place of tensors, or a row of nothing but padding, or if
            processes that share the work begin with different ones.
    """
    return {task: _endless(task, batches) for task, batches in restartable(calibration, tasks).items()}


def restartable(calibration: Calibration | None, tasks: Sequence[str]) -> Calibration:
    """The same batches, in the order of ``tasks``, from iterables that can be gone through more than once.

    Raises:
        ValueError: if ``calibration`` is not a mapping with exactly these tasks.
    """
    if not isinstance(calibration, Mapping) or set(calibration) != set(tasks):
        found = sorted(calibration) if isinstance(calibration, Mapping) else type(calibration).__name__
        raise ValueError(f"calibration: expected batches for each of {list(tasks)}, found {found}")
    known = {task: calibration[task] for task in tasks}
    return {task: Replayed(found) if isinstance(found, Iterator) else found for task, found in known.items()}


class Replayed:
    """An iterator as an iterable that starts anew: what it gave is remembered."""

    def __init__(self, source: Iterator[Batch]) -> None:
        self._source = source
        self._seen: list[Batch] = []

    def __iter__(self) -> Iterator[Batch]:
        number = 0
        while number < len(self._seen) or self._draw():
            yield self._seen[number]
            number += 1

    def _draw(self) -> bool:
        for batch in self._source:
            self._seen.append(batch)
            return True
        return False


class _Rest:
    """An iterable without its first items, however often it is started."""

    def __init__(self, source: Iterable[Batch], skipped: int) -> None:
        self._source, self._skipped = source, skipped

    def __iter__(self) -> Iterator[Batch]:
        return islice(iter(self._source), self._skipped, None)


def held_out(calibration: Calibration, tasks: Sequence[str], count: int) -> tuple[dict[str, list[Batch]], Calibration]:
    """The first ``count`` batches of every task, and a calibration without them.

    Args:
        calibration: of iterables that start anew (:func:`restartable`), each time with the same batches.

    Raises:
        ValueError: if a task has no more batches than that.
    """
    first: dict[str, list[Batch]] = {}
    for task in tasks:
        found = list(islice(_own(task, calibration[task]), count + 1))
        if len(found) <= count:
            raise ValueError(
                f"calibration[{task!r}]: expected more batches than the {count} held out, found {len(found)}"
            )
        first[task] = [_checked(task, batch) for batch in found[:count]]
        for batch in first[task]:
            _check_mask(task, batch)
    return first, {task: _Rest(calibration[task], count) for task in tasks}


@contextmanager
def naming_tasks(drawn: Mapping[str, Batch]) -> Iterator[None]:
    """What others' code, such as a model, raises of its inputs, not knowing whose they are, is told with the tasks and
    the shapes of their batches.
    """

    def told() -> str:
        alike: dict[str, list[str]] = {}
        for task, batch in drawn.items():
            alike.setdefault(_shapes(batch), []).append(repr(task))
        batches = "; ".join(f"{', '.join(tasks)} of {shapes}" for shapes, tasks in alike.items())
        return f"calibration: in forwards of the batches of {batches}"

    with _telling(told):
        yield


@contextmanager
def naming_inputs(argument: str, inputs: Batch) -> Iterator[None]:
    """The same of the forward of one batch: told with the argument that it came in, and its shapes."""
    with _telling(lambda: f"{argument}: in a forward of {_shapes(inputs)}"):
        yield


@contextmanager
def _telling(told: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        ours = str(frame.f_globals.get("__name__")).partition(".")[0] in ("nsc_merge", "nsc_kernels")
        if ours or type(error) not in (IndexError, RuntimeError, TypeError, ValueError):
            raise
        # A table of tokens or of positions was asked for a row that it has not.
        table = isinstance(error, IndexError) and re.search(r"index .*out of (range|bounds)", str(error)) is not None
        way = "; expected tokens that the model has, and no more than it has positions, those of answers among them"
        said = f"{error}{way if table else ''}"
        if "no padding token" in said:
            # A classifier on a decoder finds by it where a text ends, and reads no mask.
            way = "expected pad_token_id in the base's config.json, of the token that it was trained to be padded by"
            said = f"{said.rstrip('.')}; {way}"
        raise type(error)(f"{told()}: {said}") from error


def _shapes(batch: Batch) -> str:
    return ", ".join(f"{name} {list(value.shape)}" for name, value in batch.items() if isinstance(value, Tensor))


def _own(task: str, batches: Iterable[Batch]) -> Iterator[Batch]:
    """Batches that stay what they are once they were given: what is computed of one is kept with it, and it is run
    again.

    Raises:
        ValueError: if a dictionary, or a tensor in it, is filled anew for the next batch.
    """
    last: Any = None
    held: dict[str, tuple[Tensor, int]] = {}
    for batch in batches:
        for name, (tensor, version) in _versions(batch).items():
            before, then = held.get(name, (tensor, version))
            if (version != then) if tensor is before else batch is last:
                raise ValueError(
                    f"calibration[{task!r}]: expected a dictionary and tensors of its own for every batch, found "
                    f"{name!r} filled anew for the next one; make a new dictionary, and clone() what is written over"
                )
        yield batch
        # Now, so that what a model writes into its inputs does not count as the source's.
        last, held = batch, _versions(batch)


def _versions(batch: Any) -> dict[str, tuple[Tensor, int]]:
    """Every tensor of a batch, and how often it was written into, which those made in inference mode do not know."""
    if not isinstance(batch, Mapping):
        return {}
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    return {name: (value, 0 if value.is_inference() else value._version) for name, value in tensors.items()}


def _checked(task: str, batch: Batch) -> Batch:
    if not isinstance(batch, Mapping) or not batch:
        way = ""
        if isinstance(batch, str):
            way = "; of one batch alone make a list: [batch]"
        elif isinstance(batch, (Tensor, list, tuple)):
            way = "; call tensors as the model's forward does, and leave labels out: {'pixel_values': images}"
        raise ValueError(
            f"calibration[{task!r}]: expected dictionaries of model inputs, found {type(batch).__name__}{way}"
        )
    none = not any(isinstance(value, Tensor) for value in batch.values())
    for name, value in batch.items():
        rows = not isinstance(value, Tensor) and (isinstance(value, (list, tuple)) or hasattr(value, "__array__"))
        if rows and (none or name in _TENSORS):
            raise ValueError(
                f"calibration[{task!r}]: {name}: expected a tensor with a row per sample, found "
                f"{type(value).__name__}{_lengths(value)}; tokenizers and processors give tensors with "
                'return_tensors="pt", and rows of one length with padding=True'
            )
    return batch


def _check_mask(task: str, batch: Batch) -> None:
    empty = rows_without_tokens(batch)
    if empty:
        raise ValueError(
            f"calibration[{task!r}]: {MASK}: expected a real token in every row, found none in rows {empty[:5]} "
            f"({len(empty)} in all)"
        )
    if wrong := other_mask(batch):
        raise ValueError(f"calibration[{task!r}]: {wrong}")


def _check_shared(task: str, batch: Batch) -> None:
    """Refuse data of each process's own: of every batch each runs some rows, so that all need the whole ones."""
    group = current()
    if group.size == 1:
        return
    digest = hashlib.sha256()
    for name, value in batch.items():
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    every = group.share([digest.hexdigest()])
    others = [rank for rank, one in enumerate(every) if one != every[0]]
    if others:
        raise ValueError(
            f"calibration[{task!r}]: expected the same batches in all {group.size} processes, which divide the rows of "
            f"each among them, found others in process {others[0]} than in 0; give all of them the whole data, without "
            "a DistributedSampler"
        )


def other_mask(batch: Batch) -> str:
    """What is wrong where tokens and their mask are of different shapes, which transformers runs all the same; nothing
    where they agree, or there is but one of them.
    """
    tokens, mask = batch.get("input_ids"), of_tokens(batch.get(MASK))
    if tokens is None or mask is None or tokens.dim() != 2 or tokens.shape == mask.shape:
        return ""
    return f"{MASK}: expected the shape of input_ids, {list(tokens.shape)}, found {list(mask.shape)}"


def rows_without_tokens(batch: Batch) -> list[int]:
    """Rows of nothing but padding, if a mask says so: a mean over no tokens would count as a ratio of 0."""
    mask = of_tokens(batch.get(MASK))
    return [] if mask is None else (mask == 0).all(1).nonzero().flatten().tolist()


def each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with every tensor changed, in dictionaries, lists and tuples, too, as denoisers are given some."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: each_tensor(one, change) for name, one in value.items()}
    return type(value)(each_tensor(one, change) for one in value) if type(value) in (list, tuple) else value


def holds_arrays(value: Any) -> bool:
    """Whether there is a tensor, or an array of numpy, in what :func:`each_tensor` goes through."""
    if isinstance(value, (Mapping, list, tuple)):
        return any(map(holds_arrays, value.values() if isinstance(value, Mapping) else value))
    return hasattr(value, "__array__")


def _lengths(value: Any) -> str:
    """What rows of unequal lengths are, for messages."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(row, (list, tuple)) for row in value):
        return ""
    lengths = sorted({len(row) for row in value})
    return f" of rows of {lengths[0]} to {lengths[-1]} numbers" if len(lengths) > 1 else ""


def _endless(task: str, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches of an iterable that can be gone through more than once, in order, again and again."""
    first = True
    while True:
        empty = True
        for batch in _own(task, batches):
            _checked(task, batch)
            # Before anything that the batches of one process alone could be refused for: the others would wait here.
            if first and empty:
                _check_shared(task, batch)
            # In the first round only: a mask on another device is waited for.
            if first:
                _check_mask(task, batch)
            empty = False
            yield batch
        if empty:
            raise ValueError(f"calibration[{task!r}]: expected at least one batch, found none")
        first = False
