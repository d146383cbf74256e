"""The Triton kernels: one launch forward, one launch backward.

    steps.py      shrink -> mid -> expand, each on the tokens of one program
    kernels.py    the kernel: who runs the steps when, tile schedule and sliced schedule
    columns.py    the rank axis: chunks, groups, owners
    configs.py    tiles and schedule for a problem: a formula, and tables per GPU
    launch.py     outputs, workspace and the one launch

Counters that need no clearing are in :mod:`nsc_kernels.counters`, which the cuda backend uses, too.

Nothing here imports Triton until a kernel is launched.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from ..contract import BackwardCall, ForwardCall

if TYPE_CHECKING:
    from ..bank import AdapterBank

__all__ = ["warm_up"]


def warm_up(
    bank: AdapterBank,
    tokens: int | Iterable[int],
    *,
    stats: bool = True,
    base: bool = True,
    per_row: bool = False,
    training: bool = True,
) -> int:
    """Compile what calls with these numbers of tokens need, by launching each variant on one token.

    Call it before capturing a CUDA graph, which can neither compile nor allocate counters, and before timing. A bank
    of the same shape, ranks and dtype as one already warm costs nothing.

    Args:
        bank: on the device it will be used on.
        tokens: the number of tokens to come, or several; those that share a power of two share a variant.
        stats, base, per_row: whether calls will ask for statistics, pass ``base``, and pass ``lam`` per row.
        training: whether there will be a backward.

    Returns:
        How many variants were launched.

    Raises:
        TypeError: if ``tokens`` are no ints.
    """
    from .configs import Config, Problem, choose, machine, mode_of
    from .launch import backward, forward

    try:
        numbers = [operator.index(T) for T in (tokens if isinstance(tokens, Iterable) else [tokens])]
    except TypeError:
        raise TypeError(f"tokens must be an int, or several, found {tokens!r:.60}") from None

    A, Bt, offsets = bank.A, bank.Bt, bank.offsets
    z, y = A.new_zeros(1, bank.d_in), A.new_zeros(1, bank.d_out)
    lam = z.new_zeros((1, bank.K) if per_row else (bank.K,), dtype=torch.float32)
    u, quad, sqnorm = A.new_zeros(1, bank.R), lam.new_zeros(1, bank.K), lam.new_zeros(1)
    mode = mode_of(A.dtype, bank.R)

    def variants(d_in: int, d_out: int, backward: bool) -> set[Config]:
        problems = (Problem(T, d_in, d_out, bank.R, mode, backward) for T in numbers)
        return {config for config in (choose(machine(A.device), p) for p in problems) if config is not None}

    forwards = variants(bank.d_in, bank.d_out, False)
    for config in forwards:
        forward(ForwardCall(z, A, Bt, offsets, lam, y if base else None, stats, training), config=config)
    backwards = variants(bank.d_out, bank.d_in, True) if training else set()
    for config in backwards:
        dquad, dsqnorm, saved_z = (quad, sqnorm, z) if stats else (None, None, None)
        call = BackwardCall(y, dquad, dsqnorm, u, saved_z, A, Bt, offsets, lam, None, True, True)
        backward(call, config=config)
    return len(forwards) + len(backwards)
