"""One direction on the emulator, held to its mirror bitwise and to float64 by the criterion of the other backends."""

from __future__ import annotations

from collections.abc import Sequence

import problems
import torch
from harness import Emulator, How
from torch import Tensor

from nsc_kernels import reference

FORWARD = ("y", "quad", "sqnorm", "u")


def hold(names: Sequence[str], ours: Sequence[Tensor | None], eager: Sequence, exact: Sequence) -> None:
    for name, found, theirs, truth in zip(names, ours, eager, exact, strict=True):
        if truth is None:
            assert found is None, f"{name} was not asked for"
        else:
            problems.assert_as_accurate(name, found, theirs, truth)


def same(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> bool:
    return all(a is b is None or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def check_forward(emulator: Emulator, p, how: How, *, base: bool = True, stats: bool = True, save_u: bool = True):
    """One forward: bitwise as the mirror computes it, and as accurate as eager torch."""
    added = p.base if base else None
    inputs = (p.z, p.A, p.Bt, p.offsets, p.lam, added)
    found = emulator.forward(how, *inputs, stats, save_u)
    assert same(found, emulator.forward(How(how.variant, how.cluster, mirror=True), *inputs, stats, save_u))
    eager, exact = (list(reference.forward(*tensors, True)) for tensors in (inputs, problems.wide(inputs)))
    kept = (True, stats, stats, save_u)
    eager, exact = ([t if keep else None for t, keep in zip(all_, kept, strict=True)] for all_ in (eager, exact))
    hold(FORWARD, found, eager, exact)
    return found


def check_backward(emulator: Emulator, p, how: How, *, need_dz: bool = True, need_dlam: bool = True, **given: bool):
    """One backward, on what is ``given``: as :func:`check_forward`."""
    inputs = problems.backward_inputs(p, **given)
    dy, u = inputs[0], inputs[3]
    found = emulator.backward(how, *inputs, need_dz, need_dlam)
    assert same(found, emulator.backward(How(how.variant, how.cluster, mirror=True), *inputs, need_dz, need_dlam))
    eager, exact = (reference.backward(*tensors, need_dz, need_dlam) for tensors in (inputs, problems.wide(inputs)))
    hold(("dz",), found[:1], eager[:1], exact[:1])
    if need_dlam:
        # A sum over tokens cancels: its rounding errors are in proportion to the sum of the absolute values.
        v = torch.zeros_like(u) if dy is None else dy.double() @ p.Bt.double().t()
        magnitude = reference.gather((u.double() * v).abs(), p.offsets)
        magnitude = magnitude if p.lam.dim() == 2 else magnitude.sum(0)
        allowed = 2 * (eager[1] - exact[1]).abs().max() + 4 * torch.finfo(torch.float32).eps * magnitude.max()
        assert (found[1] - exact[1]).abs().max() <= allowed
    else:
        assert found[1] is None
    return found
