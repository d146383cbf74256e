"""Writes a safetensors file tensor by tensor, from pieces that need not be in memory together."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nsc_merge.utils.safetensors_checks import DTYPES, bytes_of

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Planned:
    """A tensor that is to be written.

    Attributes:
        dtype, shape: of it.
        pieces: of its numbers, in order, on any device.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Tensor]]

    @property
    def size(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def in_order(tensors: Mapping[str, Planned]) -> dict[str, Planned]:
    """The order in which safetensors itself writes them: the widest dtypes first, so that all are aligned."""
    return dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))


def write_safetensors(file: Path, tensors: Mapping[str, Planned], done: Callable[[int], None]) -> None:
    """Write ``tensors`` by name, their data in this order.

    Args:
        file: a new one.
        tensors: one piece of one of them is asked for at a time.
        done: called with the bytes that each piece took.

    Raises:
        OSError: if the disk is full, for example.
        ValueError: what ``pieces`` raise; the file is then of no use.
    """
    header = _header(tensors)
    with file.open("xb") as opened:
        opened.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            for piece in tensor.pieces():
                # A view of bytes, and of no tensor of another shape or dtype than the header says.
                raw = bytes_of(piece.to("cpu", tensor.dtype))
                opened.write(raw.numpy().data)
                done(raw.numel())
        if opened.tell() != 8 + len(header) + sum(tensor.size for tensor in tensors.values()):
            raise RuntimeError(f"{file}: expected pieces of as many bytes as the tensors have")


def _header(tensors: Mapping[str, Planned]) -> bytes:
    """As the format has it: JSON, padded with spaces so that the data begins at a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, begin + tensor.size],
        }
        begin += tensor.size
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return raw + b" " * (-len(raw) % 8)
