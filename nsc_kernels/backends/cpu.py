"""The C++ CPU kernels (csrc/cpu), one pass per direction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native, ops
from ..dispatch import Call
from . import two_gemms

ops.define("cpu_forward", ops.FORWARD_SCHEMA, ops.forward_fake)
ops.define("cpu_backward", ops.BACKWARD_SCHEMA, ops.backward_fake)

native_forward = torch.ops.nsc.cpu_forward.default
native_backward = torch.ops.nsc.cpu_backward.default


def unavailable() -> str | None:
    return native.load("nsc_cpu")


def rejects(call: Call) -> str | None:
    return None if call.device.type == "cpu" else f"serves CPU tensors, and these are on {call.device}"


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
    if not stats and two_gemms.preferred(z.dtype, z.shape[0]):
        return two_gemms.forward(z, A, Bt, offsets, lam, base, save_u)
    return native_forward(z, A, Bt, offsets, lam, base, stats, save_u)


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
    if need_dz and not need_dlam and two_gemms.preferred(u.dtype, u.shape[0]):
        return two_gemms.backward(dy, dquad, dsqnorm, u, z, A, Bt, offsets, lam, dz_base)
    return native_backward(dy, dquad, dsqnorm, u, z, A, Bt, offsets, lam, dz_base, need_dz, need_dlam)
