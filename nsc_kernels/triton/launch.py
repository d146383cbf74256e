"""One launch of the kernel from tensors: outputs, workspace, counters, grid."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from ..contract import BackwardCall, ForwardCall
from ..counters import counter_pool, output_over
from .columns import columns, owner_table
from .configs import Config, Problem, choose, machine, mode_of
from .kernels import merged_lora_kernel


def _stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def launch(
    x: Tensor | None,
    w_in: Tensor,
    w_out: Tensor,
    offsets: tuple[int, ...],
    lam: Tensor,
    base: Tensor | None,
    out: Tensor | None,
    u: Tensor | None,
    quad: Tensor | None,
    sqnorm: Tensor | None,
    z: Tensor | None,
    dlam: Tensor | None,
    *,
    T: int,
    backward: bool,
    config: Config | None,
) -> None:
    """Run the kernel on T > 0 tokens; arguments as in :func:`nsc_kernels.triton.kernels.merged_lora_kernel`."""
    device = w_in.device
    R, K = offsets[-1], len(offsets) - 1
    mode = mode_of(w_in.dtype, R)
    if config is None:
        problem = Problem(T, w_in.shape[1], w_out.shape[1], R, mode, backward)
        config = choose(machine(device), problem)
        if config is None:
            raise RuntimeError(f"no configuration of {problem} fits the shared memory of {machine(device).name}")
    layout = columns(offsets, config.chunk)
    per_row = lam.dim() == 2
    sum_dlam = dlam is not None and not per_row
    tiles = -(-T // config.block_t)
    sliced = config.slices > 0
    mids = config.block_t // config.rows if sliced else 1
    programs = tiles
    parts_at = 0
    c = None
    if sliced:
        programs = tiles * (config.slices + mids + (config.out_slices if out is not None else 0))
        parts_at = config.slices * T * (R + 1)
        c = w_in.new_empty((T, R))
    floats = parts_at + (tiles * mids * (layout.padded // layout.group) if sum_dlam else 0)
    work = lam.new_empty(floats) if floats else None

    other = device.type == "cuda" and torch.cuda.current_device() != device.index
    guard: Any = torch.cuda.device(device) if other else contextlib.nullcontext()
    with guard:
        owner = None if layout.uniform else owner_table(offsets, layout.group, device)
        counters = counter_pool(device).take(2 + 3 * tiles if sliced else 2) if sliced or sum_dlam else None
        merged_lora_kernel[(programs,)](
            w_in if x is None else x,
            w_in,
            w_out,
            lam,
            base,
            out,
            u,
            quad,
            sqnorm,
            z,
            dlam,
            owner,
            work,
            c,
            counters,
            T,
            R,
            K,
            0 if x is None else w_in.shape[1],
            w_out.shape[1],
            _stride(x),
            _stride(base),
            _stride(out),
            _stride(z),
            parts_at,
            BACKWARD=backward,
            PER_ROW=per_row,
            UNIFORM=layout.uniform,
            N=layout.chunks,
            C=layout.chunk,
            G=layout.group,
            BT=config.block_t,
            BK=config.block_k,
            BN=config.block_n,
            SLICES=config.slices,
            OUT_SLICES=config.out_slices,
            ROWS=config.rows,
            EXPAND_STAGES=config.expand_stages,
            EARLY=config.early,
            WARPGROUPS=mode == "half" and machine(device).arch // 10 == 9,
            PRECISION="tf32x3" if mode == "tf32x3" else "ieee",  # 16-bit products are exact and ignore it
            num_warps=config.warps,
            num_stages=config.stages,
            maxnreg=config.registers,
            enable_fp_fusion=True,
        )


def forward(
    call: ForwardCall, *, config: Config | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """:func:`nsc_kernels.reference.forward` in one launch; ``u`` is None without ``save_u``.

    With ``reuse_base`` y is written over ``base``.
    """
    z, A, Bt, offsets, lam, base, stats, save_u, reuse_base = call
    offsets = tuple(offsets)
    T = z.shape[0]
    y = output_over(base, (T, Bt.shape[1]), z, reuse_base)
    quad = lam.new_empty((T, len(offsets) - 1)) if stats else None
    sqnorm = lam.new_empty(T) if stats else None
    u = z.new_empty((T, offsets[-1])) if save_u else None
    if T:
        launch(
            z, A, Bt, offsets, lam, base, y, u, quad, sqnorm, None, None, T=T, backward=False, config=config
        )  # fmt: skip
    return y, quad, sqnorm, u


def backward(call: BackwardCall, *, config: Config | None = None) -> tuple[Tensor | None, Tensor | None]:
    """:func:`nsc_kernels.reference.backward` in one launch; with ``reuse_base`` dz is written over ``dz_base``."""
    dy, dquad, dsqnorm, u, z, A, Bt, offsets, lam, dz_base, need_dz, need_dlam, reuse_base = call
    T = u.shape[0]
    if dsqnorm is not None and need_dz and z is None:
        raise ValueError("z must be given where sqnorm has a gradient")
    dz = output_over(dz_base, (T, A.shape[1]), u, reuse_base) if need_dz else None
    if not T:
        return dz, torch.zeros_like(lam) if need_dlam else None
    dlam = torch.empty_like(lam) if need_dlam else None
    if need_dz or need_dlam:
        launch(
            dy,
            Bt,
            A,
            tuple(offsets),
            lam,
            dz_base if need_dz else None,
            dz,
            u,
            dquad if need_dz else None,
            dsqnorm if need_dz else None,
            z if need_dz and dsqnorm is not None else None,
            dlam,
            T=T,
            backward=True,
            config=config,
        )
    return dz, dlam
