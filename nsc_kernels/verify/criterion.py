"""The criterion that the kernels are held to: the reference in float64, and what eager PyTorch is off by.

docs/gpu.md derives it, and says what faults it refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .problems import wide

STEP = 16  # columns of the inner dimension that one matrix instruction adds
UNIT = torch.finfo(torch.float32).eps  # 2^-23, what is lost at most by cutting off instead of rounding
FORWARD, BACKWARD = ("y", "quad", "sqnorm", "u"), ("dz", "dlam")
Judgement = dict[str, tuple[float, float]]  # of each result the largest error and its bound


def lost(width: int, dtype: torch.dtype) -> float:
    """What a sum over ``width`` columns may lose in a matrix unit that cuts off, relative to the sum's magnitude.

    Every step of 16 columns cuts the accumulator off once, between nothing and one unit in its last place: half a unit
    on average, and the average of many steps is near it (three standard deviations of a uniform distribution). float32
    does not go through such a unit, or is compared with eager torch at the same precision.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return 0.0
    steps = -(-width // STEP)
    return (steps / 2 + 3 * (steps / 12) ** 0.5) * UNIT


def _largest(t: Tensor | float) -> float:
    if not isinstance(t, Tensor):
        return t
    return float(t.abs().max()) if t.numel() else 0.0


def _judge(
    names: Sequence[str], found: Sequence[Any], eager: Sequence[Any], exact: Sequence[Any], also: dict[str, float]
) -> Judgement:
    """Largest error against float64, and its bound: twice that of eager torch in the same dtype and rounding points.

    And 4 float32 units in the last place of the largest entry: where eager torch is exact by luck (one product, one
    adapter) another order of summation is not an error. And what the results may ``also`` be off by.
    """
    judged = {}
    for name, ours, theirs, truth in zip(names, found, eager, exact, strict=True):
        if ours is None:
            continue
        if ours.shape != truth.shape:
            raise ValueError(f"{name} has shape {tuple(ours.shape)}, expected {tuple(truth.shape)}")
        bound = 2 * _largest(theirs.double() - truth) + 4 * UNIT * _largest(truth) + also.get(name, 0.0)
        judged[name] = (_largest(ours.double() - truth), bound)
    return judged


def _answers(function: Callable[..., Any], inputs: Sequence[Any], *needs: bool) -> tuple[Any, Any]:
    """Eager torch's, and the right ones."""
    return function(*inputs, *needs), function(*wide(inputs), *needs)


def judge_forward(found: Sequence[Tensor | None], *inputs: Any) -> Judgement:
    """A forward's results on ``z, A, Bt, offsets, lam, base``, None for what was not asked for.

    Beyond eager torch, ``u`` may be off by what its sum over d_in may lose, ``quad = sum u^2`` by twice as much in
    proportion, and ``y`` by that and what its sum over R may lose of ``|base| + sum |c| |w|``.
    """
    z, A, Bt, offsets, _, base = inputs
    eager, exact = _answers(reference.forward, inputs, True)
    in_shrink, in_expand = lost(A.shape[1], z.dtype), lost(A.shape[0], z.dtype)
    also = {}
    if in_shrink:
        magnitude = (reference.spread(wide(inputs)[4], offsets) * exact[3]).abs() @ Bt.double().abs()
        magnitude = magnitude if base is None else magnitude + base.double().abs()
        also = {
            "u": in_shrink * _largest(exact[3]),
            "quad": 2 * in_shrink * _largest(exact[1]),
            "y": (in_shrink + in_expand) * _largest(magnitude),
        }
    return _judge(FORWARD, found, eager, exact, also)


def judge_backward(
    found: Sequence[Tensor | None], *inputs: Any, need_dz: bool = True, need_dlam: bool = True
) -> Judgement:
    """A backward's results on ``dy, dquad, dsqnorm, u, z, A, Bt, offsets, lam, dz_base``.

    ``dz`` is as ``y`` in :func:`judge_forward`. ``dlam`` adds terms u v of both signs, many more than are left of them:
    its rounding errors are in proportion to ``sum |u v|``. What v loses is always towards zero, which shrinks dlam and,
    the signs of the terms being as good as drawn, moves it by no more than a few ``sqrt(sum (u v)^2)``.
    """
    dy, dquad, dsqnorm, u, z, A, Bt, offsets, lam, dz_base = wide(inputs)
    eager, exact = _answers(reference.backward, inputs, need_dz, need_dlam)
    dtype, also = inputs[5].dtype, {}
    in_shrink, in_expand = lost(Bt.shape[1], dtype), lost(A.shape[0], dtype)
    v = torch.zeros_like(u) if dy is None else reference.shrink(dy, Bt)
    if need_dlam:
        terms, squares = (reference.gather(t, offsets) for t in ((u * v).abs(), (u * v).square()))
        if lam.dim() == 1:
            terms, squares = terms.sum(0), squares.sum(0)
        also["dlam"] = 4 * UNIT * _largest(terms) + in_shrink * _largest(exact[1].abs() + 2 * squares.sqrt())
    if need_dz and in_shrink:
        c = (reference.spread(lam, offsets) * v).abs()
        if dquad is not None:
            c = c + (2 * reference.spread(dquad, offsets) * u).abs()
        magnitude = c @ A.abs()
        if dz_base is not None:
            magnitude = magnitude + dz_base.abs()
        if dsqnorm is not None:
            magnitude = magnitude + (2 * dsqnorm[:, None] * z).abs()
        also["dz"] = (in_shrink + in_expand) * _largest(magnitude)
    return _judge(BACKWARD, found, eager, exact, also)


def faults(judged: Judgement) -> list[str]:
    """In words, what is off by more than its bound; what is not a number is."""
    return [f"{n}: error {e:.3g}, bound {b:.3g}" for n, (e, b) in judged.items() if not e <= b]
