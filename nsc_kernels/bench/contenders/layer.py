"""The frozen layer and its adapters as one product, and what is a floor for all: the layer alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..problem import Problem
from ..registry import LINEAR, Contender, Gradients, Pair, Result, contender, register
from .eager import add_norm_gradient, middle, statistics, weighted


def product(p: Problem, copied: bool) -> Pair:
    """``[z, c] @ [W, B]^T``."""
    d_in, d_out = p.shape.d_in, p.shape.d_out
    assert p.W is not None
    W_B, W_A = torch.cat([p.W, p.Bt.t()], 1), torch.cat([p.W, p.A])
    u_like, dy_like = (t.new_empty(t.shape[0], p.shape.R) for t in (p.z, p.dy))
    z_c, dy_c = torch.cat([p.z.detach(), u_like], 1), torch.cat([p.dy, dy_like], 1)

    def forward() -> Result:
        z = z_c[:, :d_in]
        if copied:
            z.copy_(p.z)
        u = z @ p.A.t()
        weighted(u, p.lam, z_c[:, d_in:])
        return Result(linear(z_c, W_B), *statistics(z, u, p.shape.K), u)

    def backward(u: Tensor) -> Gradients:
        if copied:
            dy_c[:, :d_out].copy_(p.dy)
        dlam = middle(p, u, dy_c[:, d_out:])
        return add_norm_gradient(p, dy_c @ W_A), dlam

    return forward, backward


for name, copied in (("product_copied", True), ("product_ready", False)):
    register(Contender(name, partial(product, copied=copied), LINEAR))


@contender("merged", of=LINEAR, stats=False)
def merged(p: Problem) -> Pair:
    """The adapters added to the weight in every call."""

    def forward() -> Result:
        assert p.W is not None
        lam = p.lam
        scaled = (p.Bt.unflatten(0, (len(lam), -1)) * lam[:, None, None]).flatten(0, 1).to(p.dtype)
        W = torch.addmm(p.W, scaled.t(), p.A)
        return Result(linear(p.z, W), None, None, W)

    def backward(W: Tensor) -> Gradients:
        dA = p.Bt @ (p.dy.t() @ p.z)
        return p.dy @ W, (dA * p.A).unflatten(0, (p.shape.K, -1)).sum((1, 2), dtype=torch.float32)

    return forward, backward


@contender("linear", of=LINEAR, stats=False, adapters=False)
def bare(p: Problem) -> Pair:
    """The frozen layer alone."""

    def forward() -> Result:
        return Result(p.y0(), None, None, None)

    def backward(saved: Any) -> Gradients:
        return p.dz0(), None

    return forward, backward
