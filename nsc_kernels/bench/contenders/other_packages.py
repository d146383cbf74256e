"""LoRA kernels of other packages, where they are installed: ``--contenders fused,package``.

None of them knows several coefficients or our statistics. Each is called as one adapter whose rank is the sum of all,
with the coefficients multiplied into what lies between its two products, or into the up-projection: the least that a
caller could add. dlam is PyTorch's.

    vllm         ``lora_shrink`` and ``lora_expand``, the Triton kernels of its server (those of 0.33); the
                 backward is made of the same two with the factors swapped
    lorafusion   ``fused_lora_xw_sb`` and ``fused_lora_dyw_dsa`` (arXiv 2510.00206, github.com/CentML/lorafusion)
    unsloth      ``LoRA_W``, through autograd, which also makes the gradients of the factors that training needs

vllm was tried in Triton's interpreter, the other two were read and not run. Liger-Kernel has none: as of 0.8.5 it
leaves LoRA to PEFT.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..problem import Problem
from ..registry import LINEAR, Gradients, Pair, Result, Unavailable, contender
from ..shapes import Shape

HALVES = (torch.bfloat16, torch.float16)
TILE = 256  # columns: lorafusion loads A in whole tiles without a mask


def installed(package: str, also: Unavailable | None = None) -> Unavailable:
    def unavailable(device: torch.device, dtype: torch.dtype, shape: Shape) -> str | None:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
        if device.type != "cuda":
            return "runs on a GPU"
        if dtype not in HALVES:
            return "computes in bfloat16 and float16"
        return also(device, dtype, shape) if also else None

    return unavailable


def whole_tiles(device: torch.device, dtype: torch.dtype, shape: Shape) -> str | None:
    if shape.R < 16 or shape.R & (shape.R - 1):
        return f"needs ranks that add up to a power of two, at least 16, found {shape.R}"
    return f"needs d_in to be a multiple of {TILE}, found {shape.d_in}" if shape.d_in % TILE else None


def per_column(p: Problem) -> Tensor:
    """lam over the columns of the adapters."""
    return p.lam.repeat_interleave(p.shape.r)


def dlam_of(p: Problem, u: Tensor, v: Tensor) -> Tensor:
    return (u * v).sum(0, dtype=torch.float32).unflatten(0, (p.shape.K, -1)).sum(-1)


@contender("vllm", stats=False, group="package", unavailable=installed("vllm"))
def vllm(p: Problem) -> Pair:
    """Shrink and expand of its server, one adapter for all tokens."""
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

    T, R = p.shape.T, p.shape.R
    meta = LoRAKernelMeta.make(max_loras=1, max_num_tokens=T, device=p.device)
    meta.prepare_tensors(torch.zeros(T, dtype=torch.int32, device=p.device))
    about = meta.meta_args(T, True)
    ups = [p.Bt.t().contiguous()[None], p.A.t().contiguous()[None]]  # [1, d, R], of the forward and the backward
    z = p.z.detach()

    def run(x: Tensor, down: Tensor, up: Tensor, y: Tensor, add: bool) -> Tensor:
        u = torch.empty(1, T, R, dtype=torch.float32, device=p.device)
        lora_shrink(x, [down[None]], u, *about, 1.0)
        lora_expand(u * per_column(p), [up], y, *about, 0, add)
        return u[0]

    def forward() -> Result:
        y = p.base.clone()
        return Result(y, None, None, run(z, p.A, ups[0], y, True))

    def backward(u: Tensor) -> Gradients:
        dz = torch.empty_like(z)
        return dz, dlam_of(p, u, run(p.dy, p.Bt, ups[1], dz, False))

    return forward, backward


@contender(
    "lorafusion", of=LINEAR, stats=False, group="package", unavailable=installed("lorafusion", whole_tiles)
)
def lorafusion(p: Problem) -> Pair:
    """The adapters added to the layer's own product before it is written."""
    from lorafusion.ops.triton_ops.fused_lora_dyw_dsa import fused_lora_dyw_dsa
    from lorafusion.ops.triton_ops.fused_lora_xw_sb import fused_lora_xw_sb

    z, B = p.z.detach(), p.Bt.t().contiguous()
    kept = torch.ones(p.shape.T, p.shape.d_in, dtype=torch.bool, device=p.device)  # nothing is dropped

    def forward() -> Result:
        u = z @ p.A.t()
        c = (u * per_column(p)).to(p.dtype)
        return Result(fused_lora_xw_sb(x=z, w=p.W, s=c, b=B, alpha=1.0), None, None, u)

    def backward(u: Tensor) -> Gradients:
        v = p.dy @ p.Bt.t()
        c = (v * per_column(p)).to(p.dtype)
        dz = fused_lora_dyw_dsa(dy=p.dy, w=p.W, ds=c, a=p.A, dropout_p=0.0, dropout_mask=kept)
        return dz, dlam_of(p, u, v)

    return forward, backward


@contender("unsloth", of=LINEAR, stats=False, autograd=True, group="package", unavailable=installed("unsloth"))
def unsloth(p: Problem) -> Callable[[], Any]:
    """Its layer as it is trained: one more dimension, a rank of all adapters, gradients of the factors."""
    from unsloth.kernels.fast_lora import LoRA_W

    def run() -> Tensor:
        B = (p.Bt * per_column(p)[:, None]).to(p.dtype).t()
        return LoRA_W.apply(p.z[None], p.W, None, p.A, B, 1.0)[0]

    return run
