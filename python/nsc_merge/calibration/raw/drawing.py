"""Which rows are taken, in which order, and which samples are a batch: the same for every run; the draw, whatever the
batch size.

Rows are ordered by SHA-256 of seed and row number, so that the draw depends on no library's random numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nsc_merge.calibration.on_disk import Keep, in_memory

Row = dict[str, Any]
Encoded = dict[str, Tensor]

TOKENS, MASK, PIXELS = "input_ids", "attention_mask", "pixel_values"
# What the decoder reads of a model with an encoder.
DECODED, DECODED_MASK = "decoder_input_ids", "decoder_attention_mask"


@dataclass(frozen=True)
class Source:
    """Rows that samples are drawn from.

    Attributes:
        name: how messages call it.
        count: of its rows.
        columns: that its rows have, not all of them all.
        rows: those of some numbers, in their order.
        sha256: name of a file -> SHA-256 of the bytes that the rows were made of.
        folder: that paths of images are relative to; None where there is none.
        order: numbers of the rows, where they are drawn already.
        split: that the rows are of; empty where there are none.
    """

    name: str
    count: int
    columns: tuple[str, ...]
    rows: Callable[[Sequence[int]], list[Row]]
    sha256: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None
    order: tuple[int, ...] | None = None
    split: str = ""


def listed(name: str, rows: Sequence[Row], sha256: Mapping[str, str], folder: Path | None) -> Source:
    """A source of rows in memory."""
    columns = columns_of(rows)
    return Source(name, len(rows), columns, lambda numbers: [rows[number] for number in numbers], sha256, folder)


def columns_of(rows: Iterable[Row]) -> tuple[str, ...]:
    """All columns that rows have, in the order in which they occur."""
    return tuple(dict.fromkeys(name for row in rows for name in row))


def place_of(seed: int, number: int) -> bytes:
    """What row ``number`` is ordered by."""
    return hashlib.sha256(f"{seed}:{number}".encode()).digest()


def _order(seed: int, count: int) -> Any:
    """The numbers from 0 to ``count`` by :func:`place_of`, in little memory, as there may be hundreds of millions. The
    16 bytes that are compared agree in no two digests.
    """
    places = np.fromiter((place_of(seed, number)[:16] for number in range(count)), "S16", count)
    return places.argsort(kind="stable")


def in_order(source: Source, seed: int, at_once: int) -> Iterator[tuple[int, Row]]:
    """All rows with their numbers in the order of the draw, read some at once."""
    numbers = np.array(source.order) if source.order else _order(seed, source.count)
    for start in range(0, source.count, at_once):
        some = numbers[start : start + at_once].tolist()
        yield from zip(some, source.rows(some), strict=True)


@dataclass(frozen=True)
class Filling:
    """How an input that is of another length in every sample is padded: with what, and on which side."""

    value: float
    side: str


def batched(
    encoded: list[Encoded],
    size: int,
    seed: int,
    padded: Mapping[str, Filling] | None,
    keep: Keep = in_memory,
) -> list[dict[str, Tensor]]:
    """Batches of samples of like length and of the same kinds of inputs; images alone stay in the order of the draw.

    Args:
        encoded: emptied on the way, so that images are not held twice.
        size: of a batch.
        seed: of the order of the batches.
        padded: name of an input -> how it is padded; None with images alone. Others have a first dimension of images or
            recordings.
        keep: where the batches are held.
    """
    if padded is None:
        rows = [list(range(start, min(start + size, len(encoded)))) for start in range(0, len(encoded), size)]
    else:
        # Of a model that takes no mask, samples of one length stand together, unpadded.
        masks = {DECODED: DECODED_MASK, DECODED_MASK: DECODED_MASK}
        whole = {name for name in padded if masks.get(name, MASK) in padded}
        kinds = [_kind({name: one[name] for name in one if name not in whole}, padded) for one in encoded]
        leading = TOKENS if TOKENS in encoded[0] else next(iter(padded), None)
        rows = batches_by_length([len(one[leading]) if leading else 0 for one in encoded], kinds, size, seed)
    batches = []
    for some in rows:
        batches.append(keep(_together([encoded[row] for row in some], padded)))
        for row in some:
            encoded[row] = {}
    return batches


def batched_rows(
    encoded: Sequence[Encoded],
    of_rows: Mapping[str, Tensor],
    size: int,
    seed: int,
    padded: Mapping[str, Filling],
    argument: str,
    keep: Keep = in_memory,
) -> list[dict[str, Tensor]]:
    """Batches of rows of several texts: the inputs ``[rows * S, ...]`` of all texts of the first row, of the second,
    and so on, beside what the rows have of their own.

    Args:
        encoded: the texts, those of a row behind each other, of as many in every row.
        of_rows: name -> a value for each row ``[N, ...]``.
        size: rows of a batch.
        seed, padded, keep: as in :func:`batched`.
        argument: how messages call the data.

    Raises:
        ValueError: of a base without a mask, for which no two texts can be of one length.
    """
    if MASK not in padded:
        raise ValueError(f"{argument}: texts: the base takes no {MASK}, and texts of a row are of several lengths")
    count = len(next(iter(of_rows.values())))
    several = len(encoded) // count
    rows = [encoded[several * number : several * (number + 1)] for number in range(count)]
    longest = [max(len(one[TOKENS]) for one in row) for row in rows]
    batches = []
    for some in batches_by_length(longest, [()] * count, size, seed):
        texts = _together([one for number in some for one in rows[number]], padded)
        batches.append(keep({**texts, **{name: value[some] for name, value in of_rows.items()}}))
    return batches


def _kind(one: Encoded, padded: Mapping[str, Filling]) -> tuple[Any, ...]:
    """What samples of a batch agree in: of pieces of images, which stand behind each other, not how many there are."""
    return tuple((name, value.shape if name in padded else value.shape[1:]) for name, value in one.items())


def _together(some: Sequence[Encoded], padded: Mapping[str, Filling] | None) -> dict[str, Tensor]:
    batch = {}
    for name in some[0]:
        values = [one[name] for one in some]
        if how := (padded or {}).get(name):
            batch[name] = pad_sequence(values, batch_first=True, padding_value=how.value, padding_side=how.side)
        else:
            batch[name] = torch.stack(values) if padded is None else torch.cat(values)
    return batch


def batches_by_length(lengths: Sequence[int], kinds: Sequence[Any], size: int, seed: int) -> list[list[int]]:
    """Numbers of the samples of each batch: of one kind and of like lengths, so that padding costs little.

    The batches are shuffled, so that steps see short and long ones in turn.

    Args:
        lengths: of the samples.
        kinds: what samples of a batch have to agree in.
        size: of a batch; smaller where no more samples of a kind are left.
    """
    batches = []
    for kind in dict.fromkeys(kinds):
        numbers = sorted((n for n, one in enumerate(kinds) if one == kind), key=lambda n: lengths[n])
        batches += [numbers[start : start + size] for start in range(0, len(numbers), size)]
    order = sorted(range(len(batches)), key=lambda number: place_of(seed, number))
    return [batches[number] for number in order]


def digest(encoded: Sequence[Encoded]) -> str:
    """SHA-256 of samples in the order of the draw, whatever their batches: names, dtypes, shapes and values."""
    found = hashlib.sha256()
    for one in encoded:
        for name in sorted(one):
            value = one[name].contiguous()
            found.update(f"{name} {value.dtype} {list(value.shape)} ".encode())
            found.update(value.numpy().tobytes())
    return found.hexdigest()
