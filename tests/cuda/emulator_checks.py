"""One direction on the emulator, held to its mirror bitwise and to float64 by the criterion of the other backends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from given import backward_inputs
from harness import Emulator, How
from torch import Tensor

from nsc_kernels.verify.criterion import faults, judge_backward, judge_forward


def same(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> bool:
    return all(a is b is None or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def check_forward(emulator: Emulator, p, how: How, *, base: bool = True, stats: bool = True, save_u: bool = True):
    """One forward: bitwise as the mirror computes it, and as accurate as eager torch."""
    inputs = (p.z, p.A, p.Bt, p.offsets, p.lam, p.base if base else None)
    found = emulator.forward(how, *inputs, stats, save_u)
    assert same(found, emulator.forward(replace(how, mirror=True), *inputs, stats, save_u))
    assert [t is not None for t in found] == [True, stats, stats, save_u]
    assert not faults(judge_forward(found, *inputs))
    return found


def check_backward(emulator: Emulator, p, how: How, *, need_dz: bool = True, need_dlam: bool = True, **given: bool):
    """One backward, on what is ``given``: as :func:`check_forward`."""
    inputs = backward_inputs(p, **given)
    found = emulator.backward(how, *inputs, need_dz, need_dlam)
    assert same(found, emulator.backward(replace(how, mirror=True), *inputs, need_dz, need_dlam))
    assert [t is not None for t in found] == [need_dz, need_dlam]
    assert not faults(judge_backward(found, *inputs, need_dz=need_dz, need_dlam=need_dlam))
    return found
