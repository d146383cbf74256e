"""This package's operator, on each backend."""

# mypy: disable-error-code="arg-type"
# Where two tuples are unfolded into one call, mypy counts the second from where the first ended.

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import nsc_kernels as nk
from nsc_kernels import dispatch
from nsc_kernels.contract import Backend, BackwardCall, ForwardCall
from nsc_kernels.ops import run_backward, run_forward

from ..problem import Problem, call_of
from ..registry import LINEAR, Contender, Gradients, Pair, Result, Unavailable, contender, register
from ..shapes import Shape


def on_backend(p: Problem, inplace: bool, name: str | None = None) -> Pair:
    """``name``: of a backend; None for the one that is chosen where the calls are made."""

    def backend() -> Backend:
        return dispatch.select(name or dispatch.chosen(), call_of(p.device, p.dtype, p.shape))

    def forward() -> Result:
        given = ForwardCall(p.z, *p.factors, p.y0(), True, True, inplace or p.whole)
        return Result(*run_forward(backend(), given))

    def backward(u: Tensor) -> Gradients:
        start = p.dz0(inplace)
        given = BackwardCall(*p.grads, u, p.z, *p.factors, start, True, True, inplace or p.whole)
        return run_backward(backend(), given)

    return forward, backward


def why_not(name: str) -> Unavailable:
    """What the backend itself says."""

    def unavailable(device: torch.device, dtype: torch.dtype, shape: Shape) -> str | None:
        found = nk.available_backends()[name]
        if found is not True:
            return str(found)
        backend, _ = dispatch.load(name)
        assert backend is not None
        return backend.rejects(call_of(device, dtype, shape))

    return unavailable


for of in ("operator", "linear"):
    register(Contender("fused", partial(on_backend, inplace=False), of))
    if of == "operator":
        register(Contender("fused_inplace", partial(on_backend, inplace=True), of, inplace=True, group="inplace"))
    for name in ("cpu", "triton", "cuda"):
        make = partial(on_backend, inplace=False, name=name)
        register(Contender(f"fused_{name}", make, of, group="backend", unavailable=why_not(name)))


@contender("fused_autograd", autograd=True, group="autograd")
def fused_autograd(p: Problem) -> Callable[[], Any]:
    """``nsc_kernels.merged_lora_nsc`` as users call it."""
    return p.fused


@contender("module", of=LINEAR, stats=False, autograd=True, group="autograd")
def module(p: Problem) -> Callable[[], Any]:
    """``nsc_kernels.MergedLoRALinear`` as users call it."""
    assert p.W is not None
    frozen = torch.nn.Linear(p.shape.d_in, p.shape.d_out, bias=False, device="meta", dtype=p.dtype)
    frozen.weight = torch.nn.Parameter(p.W, requires_grad=False)
    merged = nk.MergedLoRALinear(frozen, p.bank, p.lam)
    return lambda: merged(p.z)
