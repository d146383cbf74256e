"""What a backend is, and the records that it is called with.

Tensors are as in :mod:`nsc_kernels.reference`, which says what is computed from them; this file says how it is asked
for. A record and not a list of arguments, so that what stands between the operator and a kernel hands it on whole.
Named tuples, because the smallest call would notice anything slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Call(NamedTuple):
    """What a backend is told about a call before it accepts it."""

    device: torch.device
    dtype: torch.dtype
    T: int
    d_in: int
    d_out: int
    offsets: tuple[int, ...]


class ForwardCall(NamedTuple):
    """One forward: the arguments of :func:`nsc_kernels.reference.forward` in its order, and how to run it.

    The first eight are the arguments of the ops, in the order of their schema.

    ``save_u`` asks for ``u``. ``reuse_base`` permits, and does not oblige, a backend to write ``y`` over ``base`` and
    return that tensor: nobody else holds it.
    """

    z: Tensor
    A: Tensor
    Bt: Tensor
    offsets: Sequence[int]
    lam: Tensor
    base: Tensor | None
    stats: bool
    save_u: bool
    reuse_base: bool = False


class BackwardCall(NamedTuple):
    """One backward: the arguments of :func:`nsc_kernels.reference.backward` in its order, and how to run it.

    The first twelve are the arguments of the ops, in the order of their schema.

    ``reuse_base`` permits, and does not oblige, a backend to write ``dz`` over ``dz_base`` and return that tensor:
    nobody else holds it.
    """

    dy: Tensor | None
    dquad: Tensor | None
    dsqnorm: Tensor | None
    u: Tensor
    z: Tensor | None
    A: Tensor
    Bt: Tensor
    offsets: Sequence[int]
    lam: Tensor
    dz_base: Tensor | None
    need_dz: bool
    need_dlam: bool
    reuse_base: bool = False


class Backend(Protocol):
    """What a backend module provides. It may assume z, base, dy and dz_base of unit inner stride, the rest contiguous.

    What was not asked for (``u`` without ``save_u``, the statistics without ``stats``, a gradient that is not needed)
    is returned as None or as an empty tensor.
    """

    def unavailable(self) -> str | None:
        """Why this backend cannot run in this process, or None."""

    def rejects(self, call: Call) -> str | None:
        """Why this backend cannot serve a call, or None. Only asked of an available backend."""

    def unproven(self, call: Call) -> str | None:
        """Why the automatic choice must pass over a call that :meth:`rejects` lets through, or None.

        For kernels that have not passed on the hardware at hand at their current source.
        """

    def forward(self, call: ForwardCall) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """``y, quad, sqnorm, u``."""

    def backward(self, call: BackwardCall) -> tuple[Tensor | None, Tensor | None]:
        """``dz, dlam``."""
