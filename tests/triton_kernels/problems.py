"""Random problems, and the criterion that the kernels are held to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from nsc_kernels import reference
from nsc_kernels.contract import BackwardCall, ForwardCall
from nsc_kernels.triton import launch
from nsc_kernels.triton.configs import Config


@dataclass
class Problem:
    z: Tensor
    A: Tensor
    Bt: Tensor
    offsets: tuple[int, ...]
    lam: Tensor
    base: Tensor
    dy: Tensor
    dquad: Tensor
    dsqnorm: Tensor
    dz_base: Tensor

    @property
    def T(self) -> int:
        return self.z.shape[0]


def problem(
    T: int,
    d_in: int,
    d_out: int,
    ranks: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    per_row: bool = False,
    seed: int = 0,
) -> Problem:
    """Unit-variance tokens and gradients; whitened rows of A, and B scaled so that y has about z's size."""
    source = torch.Generator().manual_seed(seed)
    K, R = len(ranks), sum(ranks)

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=source) * scale).to(device, dtype)

    f32 = torch.float32
    return Problem(
        z=normal(T, d_in),
        A=normal(R, d_in, scale=d_in**-0.5),
        Bt=normal(R, d_out, scale=max(R, 1) ** -0.5),
        offsets=tuple(accumulate(ranks, initial=0)),
        lam=normal(*((T, K) if per_row else (K,)), dtype=f32),
        base=normal(T, d_out),
        dy=normal(T, d_out),
        dquad=normal(T, K, dtype=f32),
        dsqnorm=normal(T, dtype=f32),
        dz_base=normal(T, d_in),
    )


def wide(values: Sequence[object]) -> list[Any]:
    """``values`` with tensors in float64."""
    return [t.double() if isinstance(t, Tensor) else t for t in values]


def backward_inputs(
    p: Problem, *, dy: bool = True, dquad: bool = True, dsqnorm: bool = True, dz_base: bool = False
) -> tuple[Any, ...]:
    """What a backward takes before its needs, with the eager forward's u; None for what is not given."""
    return (
        p.dy if dy else None,
        p.dquad if dquad else None,
        p.dsqnorm if dsqnorm else None,
        reference.forward(p.z, p.A, p.Bt, p.offsets, p.lam, None, False)[3],
        p.z if dsqnorm else None,
        p.A,
        p.Bt,
        p.offsets,
        p.lam,
        p.dz_base if dz_base else None,
    )


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
        assert ours.shape == truth.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
        bound = 2 * _largest(theirs.double() - truth) + 4 * UNIT * _largest(truth) + also.get(name, 0.0)
        judged[name] = (_largest(ours.double() - truth), bound)
    return judged


def judge_forward(found: Sequence[Tensor | None], *inputs: Any) -> Judgement:
    """A forward's results on ``z, A, Bt, offsets, lam, base``, None for what was not asked for.

    Beyond eager torch, ``u`` may be off by what its sum over d_in may lose, ``quad = sum u^2`` by twice as much in
    proportion, and ``y`` by that and what its sum over R may lose of ``|base| + sum |c| |w|``.
    """
    z, A, Bt, offsets, _, base = inputs
    eager, exact = (reference.forward(*values, True) for values in (inputs, wide(inputs)))
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
    eager, exact = (reference.backward(*values, need_dz, need_dlam) for values in (inputs, wide(inputs)))
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


def assert_right(judged: Judgement) -> None:
    for name, (error, bound) in judged.items():
        assert error <= bound, f"{name}: error {error:.3g}, bound {bound:.3g}"


def check_forward(
    p: Problem, config: Config | None = None, *, base: bool = True, stats: bool = True, save_u: bool = True
) -> tuple[Tensor | None, ...]:
    """Run and compare one forward; returns its results."""
    inputs = (p.z, p.A, p.Bt, p.offsets, p.lam, p.base if base else None)
    found = launch.forward(ForwardCall(*inputs, stats, save_u), config=config)
    assert [t is not None for t in found] == [True, stats, stats, save_u]
    assert_right(judge_forward(found, *inputs))
    return found


def check_backward(
    p: Problem,
    config: Config | None = None,
    *,
    need_dz: bool = True,
    need_dlam: bool = True,
    **given: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Run and compare one backward on what is ``given`` (:func:`backward_inputs`); returns its results."""
    inputs = backward_inputs(p, **given)
    found = launch.backward(BackwardCall(*inputs, need_dz, need_dlam), config=config)
    assert [t is not None for t in found] == [need_dz, need_dlam]
    assert_right(judge_backward(found, *inputs, need_dz=need_dz, need_dlam=need_dlam))
    return found
