"""LoRA kernels of other packages, where they are installed: ``--contenders fused,package``.

None of them knows several coefficients or our statistics. Each is called as one adapter whose rank R is the sum of all;
the coefficients go into what lies between its two products, or into the up-projection where the package hides that.

    vllm         ``lora_shrink`` and ``lora_expand``, the Triton kernels of its server, in both directions. It keeps the
                 address of every weight it has seen: one shape per process, as the command measures
    lorafusion   ``fused_lora_xw_sb`` and ``fused_lora_dyw_dsa`` (arXiv 2510.00206): [z, c] [W, B] in one product. Its
                 tiles are for small ranks; from R = 64 on they are ours, its own with fewer stages or columns
    unsloth      ``LoRA_W``, through autograd, which also makes the gradients of the factors that training needs.
                 Importing it changes torch and transformers, in the process that measures the shape
    unsloth_matmul   the ``matmul_lora`` under it, in both directions

Liger-Kernel has none: as of 0.8.5 it leaves LoRA to PEFT. vLLM 0.33, LoRAFusion at c48d7fd and unsloth 2026.10.9 were
called at small sizes on a CPU, in Triton's interpreter where they have kernels, and were right; none was run on a GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..problem import Problem
from ..registry import LINEAR, Gradients, Pair, Result, Unavailable, contender
from ..shapes import Shape
from .eager import weighted

HALVES = (torch.bfloat16, torch.float16)
TILE = 256  # columns that lorafusion's backward reads at a time, unmasked
MOST = 256  # rank that its tiles can hold, with the shared memory of an A100 or H100


def needs(*modules: str, also: Callable[[Shape], str | None] | None = None) -> Unavailable:
    def unavailable(device: torch.device, dtype: torch.dtype, shape: Shape) -> str | None:
        missing = next((module for module in modules if importlib.util.find_spec(module) is None), None)
        if missing is not None:
            return f"{missing} is not installed"
        if device.type != "cuda":
            return "runs on a GPU"
        if dtype not in HALVES:
            return "computes in bfloat16 and float16"
        return also(shape) if also else None

    return unavailable


def scaled(p: Problem, lam: Tensor) -> Tensor:
    """``[R, d_out]``: the up-projection with lam in it."""
    return (p.Bt.unflatten(0, (p.shape.K, -1)) * lam[:, None, None]).flatten(0, 1).to(p.dtype)


def dlam_of(p: Problem, u: Tensor, v: Tensor) -> Tensor:
    return (u * v).sum(0, dtype=torch.float32).unflatten(0, (p.shape.K, -1)).sum(-1)


@contender("vllm", stats=False, group="package", unavailable=needs("vllm"))
def vllm(p: Problem) -> Pair:
    """Shrink and expand of its server, one adapter for all tokens."""
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

    T, R = p.shape.T, p.shape.R
    meta = LoRAKernelMeta.make(max_loras=1, max_num_tokens=T, device=p.device)
    meta.prepare_tensors(torch.zeros(T, dtype=torch.int32, device=p.device))
    about = meta.meta_args(T, True)  # True: one plane of the grid, not max_loras + 1
    down = [p.A[None]], [p.Bt[None]]  # [1, R, d]
    up = [p.Bt.t().contiguous()[None]], [p.A.t().contiguous()[None]]  # [1, d, R]
    z = p.z.detach()

    def run(which: int, x: Tensor, y: Tensor, add: bool) -> Tensor:
        u = torch.empty(1, T, R, dtype=torch.float32, device=p.device)
        lora_shrink(x, down[which], u, *about, 1.0)
        c = weighted(u[0], p.lam.detach(), torch.empty_like(u[0], dtype=p.dtype))
        lora_expand(c[None], up[which], y, *about, 0, add)
        return u[0]

    def forward() -> Result:
        y = p.base.clone()  # it adds in place
        return Result(y, None, None, run(0, z, y, True))

    def backward(u: Tensor) -> Gradients:
        dz = torch.empty_like(z)
        v = run(1, p.dy, dz, False)
        return dz, dlam_of(p, u, v)

    return forward, backward


def padded(R: int) -> int:
    """lorafusion's kernels take all of the rank in one step, whose size must be a power of two of at least 16."""
    return max(16, 1 << (R - 1).bit_length())


def lorafusion_shape(shape: Shape) -> str | None:
    if shape.d_in % TILE:
        return f"needs d_in to be a multiple of {TILE}, found {shape.d_in}"
    if padded(shape.R) > MOST:
        return f"needs ranks that add up to at most {MOST}, found {shape.R}"
    return None


def lorafusion_tiles(device: torch.device, which: str, R: int) -> Any:
    """Those of its table for this GPU, or for the closest of the four it knows, as far as they fit."""
    from lorafusion.ops.triton_ops import config

    about: Any = torch.cuda.get_device_properties(device)
    name = about.name.replace("NVIDIA ", "").strip().replace(" ", "-").lower()
    near = config.H100_CONFIG if about.major >= 9 else config.A100_SXM4_80GB_CONFIG
    return fitting(getattr(config.HARDWARE_CONFIGS.get(name, near), which), R, about.shared_memory_per_block_optin)


def fitting(tiles: Any, R: int, shared: int) -> Any:
    """Fewer stages, then fewer columns: Triton 3.9 asks for 2 (m + n) (R + stages k) bytes with 16-bit elements."""
    columns = tiles.block_size_n
    while columns >= 64:
        for stages in range(tiles.num_stages, 1, -1):
            if 2 * (tiles.block_size_m + columns) * (R + stages * tiles.block_size_k) <= shared:
                return replace(tiles, block_size_n=columns, num_stages=stages)
        columns //= 2
    raise ValueError(f"no tiles of rank {R} fit {shared} bytes of shared memory")


@contender(
    "lorafusion",
    of=LINEAR,
    stats=False,
    group="package",
    unavailable=needs("lorafusion", "loguru", also=lorafusion_shape),
)
def lorafusion(p: Problem) -> Pair:
    """The adapters added to the layer's own product before it is written; ranks filled up with zeros."""
    from lorafusion.ops.triton_ops.fused_lora_dyw_dsa import fused_lora_dyw_dsa
    from lorafusion.ops.triton_ops.fused_lora_xw_sb import fused_lora_xw_sb

    z, R, T = p.z.detach(), p.shape.R, p.shape.T
    whole = padded(R)
    A, Bt = (pad(factor, (0, 0, 0, whole - R)).contiguous() for factor in (p.A, p.Bt))
    B = Bt.t().contiguous()
    ahead, back = (lorafusion_tiles(p.device, f"fused_lora_{name}", whole) for name in ("xw_sb", "dyw_dsa"))
    # Its shape is read even where nothing is dropped.
    mask = torch.ones(1, 1, dtype=torch.bool, device=p.device).expand(T, p.shape.d_in)
    c = torch.zeros(T, whole, dtype=p.dtype, device=p.device)  # zero past R for good

    def weigh(u: Tensor) -> Tensor:
        weighted(u[:, :R], p.lam.detach(), c[:, :R])
        return c

    def forward() -> Result:
        u = z @ A.t()
        return Result(fused_lora_xw_sb(x=z, w=p.W, s=weigh(u), b=B, alpha=1.0, config=ahead), None, None, u)

    def backward(u: Tensor) -> Gradients:
        v = p.dy @ B
        given = {"dy": p.dy, "w": p.W, "ds": weigh(v), "a": A, "dropout_p": 0.0, "dropout_mask": mask}
        return fused_lora_dyw_dsa(**given, config=back), dlam_of(p, u[:, :R], v[:, :R])

    return forward, backward


@contender("unsloth", of=LINEAR, stats=False, autograd=True, group="package", unavailable=needs("unsloth"))
def unsloth(p: Problem) -> Callable[[], Any]:
    """Its layer as it is trained, with gradients of both factors, of which A's is not used."""
    from unsloth.kernels.fast_lora import LoRA_W

    def run() -> Tensor:
        return LoRA_W.apply(p.z[None], p.W, None, p.A, scaled(p, p.lam).t(), 1.0)[0]

    return run


@contender("unsloth_matmul", of=LINEAR, stats=False, group="package", unavailable=needs("unsloth"))
def unsloth_matmul(p: Problem) -> Pair:
    """What its layer's forward calls, in both directions and without autograd."""
    from unsloth.kernels.utils import matmul_lora

    assert p.W is not None
    z, Wt, At = p.z.detach(), p.W.t(), p.A.t()

    def forward() -> Result:
        B = scaled(p, p.lam)
        return Result(matmul_lora(z, p.W, None, p.A, B.t(), 1.0), None, None, B)

    def backward(B: Tensor) -> Gradients:
        dz = matmul_lora(p.dy, Wt, None, B, At, 1.0)
        return dz, dlam_of(p, z @ At, p.dy @ p.Bt.t())  # it does not hand out what lies between

    return forward, backward
