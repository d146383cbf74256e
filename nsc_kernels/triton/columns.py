"""How the packed rank axis is laid out for the kernel: N chunks of C columns, each of groups with one owner."""

from __future__ import annotations

import itertools
from functools import cache, lru_cache
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from ..counters import persistent

MIN_CHUNK = 16  # the least extent of a matrix instruction's operand


class Columns(NamedTuple):
    """R columns in ``chunks`` chunks of ``chunk``; every ``group`` consecutive columns have one owner.

    ``uniform``: group k is all of adapter k, so that no table of owners is needed.
    """

    chunks: int
    chunk: int
    group: int
    uniform: bool

    @property
    def padded(self) -> int:
        return self.chunks * self.chunk


def chunk_size(R: int) -> int:
    """The power of two that R columns are cut into.

    64 or 128, whichever pads R less: a matrix instruction of 128 columns reads its other operand from shared memory
    half as often per product as one of 64, so 128 where they are equal. Smaller R is one chunk.
    """
    if R <= 64:
        return max(1 << max(R - 1, 0).bit_length(), MIN_CHUNK)
    return 128 if -(-R // 128) * 128 == -(-R // 64) * 64 else 64


@lru_cache(maxsize=4096)
def columns(offsets: tuple[int, ...], chunk: int) -> Columns:
    """The layout for these adapters in chunks of ``chunk``, a power of two."""
    R = offsets[-1]
    divisor = gcd(*offsets)
    group = min(divisor & -divisor, chunk) if divisor else chunk
    uniform = all(b - a == group for a, b in itertools.pairwise(offsets))
    return Columns(max(-(-R // chunk), 1), chunk, group, uniform)


@cache  # without a limit: graphs hold the addresses
def owner_table(offsets: tuple[int, ...], group: int, device: torch.device) -> Tensor:
    """Adapter of each group of columns, int32 on ``device``, which is the current device if it is a GPU."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the first call for a bank with unequal ranks copies a table to the GPU, which a CUDA graph cannot "
            "capture: make one call (or nsc_kernels.triton.warm_up) before the capture"
        )
    owner = [k for k in range(len(offsets) - 1) for _ in range(offsets[k], offsets[k + 1], group)]
    return persistent(lambda: torch.tensor(owner or [0], dtype=torch.int32, device=device), device)
