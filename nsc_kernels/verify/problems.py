"""Random problems that the kernels are tried on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


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
        return (torch.randn(shape, generator=source, device="cpu") * scale).to(device, dtype)

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
