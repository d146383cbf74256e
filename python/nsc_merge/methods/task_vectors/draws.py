"""Which entries DARE drops: random numbers that belong to an entry, whoever asks for it, in whatever order.

The generator is Philox-4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC
2011). Its key is made from the seed and the names of the task and the module; its counter is the entry's place. So a
mask is never kept: whoever needs it again draws it again, a tile at a time, in any number of threads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from nsc_kernels import entries

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
# Sixteen counters, of four words each, serve as many columns as these.
_COLUMNS = 64


def key_of(seed: int, *names: str) -> int:
    """The key of a generator: 64 bits, as a signed number."""
    digest = hashlib.sha256("\0".join([str(seed), *names]).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def threshold_of(drop: float) -> int:
    """The random number of 32 bits below which an entry is dropped with the probability ``drop``, which is below 1."""
    return min(round(drop * 2**32), _WORD)


def kept(shape: Sequence[int], key: int, threshold: int) -> Tensor:
    """Which entries of a tensor stay, as bool; all dimensions but the last count as rows."""
    columns = shape[-1] if shape else 1
    rows = torch.Size(shape[:-1]).numel()
    draw = drawn_in_pytorch if entries.unavailable() else entries.drawn
    return draw(rows, columns, key, threshold).view(*shape)


def drawn_in_pytorch(rows: int, columns: int, key: int, threshold: int) -> Tensor:
    """What :func:`nsc_kernels.entries.drawn` computes, to the bit: its definition, which needs no library.

    A row has blocks of 64 columns. The counters of a block are (16 block + i, row), i from 0 to 15; the first words of
    the sixteen belong to its first 16 columns, the second words to the next, and so on.
    """
    blocks = -(-columns // _COLUMNS)
    row = torch.arange(rows, device="cpu")[:, None, None].expand(rows, blocks, 16)
    column = torch.arange(16 * blocks, device="cpu").view(1, blocks, 16).expand(rows, blocks, 16)
    words = philox((column, row & _WORD, row >> 32, torch.zeros_like(row)), key)
    return torch.stack(words, 2).view(rows, blocks * _COLUMNS)[:, :columns] >= threshold


def philox(counter: Sequence[Tensor], key: int) -> list[Tensor]:
    """Four random words of 32 bits for each counter of four words, all of them as int64."""
    c = list(counter)
    keys = [key & _WORD, key >> 32 & _WORD]
    for _ in range(_ROUNDS):
        # Products of 64 bits wrap around to the same bits whether they are signed or not.
        products = [multiplier * word for multiplier, word in zip(_MULTIPLIERS, c[::2], strict=True)]
        high, low = ([product >> shift & _WORD for product in products] for shift in (32, 0))
        c = [high[1] ^ c[1] ^ keys[0], low[1], high[0] ^ c[3] ^ keys[1], low[0]]
        keys = [(word + step) & _WORD for word, step in zip(keys, _KEY_STEPS, strict=True)]
    return c
