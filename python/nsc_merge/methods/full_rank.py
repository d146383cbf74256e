"""Keeps merged updates of full rank, which take four bytes for every entry of an adapted weight."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch

from nsc_merge.adapters import Factor
from nsc_merge.utils.memory import free_memory, size_said


def kept(updates: Iterable[tuple[str, Factor]]) -> Iterator[tuple[str, Factor]]:
    """The same updates. Matrices on the CPU are in memory up to half of what is free, and no more than 2 GiB; beyond,
    they are parts of a temporary file without a name (in ``TMPDIR``), which the system reads when they are asked for.

    Raises:
        OSError: if that file finds no room.
    """
    room, write = free_memory(torch.device("cpu")) / 2, None
    for path, factor in updates:
        held = factor.dense
        if held is not None and held.device.type == "cpu":
            room -= held.nbytes
            if room < 0:
                write = write or _writer()
                factor = replace(factor, dense=write(held))
        yield path, factor


def _writer() -> Callable[[torch.Tensor], torch.Tensor]:
    # Open as long as the updates live, which are mapped from it.
    file = tempfile.TemporaryFile()  # noqa: SIM115
    written = 0

    def write(matrix: torch.Tensor) -> torch.Tensor:
        nonlocal written
        values = matrix.contiguous().numpy()
        try:
            file.write(values.data)
            file.flush()
        except OSError as error:
            raise OSError(
                error.errno,
                f"{os.strerror(error.errno or 0)} for the merged update, of full rank and so far "
                f"{size_said(written + matrix.nbytes)}; expected TMPDIR to name a folder with room for four bytes for "
                "every entry of the adapted weights, or a method of low rank",
                tempfile.gettempdir(),
            ) from error
        mapped = np.memmap(file, values.dtype, "c", offset=written, shape=values.shape)
        written += matrix.nbytes
        return torch.from_numpy(mapped)

    return write
