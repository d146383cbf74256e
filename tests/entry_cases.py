"""Random updates of small whole numbers, whose products and sums are exact, and what their entries should become."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from nsc_kernels import entries
from nsc_kernels.entries import ALL, Dropping, Entries, Trimming

# Tiles have 8 rows and 512 columns, strips 64 rows, random numbers blocks of 64 columns.
ROWS, COLUMNS = (1, 8, 9, 65), (1, 16, 63, 64, 65, 511, 513, 700)


def problem(seed: int) -> Entries:
    pick = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    rows, columns, K = pick.choice(ROWS), pick.choice(COLUMNS), pick.choice((1, 2, 5))

    def whole(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator).float()

    ranks = [pick.choice((0, 1, 4, 17)) for _ in range(K)]
    A, B = [whole(rank, columns) for rank in ranks], [whole(rows, rank) for rank in ranks]
    one = Entries.of(A, B, [pick.choice((1.0, 2.0, -0.5)) for _ in ranks])
    if pick.random() < 0.5:
        keys = tuple(pick.getrandbits(64) - (1 << 63) for _ in ranks)
        one = replace(one, dropping=Dropping(keys, round(pick.choice((0.1, 0.5, 0.9)) * 2**32), (2.0,) * K))
    if pick.random() < 0.7:
        last = tuple(pick.choice((ALL, -1, pick.randrange(rows * columns))) for _ in ranks)
        least = tuple(pick.choice((0.0, 1.0, 3.0)) for _ in ranks)
        one = replace(one, trimming=Trimming(least, last, pick.random() < 0.5))
    return one


def words(rows: int, columns: int, key: int) -> np.ndarray:
    """Philox-4x32-10, as its paper has it, and which word is whose."""
    row, block, lane = np.meshgrid(np.arange(rows), np.arange(-(-columns // 64)), np.arange(16), indexing="ij")
    c = [(16 * block + lane).astype(np.uint64), row.astype(np.uint64), np.zeros_like(row, np.uint64)]
    c.append(c[2])
    k0, k1 = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    for _ in range(10):
        first, second = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        high, low = np.uint64(32), np.uint64(0xFFFFFFFF)
        c = [second >> high ^ c[1] ^ np.uint64(k0), second & low, first >> high ^ c[3] ^ np.uint64(k1), first & low]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, 2).reshape(rows, -1)[:, :columns]


def updates(one: Entries, *, dropped: bool = True) -> list[Tensor]:
    """The tasks' updates, trimmed and dropped; or as they are before dropping."""

    def trimmed(update: Tensor, k: int) -> Tensor:
        assert one.trimming is not None
        least, numbers = one.trimming.least[k], torch.arange(update.numel()).view(update.shape)
        stays = (update.abs() > least) | (update.abs() == least) & (numbers <= one.trimming.last[k])
        return torch.where(stays, update, 0.0)

    found = []
    for k in range(one.tasks):
        rows = slice(one.offsets[k], one.offsets[k + 1])
        update = one.B[:, rows] @ one.A[rows]
        if one.trimming is not None and one.trimming.first:
            update = trimmed(update, k)
        if dropped and one.dropping is not None:
            kept = torch.from_numpy(words(*one.shape, one.dropping.keys[k]) >= one.dropping.threshold)
            update = update * kept * one.dropping.multipliers[k]
        if one.trimming is not None and not one.trimming.first and dropped:
            update = trimmed(update, k)
        found.append(update)
    return found


def check(seed: int) -> None:
    """Every function on one problem, to the bit."""
    one, pick = problem(seed), random.Random(seed)
    expected = updates(one)
    stack = torch.stack(expected)
    equal(entries.added(one), stack.sum(0))
    before = torch.stack(updates(one, dropped=False)).abs().sum((1, 2))
    if one.trimming is None or one.trimming.first:
        equal(entries.sums(one), torch.stack([before, stack.abs().sum((1, 2))], 1).double())

    patterns = stack.abs().contiguous().view(torch.int32).flatten(1)
    upper = torch.stack([torch.bincount(row >> 16, minlength=entries.UPPER_BINS + 1) for row in patterns])
    zeros = (patterns == 0).sum(1)
    upper[:, 0] -= zeros
    upper[:, -1] = zeros
    equal(entries.upper_counts(one), upper)
    sought = [pick.choice((-1, 0, 0x3F80, 0x4040)) for _ in expected]
    lower = [
        torch.bincount(row[row >> 16 == half] & 0xFFFF, minlength=entries.LOWER_BINS)
        for row, half in zip(patterns, sought, strict=True)
    ]
    equal(entries.lower_counts(one, sought), torch.stack(lower))
    if one.trimming is None:
        equal(entries.equals(one, [1.0] * one.tasks), (stack.abs() == 1.0).sum(2))

    for sign in entries.VOTES:
        weights = [pick.choice((1.0, -1.0, 2.0, 0.0)) for _ in expected]
        weighted = torch.tensor(weights)[:, None, None]
        votes = {"sum": stack, "weighted": weighted * stack, "count": stack.sign()}[sign]
        total, tie = votes.sum(0), pick.choice((1.0, -1.0))
        elected = torch.where(total == 0, tie, total.sign())
        agree = votes.sign() == elected
        for aggregate in entries.DIVISORS:
            divisor = (agree * (1.0 if aggregate == "mean" else weighted)).sum(0)
            divisor = torch.ones(()) if aggregate == "sum" else divisor
            merged = (stack * agree * weighted).sum(0) / divisor.where(divisor != 0, 1.0)
            found = entries.elected(one, weights, sign, aggregate, tie)
            assert found.merged is not None
            equal(found.merged, merged)
            assert found.cancelled == bool(((total == 0) & (votes != 0)).any())
            assert found.balance == int(total.sign().sum())

    signs = torch.where(stack.sum(0) > 0, 1.0, -1.0)
    unified = (stack * signs).clamp(min=0).amax(0) * signs
    alike = [unified * (update * signs > 0) for update in expected]
    equal(entries.unified(one), unified)
    magnitudes = [part.abs().sum((1, 2)).double() for part in (stack, torch.stack(alike))]
    equal(entries.unified_sums(one), torch.stack(magnitudes, 1))
    task, row = pick.randrange(one.tasks), pick.randrange(one.shape[0])
    equal(entries.masked(one.only(task), unified, 0.7), 0.7 * alike[task])
    equal(entries.added(one.only(task)), expected[task])
    if one.trimming is None:
        equal(entries.added(one.only(task, row)), expected[task][row : row + 1])


def equal(found: Tensor, expected: Tensor) -> None:
    assert torch.equal(found, expected), f"{int((found != expected).sum())} of {expected.numel()} differ"
