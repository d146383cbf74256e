"""The operator as plainly written PyTorch under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..problem import Problem
from ..registry import LINEAR, Contender, Gradients, Pair, Result, contender, register

AUTOTUNE = "max-autotune-no-cudagraphs"
# How torch.compile is called besides; a dry run, in which nothing is a measurement, has it trace alone.
options: dict[str, Any] = {}


def plain_forward(z: Tensor, A: Tensor, Bt: Tensor, lam: Tensor, base: Tensor) -> tuple[Tensor, ...]:
    """As written for a compiler, which fuses what is elementwise."""
    u = z @ A.t()
    wide = u.float().unflatten(-1, (lam.shape[0], -1))
    c = (wide * lam[:, None]).flatten(-2).to(z.dtype)
    return torch.addmm(base, c, Bt), wide.square().sum(-1), z.float().square().sum(-1), u


def plain_backward(
    dy: Tensor, dquad: Tensor, dsqnorm: Tensor, u: Tensor, z: Tensor, A: Tensor, Bt: Tensor, lam: Tensor
) -> tuple[Tensor, Tensor]:
    wide, v = (x.float().unflatten(-1, (lam.shape[0], -1)) for x in (u, dy @ Bt.t()))
    c = (v * lam[:, None] + 2 * dquad[..., None] * wide).flatten(-2).to(z.dtype)
    return ((c @ A).float() + 2 * dsqnorm[:, None] * z.float()).to(z.dtype), (wide * v).sum((0, 2))


def plain_layer(z: Tensor, A: Tensor, Bt: Tensor, lam: Tensor, W: Tensor) -> tuple[Tensor, ...]:
    return plain_forward(z, A, Bt, lam, linear(z, W))


def plain_layer_backward(
    dy: Tensor, dquad: Tensor, dsqnorm: Tensor, u: Tensor, z: Tensor, A: Tensor, Bt: Tensor, lam: Tensor, W: Tensor
) -> tuple[Tensor, Tensor]:
    dz, dlam = plain_backward(dy, dquad, dsqnorm, u, z, A, Bt, lam)
    return dz + dy @ W, dlam


@cache
def compiled(function: Callable[..., Any], mode: str | None) -> Callable[..., Any]:
    """For one shape after another."""
    how = options or {"mode": mode}
    return torch.compile(function, dynamic=False, fullgraph=True, **how)


def pair(p: Problem, mode: str | None) -> Pair:
    ahead = compiled(plain_layer if p.whole else plain_forward, mode)
    back = compiled(plain_layer_backward if p.whole else plain_backward, mode)
    weight = () if p.W is None else (p.W,)

    def forward() -> Result:
        return Result(*ahead(p.z, p.A, p.Bt, p.lam, p.base if p.W is None else p.W))

    def backward(u: Tensor) -> Gradients:
        return back(*p.grads, u, p.z, p.A, p.Bt, p.lam, *weight)

    return forward, backward


for of in ("operator", LINEAR):
    register(Contender("compiled", partial(pair, mode=None), of, group="compiles"))
    register(Contender("autotuned", partial(pair, mode=AUTOTUNE), of, group="tunes"))


@contender("compiled_autograd", autograd=True, group="autograd")
def compiled_autograd(p: Problem) -> Callable[[], Any]:
    function = compiled(plain_forward, None)
    return lambda: function(p.z, p.A, p.Bt, p.lam, p.base)[:3]
