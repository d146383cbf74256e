"""The CUDA C++ kernels (csrc/cuda): one launch per direction, a thread block cluster per tile of tokens.

bfloat16 and float16 on GPUs with clusters (compute capability 9.0); what they do not serve, Triton does.
"""

from __future__ import annotations

from functools import cache
from typing import overload

import torch
from torch import Tensor

from .. import native, ops, verified_hardware
from ..contract import BackwardCall, Call, ForwardCall
from ..counters import counter_pool, output_over

MAX_RANK = 512
MAX_ADAPTERS = 64
MULTIPLE = 8  # of d, in elements: rows are copied in pieces of 16 bytes
LEAST_TILE = 64  # tokens: bounds the number of tiles, and with it the workspace
DTYPES = (torch.bfloat16, torch.float16)
AUTOMATIC = -1  # variant: chosen by the launcher
# Variants by number, as csrc/cuda/geometry.h has them: padded ranks and tokens per tile. First those with mma.sync and
# cp.async, then those with wgmma and TMA.
VARIANTS = [(r, 64) for r in (32, 64, 96, 128, 192, 256, 320, 384, 512)] + [
    (r, 128) for r in (32, 64, 96, 128, 192, 256)
]
WARPGROUP_VARIANTS = [(r, 64) for r in (64, 128, 192, 256, 320, 384, 512)] + [
    (r, 128) for r in (32, 64, 96, 128, 192, 256)
]

_OPTIONS = "int variant=-1, int cluster=0"
ops.define(
    "cuda_forward",
    "(Tensor z, Tensor A, Tensor Bt, int[] offsets, Tensor lam, Tensor? base, Tensor(a!) y, Tensor(b!)? quad,"
    f" Tensor(c!)? sqnorm, Tensor(d!)? u, {_OPTIONS}) -> ()",
    lambda *args, **kwargs: None,
)
ops.define(
    "cuda_backward",
    "(Tensor? dy, Tensor? dquad, Tensor? dsqnorm, Tensor u, Tensor? z, Tensor A, Tensor Bt, int[] offsets, Tensor lam,"
    f" Tensor? dz_base, Tensor(a!)? dz, Tensor(b!)? dlam, Tensor(c!)? parts, Tensor(d!)? counter, {_OPTIONS}) -> ()",
    lambda *args, **kwargs: None,
)

native_forward = torch.ops.nsc.cuda_forward.default
native_backward = torch.ops.nsc.cuda_backward.default


def unavailable() -> str | None:
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device"
    return native.load("nsc_cuda")


@cache
def _unsupported(index: int) -> str | None:
    return native.cuda_unsupported(index)


def rejects(call: Call) -> str | None:
    if call.device.type != "cuda":
        return f"runs on CUDA devices, not on {call.device.type}"
    if call.dtype not in DTYPES:
        return f"computes in bfloat16 and float16, not in {call.dtype}"
    if call.d_in % MULTIPLE or call.d_out % MULTIPLE:
        return f"needs d_in and d_out to be multiples of {MULTIPLE}, found {call.d_in} and {call.d_out}"
    if call.offsets[-1] > MAX_RANK:
        return f"the ranks add up to {call.offsets[-1]}, more than {MAX_RANK}"
    if len(call.offsets) - 1 > MAX_ADAPTERS:
        return f"{len(call.offsets) - 1} adapters, more than {MAX_ADAPTERS}"
    return _unsupported(torch.cuda.current_device() if call.device.index is None else call.device.index)


def unproven(call: Call) -> str | None:
    major, minor = torch.cuda.get_device_capability(call.device)
    return verified_hardware.unproven(f"sm_{10 * major + minor}", "cuda")


@overload
def aligned(t: Tensor) -> Tensor: ...
@overload
def aligned(t: Tensor | None) -> Tensor | None: ...
def aligned(t: Tensor | None) -> Tensor | None:
    """``t`` itself if its rows can be copied in pieces of 16 bytes, else a copy that can."""
    if t is None or (t.data_ptr() % 16 == 0 and (t.shape[0] <= 1 or t.stride(0) % MULTIPLE == 0)):
        return t
    return t.clone(memory_format=torch.contiguous_format)


def variants_of(R: int) -> list[int]:
    """The variants that serve R with the least padding, one of each family and number of tokens per tile."""
    found = []
    for first, family in ((0, VARIANTS), (len(VARIANTS), WARPGROUP_VARIANTS)):
        for tokens in (64, 128):
            fitting = [(r, first + i) for i, (r, t) in enumerate(family) if t == tokens and r >= R]
            found += [min(fitting)[1]] if fitting else []
    return found


def forward(
    call: ForwardCall, *, variant: int = AUTOMATIC, cluster: int = 0
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """:func:`nsc_kernels.reference.forward` in one launch; ``u`` is None without ``save_u``."""
    z, A, Bt, offsets, lam, base, stats, save_u, reuse_base = call
    T = z.shape[0]
    z, base = aligned(z), aligned(base)
    y = output_over(base, (T, Bt.shape[1]), z, reuse_base)
    quad = lam.new_empty((T, len(offsets) - 1)) if stats else None
    sqnorm = lam.new_empty(T) if stats else None
    u = z.new_empty((T, A.shape[0])) if save_u else None
    native_forward(z, aligned(A), aligned(Bt), offsets, lam, base, y, quad, sqnorm, u, variant, cluster)
    return y, quad, sqnorm, u


def backward(call: BackwardCall, *, variant: int = AUTOMATIC, cluster: int = 0) -> tuple[Tensor | None, Tensor | None]:
    """:func:`nsc_kernels.reference.backward` in one launch."""
    dy, dquad, dsqnorm, u, z, A, Bt, offsets, lam, dz_base, need_dz, need_dlam, reuse_base = call
    T = u.shape[0]
    if dsqnorm is not None and need_dz and z is None:
        raise ValueError("z must be given where sqnorm has a gradient")
    dz_base = aligned(dz_base) if need_dz else None
    dz = output_over(dz_base, (T, A.shape[1]), u, reuse_base) if need_dz else None
    dlam = torch.empty_like(lam) if need_dlam else None
    if not T:
        return dz, None if dlam is None else dlam.zero_()
    parts = counter = None
    if need_dlam and lam.dim() == 1:
        parts = lam.new_empty(lam.shape[0] * -(-T // LEAST_TILE))
        counter = counter_pool(u.device).take(1)
    native_backward(
        aligned(dy),
        dquad if need_dz else None,
        dsqnorm if need_dz else None,
        u,
        aligned(z) if need_dz and dsqnorm is not None else None,
        aligned(A),
        aligned(Bt),
        offsets,
        lam,
        dz_base,
        dz,
        dlam,
        parts,
        counter,
        variant,
        cluster,
    )
    return dz, dlam
