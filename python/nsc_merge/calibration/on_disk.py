"""Tensors on a disk in the place of memory, where there are many."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from nsc_merge.utils.atomic_file import no_room

Keep = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]

# Bytes of a file, of which each is mapped as a whole; and of tensors that are not worth a place in one.
_FILE, _SMALL, _ALIGNED = 1 << 28, 1 << 12, 64


def in_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keep tensors as they are."""
    return dict(tensors)


class OnDisk:
    """Keeps tensors in memory up to a limit, and further ones in files without a name, which the system reads as they
    are used and forgets as it needs the room: their own is free again once nobody holds what is in them.

    Args:
        folder: on the disk that is to hold them; made where there is none.
        limit: bytes that are kept in memory.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._left = folder, limit
        self._file = torch.empty(0, dtype=torch.uint8, device="cpu")

    def keep(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same values by the same names; those on the CPU, of which nothing else is to be left.

        Raises:
            OSError: if there is no room for them, saying what to do.
        """
        return {name: self._kept(value) for name, value in tensors.items()}

    def _kept(self, value: Tensor) -> Tensor:
        if value.nbytes < _SMALL or value.device.type != "cpu":
            return value
        self._left -= value.nbytes
        if self._left >= 0:
            return value
        return self._place(value.nbytes).view(value.dtype).view(value.shape).copy_(value)

    def _place(self, size: int) -> Tensor:
        room = -(-size // _ALIGNED) * _ALIGNED
        if room > len(self._file):
            self._file = self._new(max(room, _FILE))
        place, self._file = self._file[:size], self._file[room:]
        return place

    def _new(self, size: int) -> Tensor:
        self._folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".samples-", dir=self._folder)
        try:
            # Written to where it has no room, a mapping would end the process. macOS has no call for it.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle, 0, size)
            else:
                os.ftruncate(handle, size)
            return torch.from_file(name, shared=True, size=size, dtype=torch.uint8)
        except OSError as error:
            cure = no_room(error, self._folder) or "a disk that files can be mapped from"
            raise OSError(
                f"samples as the model takes them do not fit into memory, nor into a file: {error.strerror}; expected "
                f"{cure}, or fewer of them (samples: 5000)"
            ) from None
        finally:
            os.close(handle)
            os.unlink(name)
