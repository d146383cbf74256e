"""The oracle as a backend: any device, any floating dtype, nothing to build."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import reference
from .registry import Call


def unavailable() -> str | None:
    return None


def rejects(call: Call) -> str | None:
    return None


def unproven(call: Call) -> str | None:
    return None


def forward(
    z: Tensor,
    A: Tensor,
    Bt: Tensor,
    offsets: Sequence[int],
    lam: Tensor,
    base: Tensor | None,
    stats: bool,
    save_u: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    y, quad, sqnorm, u = reference.forward(z, A, Bt, offsets, lam, base, stats)
    return y, quad, sqnorm, u if save_u else None


backward = reference.backward
