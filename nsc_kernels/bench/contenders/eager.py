"""The operator in eager PyTorch: adapters concatenated along the rank, or one after another."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..accuracy import squares
from ..problem import Problem
from ..registry import LINEAR, Contender, Gradients, Pair, Result, contender, register


def statistics(z: Tensor, u: Tensor, K: int) -> tuple[Tensor, Tensor]:
    return squares(u.unflatten(-1, (K, -1))), squares(z)


def weighted(u: Tensor, lam: Tensor, out: Tensor) -> Tensor:
    """``out = lam u``, rounded on the way out."""
    torch.mul(u.unflatten(-1, (len(lam), -1)), lam[:, None], out=out.unflatten(-1, (len(lam), -1)))
    return out


def middle(p: Problem, u: Tensor, out: Tensor) -> Tensor:
    """``out = lam v + 2 dquad u``; returns dlam."""
    K = p.shape.K
    v = p.dy @ p.Bt.t()
    weighted(v, p.lam, out)
    out.unflatten(-1, (K, -1)).addcmul_(u.unflatten(-1, (K, -1)), p.dquad.to(u.dtype)[..., None], value=2)
    return (u * v).sum(0, dtype=torch.float32).unflatten(0, (K, -1)).sum(-1)


def add_norm_gradient(p: Problem, dz: Tensor) -> Tensor:
    return dz.addcmul_(p.z, p.dsqnorm.to(dz.dtype)[:, None], value=2)


def concat(p: Problem, inplace: bool) -> Pair:
    def forward() -> Result:
        base = p.y0()
        u = p.z @ p.A.t()
        c = weighted(u, p.lam, torch.empty_like(u))
        y = base.addmm_(c, p.Bt) if inplace or p.whole else torch.addmm(base, c, p.Bt)
        return Result(y, *statistics(p.z, u, p.shape.K), u)

    def backward(u: Tensor) -> Gradients:
        start = p.dz0(inplace)
        c = torch.empty_like(u)
        dlam = middle(p, u, c)
        dz = c @ p.A if start is None else start.addmm_(c, p.A)
        return add_norm_gradient(p, dz), dlam

    return forward, backward


for of in ("operator", "linear"):
    register(Contender("concat", partial(concat, inplace=False), of, about="two products, backward derived by hand"))
register(Contender("concat_inplace", partial(concat, inplace=True), inplace=True, group="inplace"))


@contender("concat_autograd", autograd=True, group="autograd")
def concat_autograd(p: Problem) -> Callable[[], Any]:
    def run() -> tuple[Tensor, Tensor, Tensor]:
        K = p.shape.K
        u = p.z @ p.A.t()
        c = (u.unflatten(-1, (K, -1)) * p.lam[:, None]).flatten(-2).to(u.dtype)
        return torch.addmm(p.base, c, p.Bt), *statistics(p.z, u, K)

    return run


def loop(p: Problem, stats: bool) -> Callable[[], Any]:
    """``peft.tuners.lora.layer.Linear.forward`` with several active adapters."""

    def run() -> Tensor | tuple[Tensor, Tensor, Tensor]:
        y, us, offsets = p.y0(), [], p.bank.offsets
        for k in range(p.shape.K):
            rows = slice(offsets[k], offsets[k + 1])
            us.append(p.z @ p.A[rows].t())
            y = y + (us[-1] @ p.Bt[rows]) * p.lam[k].to(y.dtype)
        return (y, *statistics(p.z, torch.cat(us, -1), p.shape.K)) if stats else y

    return run


for of in ("operator", LINEAR):
    contender("loop", of=of, autograd=True)(partial(loop, stats=True))
    contender("peft", of=of, autograd=True, stats=False)(partial(loop, stats=False))
