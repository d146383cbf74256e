"""Prepared variants of this package's GPU kernels, one contender each: ``--contenders fused,variant``.

What is not the formula's choice is compiled and tried, and no call of a user's ever takes it.
"""

# mypy: disable-error-code="arg-type"

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nsc_kernels.backends import cuda
from nsc_kernels.contract import BackwardCall, ForwardCall

from ..problem import Problem
from ..registry import Contender, Gradients, Pair, Result, Unavailable, register
from ..shapes import Shape
from .fused import why_not

# Of nsc_kernels.triton.configs.Config; docs/triton_variants.md says what they do.
CHANGES: dict[str, dict[str, Any]] = {
    "stages2": {"expand_stages": 2},
    "stages3": {"expand_stages": 3},
    "early": {"early": True, "expand_stages": None},
}


def _pair(p: Problem, run: Callable[[bool, Any], Any]) -> Pair:
    """``run(backward, call)`` on the problem's calls."""
    factors = (p.A, p.Bt, p.bank.offsets, p.lam.detach())
    z = p.z.detach()

    def forward() -> Result:
        return Result(*run(False, ForwardCall(z, *factors, p.base, True, True)))

    def backward(u: Tensor) -> Gradients:
        return run(True, BackwardCall(*p.grads, u, z, *factors, None, True, True))

    return forward, backward


def _cuda(p: Problem, number: int) -> Pair:
    def run(backward: bool, call: Any) -> Any:
        return cuda.backward(call, variant=number) if backward else cuda.forward(call, variant=number)

    return _pair(p, run)


def _triton(p: Problem, change: dict[str, Any]) -> Pair:
    from nsc_kernels.triton import configs, launch

    found = []
    for backward in (False, True):
        widths = (p.shape.d_out, p.shape.d_in) if backward else (p.shape.d_in, p.shape.d_out)
        mode = configs.mode_of(p.dtype, p.shape.R)
        start = configs.choose(
            configs.machine(p.device), configs.Problem(p.shape.T, *widths, p.shape.R, mode, backward)
        )
        if start is None:
            raise RuntimeError("no configuration fits this device's shared memory")
        found.append(replace(start, **change))

    def run(backward: bool, call: Any) -> Any:
        direction = launch.backward if backward else launch.forward
        return direction(call, config=found[backward])

    return _pair(p, run)


def _not_this_variant(number: int) -> Unavailable:
    def unavailable(device: torch.device, dtype: torch.dtype, shape: Shape) -> str | None:
        if number not in cuda.variants_of(shape.R):
            return f"is not for ranks that add up to {shape.R}"
        return why_not("cuda")(device, dtype, shape)

    return unavailable


for number, (ranks, tokens) in enumerate([*cuda.VARIANTS, *cuda.WARPGROUP_VARIANTS]):
    family = "mma" if number < len(cuda.VARIANTS) else "wgmma"
    register(
        Contender(
            f"fused_cuda_{family}_{ranks}x{tokens}",
            partial(_cuda, number=number),
            group="variant",
            unavailable=_not_this_variant(number),
        )
    )
for name, change in CHANGES.items():
    make = partial(_triton, change=change)
    register(Contender(f"fused_triton_{name}", make, group="variant", unavailable=why_not("triton")))
