"""What the operator is measured against on a GPU: each a forward and a backward on one set of inputs.

On the adapters alone (the frozen layer's output ``base`` is given, y = base + adapters(z)):

    fused            this package, on the backend under test
    concat           the adapters concatenated along the rank: two products, the backward derived by hand
    compiled         the same, written plainly, under torch.compile; ``autotuned`` in mode max-autotune-no-cudagraphs
    two_launches     shrink and expand as two Triton kernels (two_launches.py)
    loop, peft       one adapter after another through autograd; ``peft`` without the statistics, as PEFT does it

``_inplace`` may overwrite base, and in the backward adds to a gradient that is there and overwrites it: what the layer
as a whole does. On the whole layer, y = z W^T + adapters(z), where every contender may overwrite what it made itself:

    linear           the frozen layer alone: the floor, and what weights with the adapters folded in once for all cost
    product_copied   [z, c] @ [W, B]^T: the update is a part of the layer's own product, and y0 is never written. The
                     idea is LoRAFusion's (arXiv 2510.00206). z is copied beside c.
    product_ready    the same where the layer before already wrote z there. Both hold W three times.
    merged           W + sum_k lam_k B_k A_k made anew in each call, as a merge by functional_call does; no statistics

``*_autograd`` are called as users call them, through autograd; the others without.
"""

# mypy: disable-error-code="arg-type"
# Where two tuples are unfolded into one call, mypy counts the second from where the first ended.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from nsc_kernels.contract import BackwardCall, ForwardCall
from nsc_kernels.ops import run_backward, run_forward, select_backend

from .gpu_data import Data


class Result(NamedTuple):
    y: Tensor
    quad: Tensor | None
    sqnorm: Tensor | None
    saved: Any  # what the backward takes


Gradients = Sequence[Tensor | None]  # of z and of lam


@dataclass(frozen=True)
class Contender:
    """``stats``, ``adapters``: whether it computes the statistics, and the adapters at all."""

    name: str
    forward: Callable[[Data], Result]
    backward: Callable[[Data, Any], Gradients]
    whole: bool = False
    inplace: bool = False
    stats: bool = True
    adapters: bool = True
    autograd: bool = False
    prepare: Callable[[list[Data]], None] | None = None  # before anything else: tiles are tried out there


def fused_forward(d: Data, layer: bool, inplace: bool) -> Result:
    base = linear(d.z, d.W) if layer else d.base
    backend = select_backend(d.z, *d.factors[:3])
    return Result(*run_forward(backend, ForwardCall(d.z, *d.factors, base, True, True, inplace)))


def fused_backward(d: Data, u: Tensor, layer: bool, inplace: bool) -> Gradients:
    dz_base = d.grads[0] @ d.W if layer else d.dz_base if inplace else None
    backend = select_backend(d.z, *d.factors[:3])
    return run_backward(backend, BackwardCall(*d.grads, u, d.z, *d.factors, dz_base, True, True, inplace))


def statistics(z: Tensor, u: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """A norm with a wider dtype reads its input once; ``float().square().sum()`` writes two float32 tensors first."""

    def squares(x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).square()

    return squares(u.unflatten(-1, (K, -1))), squares(z)


def weighted(u: Tensor, lam: Tensor, out: Tensor) -> Tensor:
    """``out = lam u``, rounded on the way out."""
    torch.mul(u.unflatten(-1, (len(lam), -1)), lam[:, None], out=out.unflatten(-1, (len(lam), -1)))
    return out


def concat_forward(d: Data, layer: bool, inplace: bool) -> Result:
    A, Bt, _, lam = d.factors
    base = linear(d.z, d.W) if layer else d.base
    u = d.z @ A.t()
    c = weighted(u, lam, torch.empty_like(u))
    y = base.addmm_(c, Bt) if inplace else torch.addmm(base, c, Bt)
    return Result(y, *statistics(d.z, u, len(lam)), u)


def concat_middle(d: Data, u: Tensor, out: Tensor) -> Tensor:
    """``out = lam v + 2 dquad u``; returns dlam."""
    _, Bt, _, lam = d.factors
    K = len(lam)
    v = d.grads[0] @ Bt.t()
    weighted(v, lam, out)
    out.unflatten(-1, (K, -1)).addcmul_(u.unflatten(-1, (K, -1)), d.grads[1].to(u.dtype)[..., None], value=2)
    return (u * v).sum(0, dtype=torch.float32).unflatten(0, (K, -1)).sum(-1)


def add_norm_gradient(d: Data, dz: Tensor) -> Tensor:
    return dz.addcmul_(d.z, d.grads[2].to(dz.dtype)[:, None], value=2)


def concat_backward(d: Data, u: Tensor, layer: bool, inplace: bool) -> Gradients:
    dz_base = d.grads[0] @ d.W if layer else d.dz_base if inplace else None
    c = torch.empty_like(u)
    dlam = concat_middle(d, u, c)
    dz = c @ d.bank.A if dz_base is None else dz_base.addmm_(c, d.bank.A)
    return add_norm_gradient(d, dz), dlam


def product_forward(d: Data, copied: bool) -> Result:
    A, _, _, lam = d.factors
    z = d.z_c[:, : d.shape.d_in]
    if copied:
        z.copy_(d.z)
    u = z @ A.t()
    weighted(u, lam, d.z_c[:, d.shape.d_in :])
    return Result(linear(d.z_c, d.W_B), *statistics(z, u, len(lam)), u)


def product_backward(d: Data, u: Tensor, copied: bool) -> Gradients:
    if copied:
        d.dy_c[:, : d.shape.d_out].copy_(d.grads[0])
    dlam = concat_middle(d, u, d.dy_c[:, d.shape.d_out :])
    return add_norm_gradient(d, d.dy_c @ d.W_A), dlam


def merged_forward(d: Data) -> Result:
    A, Bt, _, lam = d.factors
    scaled = (Bt.unflatten(0, (len(lam), -1)) * lam[:, None, None]).flatten(0, 1).to(Bt.dtype)
    W = torch.addmm(d.W, scaled.t(), A)
    return Result(linear(d.z, W), None, None, W)


def merged_backward(d: Data, W: Tensor) -> Gradients:
    A, Bt, _, lam = d.factors
    dA = Bt @ (d.grads[0].t() @ d.z)
    return d.grads[0] @ W, (dA * A).unflatten(0, (len(lam), -1)).sum((1, 2), dtype=torch.float32)


def loop_forward(d: Data, layer: bool, stats: bool) -> Result:
    A, Bt, offsets, lam = d.factors
    y, us = linear(d.z, d.W) if layer else d.base, []
    for k in range(d.shape.K):
        rows = slice(offsets[k], offsets[k + 1])
        us.append(d.z @ A[rows].t())
        y = y + (us[-1] @ Bt[rows]) * lam[k].to(y.dtype)
    if not stats:
        return Result(y, None, None, (y,))
    quad, sqnorm = statistics(d.z, torch.cat(us, -1), d.shape.K)
    return Result(y, quad, sqnorm, (y, quad, sqnorm))


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
def compiled(function: Callable[..., Any], mode: str | None, kind: str) -> Callable[..., Any]:
    """For one shape after another; on a CPU traced and not compiled, which takes half a minute there."""
    how: dict[str, Any] = {"mode": mode} if kind == "cuda" else {"backend": "aot_eager"}
    return torch.compile(function, dynamic=False, fullgraph=True, **how)


def compiled_forward(d: Data, mode: str | None, layer: bool) -> Result:
    A, Bt, _, lam = d.factors
    function = compiled(plain_layer if layer else plain_forward, mode, d.z.device.type)
    return Result(*function(d.z, A, Bt, lam, d.W if layer else d.base))


def compiled_backward(d: Data, u: Tensor, mode: str | None, layer: bool) -> Gradients:
    A, Bt, _, lam = d.factors
    function = compiled(plain_layer_backward if layer else plain_backward, mode, d.z.device.type)
    return function(*d.grads, u, d.z, A, Bt, lam, *((d.W,) if layer else ()))


def fused_autograd(d: Data) -> Result:
    y, quad, sqnorm = d.fused()
    return Result(y, quad, sqnorm, (y, quad, sqnorm))


def concat_autograd(d: Data) -> Result:
    """Not in place: autograd would have to copy base first where the layer that made it needs it."""
    A, Bt, _, lam = d.factors
    u = d.z @ A.t()
    c = (u.unflatten(-1, (len(lam), -1)) * lam[:, None]).flatten(-2).to(u.dtype)
    outputs = torch.addmm(d.base, c, Bt), *statistics(d.z, u, len(lam))
    return Result(*outputs, outputs)


def compiled_autograd(d: Data) -> Result:
    A, Bt, _, lam = d.factors
    y, quad, sqnorm, _ = compiled(plain_forward, None, d.z.device.type)(d.z, A, Bt, lam, d.base)
    return Result(y, quad, sqnorm, (y, quad, sqnorm))


def two_launches(inplace: bool, layer: bool) -> Contender:
    # Here, because it defines Triton kernels, which not every user of Data has Triton for.
    from .two_launches import backward, forward, tune

    def forward_of(d: Data) -> Result:
        return Result(*forward(d.z, *d.factors, linear(d.z, d.W) if layer else d.base, inplace))

    def backward_of(d: Data, u: Tensor) -> Gradients:
        dz_base = d.grads[0] @ d.W if layer else d.dz_base if inplace else None
        return backward(*d.grads, u, d.z, *d.factors, dz_base, inplace)

    name = "two_launches_inplace" if inplace and not layer else "two_launches"
    return Contender(name, forward_of, backward_of, whole=layer, inplace=inplace, prepare=tune)


def contenders(of: str) -> list[Contender]:
    """Of one of the sets of operator_gpu.py; the first is this package's."""

    def pair(name: str, forward: Any, backward: Any, layer: bool, inplace: bool = True) -> Contender:
        bound = {"layer": layer, "inplace": inplace}
        name += "_inplace" if inplace and not layer else ""
        return Contender(name, partial(forward, **bound), partial(backward, **bound), whole=layer, inplace=inplace)

    def compiling(name: str, mode: str | None, layer: bool) -> Contender:
        bound: dict[str, Any] = {"mode": mode, "layer": layer}
        return Contender(name, partial(compiled_forward, **bound), partial(compiled_backward, **bound), whole=layer)

    def loop(name: str, layer: bool, stats: bool) -> Contender:
        forward = partial(loop_forward, layer=layer, stats=stats)
        return Contender(name, forward, Data.backward, whole=layer, stats=stats, autograd=True)

    fused, concat = (fused_forward, fused_backward), (concat_forward, concat_backward)
    autotune = "max-autotune-no-cudagraphs"
    ours = [pair("fused", *fused, layer=False, inplace=inplace) for inplace in (False, True)]
    if of == "operator":
        others = [pair("concat", *concat, layer=False, inplace=inplace) for inplace in (False, True)]
        return [*ours, *others, loop("loop", False, True), loop("peft", False, False)]
    if of == "two_launches":
        return [*ours, two_launches(False, False), two_launches(True, False)]
    if of == "compiled":
        return [ours[0], compiling("compiled", None, False)]
    if of == "autotuned":
        return [ours[0], compiling("autotuned", autotune, False)]
    if of == "autograd":
        routes = {"fused": fused_autograd, "concat": concat_autograd, "compiled": compiled_autograd}
        through = [Contender(f"{name}_autograd", f, Data.backward, autograd=True) for name, f in routes.items()]
        return [*through, loop("loop", False, True)]
    layer = pair("fused", *fused, layer=True)
    if of == "whole":
        bare = Contender(
            "linear",
            lambda d: Result(linear(d.z, d.W), None, None, None),
            lambda d, saved: (d.grads[0] @ d.W, None),
            whole=True,
            stats=False,
            adapters=False,
        )
        products = [
            Contender(
                name, partial(product_forward, copied=copied), partial(product_backward, copied=copied), whole=True
            )
            for name, copied in (("product_copied", True), ("product_ready", False))
        ]
        merged = Contender("merged", merged_forward, merged_backward, whole=True, stats=False)
        loops = [loop("loop", True, True), loop("peft", True, False)]
        return [layer, pair("concat", *concat, layer=True), *products, *loops, merged, bare]
    assert of == "whole_compiled", of
    others = [compiling("compiled", None, True), compiling("autotuned", autotune, True)]
    return [layer, two_launches(True, True), *others]
