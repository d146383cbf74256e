"""The oracle as a backend: any device, any floating dtype, nothing to build."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import reference
from ..dispatch import Call


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
    reuse_base: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    y, quad, sqnorm, u = reference.forward(z, A, Bt, offsets, lam, base, stats)
    return y, quad, sqnorm, u if save_u else None


def backward(
    dy: Tensor | None,
    dquad: Tensor | None,
    dsqnorm: Tensor | None,
    u: Tensor,
    z: Tensor | None,
    A: Tensor,
    Bt: Tensor,
    offsets: Sequence[int],
    lam: Tensor,
    dz_base: Tensor | None,
    need_dz: bool,
    need_dlam: bool,
    reuse_base: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    return reference.backward(dy, dquad, dsqnorm, u, z, A, Bt, offsets, lam, dz_base, need_dz, need_dlam)
