"""The numbers of a parameter: in memory, on accelerate's disk, in shards, or in the file that a model came from."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsc_kernels.devices import with_float64
from nsc_merge.adapters.algebra.low_rank import Rows
from nsc_merge.utils.provenance import mark_of

# Bytes of a sum in float64 that are formed, rounded and handed on before the next: on a CPU they stay in its cache.
_TILE, _TILE_ON_A_GPU = 2 << 20, 64 << 20
UNLOADED = (
    "model: its weights were left in their files, to be read one after another; expected it loaded with them, as "
    "AutoModel.from_pretrained does, to run or to change it"
)


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a safetensors file.

    Attributes:
        file: that holds it.
        mark: what is another once the file is replaced or written to.
        start: the byte of the file that it begins at.
        shape: of all of it.
        dtype: in the file.
        device: that its numbers are brought to.
    """

    file: Path
    mark: tuple[int, ...]
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def read(self, begin: int, end: int) -> Tensor:
        """Its rows from ``begin`` up to ``end``, in memory of their own; of a scalar, from 0 up to 1, itself.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it is not what it was when the model was made of it.
        """
        shape = (end - begin, *self.shape[1:]) if self.shape else ()
        width = math.prod(self.shape[1:]) * self.dtype.itemsize
        raw = torch.empty((end - begin) * width, dtype=torch.uint8, device="cpu")
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start + begin * width)
            buffer, filled = raw.numpy().data, 0
            while filled < len(buffer) and (count := file.readinto(buffer[filled:])):
                filled += count
            if filled < len(buffer) or mark_of(os.fstat(file.fileno())) != self.mark:
                raise ValueError(f"model: {self.file} has changed since it was loaded; load it again once it stays")
        return raw.view(self.dtype).reshape(shape).to(self.device)

    def attach_to(self, tensor: Tensor) -> None:
        """Let it be what :func:`file_tensor` finds for a parameter or buffer on the meta device."""
        setattr(tensor, _ATTRIBUTE, self)


# On the tensor itself: whatever copies or replaces it has no numbers.
_ATTRIBUTE = "_nsc_merge_file"


def file_tensor(tensor: Tensor) -> FileTensor | None:
    """Where the numbers of a parameter or buffer are, if they were left in a file."""
    return getattr(tensor, _ATTRIBUTE, None)


@dataclass(frozen=True)
class Stored:
    """The numbers of a parameter, in memory.

    Attributes:
        values: they themselves, detached.
    """

    values: Tensor

    @property
    def device(self) -> torch.device:
        """Where sums with them are formed."""
        return with_float64(self.values.device)

    def whole(self) -> Tensor:
        """All of them as one plain tensor."""
        return self.values

    def rows(self, begin: int, end: int) -> Tensor:
        """Some of them, by the first dimension."""
        return self.values[begin:end]

    def sums(self, update: Rows) -> Iterator[Tensor]:
        """With ``update`` added in float64, some rows after others."""
        count, *width = self.values.shape
        device = self.device
        tile = _TILE if device.type == "cpu" else _TILE_ON_A_GPU
        # Of experts, each row is a matrix.
        step = max(tile // (8 * max(math.prod(width), 1)), 16 if len(width) < 2 else 1)
        for begin in range(0, count, step):
            end = min(begin + step, count)
            yield update(begin, end).add_(self.rows(begin, end).to(device))

    def tiles(self, update: Rows) -> Iterator[Tensor]:
        """All of :meth:`sums`, rounded once."""
        return (rows.to(self.values.dtype) for rows in self.sums(update))

    def row_norms(self, update: Rows) -> Tensor:
        """Norms of the rows of :meth:`sums`, in float64 on the CPU."""
        return torch.cat([rows.norm(dim=1).cpu() for rows in self.sums(update)])

    def plus(self, update: Rows) -> Tensor:
        """All of :meth:`tiles` in one, as :meth:`write` takes them."""
        total, begin = torch.empty_like(self.values, device=self.device), 0
        for tile in self.tiles(update):
            total[begin : begin + len(tile)] = tile
            begin += len(tile)
        return total

    def write(self, values: Tensor) -> None:
        """Put others in their place."""
        with torch.no_grad():
            self.values.copy_(values)

    @contextmanager
    def holding(self, values: Tensor) -> Iterator[None]:
        """Others in their place for the duration of a ``with`` block."""
        before = self.values.clone()
        self.write(values)
        try:
            yield
        finally:
            self.write(before)


@dataclass(frozen=True)
class Sharded(Stored):
    """The numbers of a DTensor: every process holds and changes its own."""

    def whole(self) -> Tensor:
        values: Any = self.values
        return values.full_tensor()

    def rows(self, begin: int, end: int) -> Tensor:
        return self.whole()[begin:end]

    def row_norms(self, update: Rows) -> Tensor:
        return Stored(self.whole()).row_norms(update)

    def plus(self, update: Rows) -> Tensor:
        from torch.distributed.tensor import DTensor, Replicate

        values: Any = self.values
        mesh, own = values.device_mesh, values.to_local()
        whole = update(0, len(values)).to(own.device)
        # Every process has the whole update, so that taking its shard of it sends nothing.
        replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
        part = replicated.redistribute(placements=values.placements).to_local()
        merged = (own.double() + part).to(own.dtype)
        return DTensor.from_local(
            merged, mesh, values.placements, run_check=False, shape=values.shape, stride=values.stride()
        )


@dataclass(frozen=True)
class OnDisk(Stored):
    """Numbers that accelerate reads from a file whenever they are needed. The file stays as it is: it may be the
    checkpoint itself. Others are held in memory in its stead.

    Attributes:
        held: name -> numbers that accelerate takes in place of a file's.
        name: of these.
    """

    held: dict[str, Tensor]
    name: str

    def write(self, values: Tensor) -> None:
        self.held[self.name] = values

    @contextmanager
    def holding(self, values: Tensor) -> Iterator[None]:
        self.write(values)
        try:
            yield
        finally:
            del self.held[self.name]


@dataclass(frozen=True)
class InFile(Stored):
    """Numbers that are still in the file of a model that was loaded without them. They are read, and never changed.

    Attributes:
        file: where they are; ``values`` have their shape and dtype only.
    """

    file: FileTensor

    @property
    def device(self) -> torch.device:
        return with_float64(self.file.device)

    def whole(self) -> Tensor:
        return self.rows(0, len(self.values) if self.values.dim() else 1)

    def rows(self, begin: int, end: int) -> Tensor:
        return self.file.read(begin, end).to(self.values.dtype)

    def write(self, values: Tensor) -> None:
        raise ValueError(UNLOADED)
