"""Random problems, and the criterion that the kernels are held to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from nsc_kernels import reference
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


def errors(found: Tensor, eager: Tensor, exact: Tensor) -> tuple[float, float]:
    """Largest error of ``found`` against float64, and what it may be: twice that of eager torch in the same dtype.

    With the same rounding points. The floor is 4 float32 units in the last place of the largest entry: where eager
    torch is exact by luck (one product, one adapter) a different order of summation is not an error.
    """
    assert found.shape == exact.shape, f"shape {tuple(found.shape)}, expected {tuple(exact.shape)}"
    if not exact.numel():
        return 0.0, 0.0
    floor = 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    return float((found.double() - exact).abs().max()), float(2 * (eager.double() - exact).abs().max() + floor)


def assert_as_accurate(name: str, found: Tensor, eager: Tensor, exact: Tensor) -> None:
    error, bound = errors(found, eager, exact)
    assert error <= bound, f"{name}: error {error:.3g}, bound {bound:.3g}"


def check_forward(
    p: Problem, config: Config | None = None, *, base: bool = True, stats: bool = True, save_u: bool = True
) -> tuple[Tensor | None, ...]:
    """Run and compare one forward; returns its results."""
    inputs = (p.z, p.A, p.Bt, p.offsets, p.lam, p.base if base else None)
    found = launch.forward(*inputs, stats, save_u, config)
    eager, exact = (reference.forward(*tensors, True) for tensors in (inputs, wide(inputs)))
    asked = {"y": True, "quad": stats, "sqnorm": stats, "u": save_u}
    for (name, wanted), ours, theirs, truth in zip(asked.items(), found, eager, exact, strict=True):
        if wanted:
            assert_as_accurate(name, ours, theirs, truth)
        else:
            assert ours is None, f"{name} was not asked for"
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
    found = launch.backward(*inputs, need_dz, need_dlam, config)
    eager, exact = (reference.backward(*tensors, need_dz, need_dlam) for tensors in (inputs, wide(inputs)))
    for name, ours, theirs, truth in zip(("dz", "dlam"), found, eager, exact, strict=True):
        if truth is None:
            assert ours is None, f"{name} was not asked for"
        else:
            assert_as_accurate(name, ours, theirs, truth)
    return found
