"""Keeps merged updates of full rank, which take four bytes for every entry of an adapted weight."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import IO

import numpy as np
import torch

from nsc_merge.adapters import Factor
from nsc_merge.utils.errors import logger
from nsc_merge.utils.memory import free_memory, size_said


def kept(updates: Iterable[tuple[str, Factor]]) -> Iterator[tuple[str, Factor]]:
    """The same updates. Matrices on the CPU are in memory up to half of what is free, and no more than 2 GiB; beyond,
    they are parts of a temporary file without a name (in ``TMPDIR``), which the system reads when they are asked for,
    as long as that finds room.
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
    file: IO[bytes] | None = None
    written, full = 0, False

    def write(matrix: torch.Tensor) -> torch.Tensor:
        nonlocal file, written, full
        if full:
            return matrix
        values = matrix.contiguous().numpy()
        try:
            # Open as long as the updates live, which are mapped from it.
            file = file or tempfile.TemporaryFile()  # noqa: SIM115
            file.seek(written)
            file.write(values.data)
            file.flush()
        except OSError as error:
            full = True
            logger.warning(
                "what is more than %s of the merged update is held in memory (%s); TMPDIR may name another folder",
                size_said(written),
                error,
            )
            return matrix
        mapped = np.memmap(file, values.dtype, "c", offset=written, shape=values.shape)
        written += matrix.nbytes
        return torch.from_numpy(mapped)

    return write
