"""What the fused operator is measured against, in the strongest form each is known in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nsc_kernels import dispatch
from nsc_kernels.contract import BackwardCall, Call, ForwardCall


@dataclass(frozen=True)
class Shape:
    """T tokens, a d x d layer, K adapters of rank R / K."""

    T: int
    d: int
    R: int
    K: int

    @property
    def rank(self) -> int:
        return self.R // self.K


@dataclass
class Data:
    """Inputs of one forward and one backward."""

    shape: Shape
    z: Tensor
    A: Tensor
    Bt: Tensor
    base: Tensor
    lam: Tensor
    dy: Tensor
    dquad: Tensor
    dsqnorm: Tensor
    u: Tensor
    per_column: Tensor

    @classmethod
    def random(cls, shape: Shape, dtype: torch.dtype, device: str = "cpu") -> Data:
        def normal(*size: int) -> Tensor:
            return torch.randn(*size, device=device)

        T, d, R, K = shape.T, shape.d, shape.R, shape.K
        z, A, lam = normal(T, d).to(dtype), (normal(R, d) / d**0.5).to(dtype), torch.rand(K, device=device)
        return cls(
            shape=shape,
            z=z,
            A=A,
            Bt=normal(R, d).to(dtype),
            base=normal(T, d).to(dtype),
            lam=lam,
            dy=normal(T, d).to(dtype),
            dquad=normal(T, K),
            dsqnorm=normal(T),
            u=z @ A.t(),
            per_column=lam.repeat_interleave(shape.rank).to(dtype),
        )


def concatenated_forward(
    z: Tensor, A: Tensor, Bt: Tensor, per_column: Tensor, base: Tensor, K: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Adapters concatenated along the rank: two matrix products, and the statistics from u and z."""
    u = z @ A.t()
    quad = u.float().square().view(u.shape[0], K, -1).sum(-1)
    sqnorm = z.float().square().sum(-1)
    return torch.addmm(base, u * per_column, Bt), quad, sqnorm


def concatenated_backward(
    dy: Tensor,
    dquad: Tensor,
    dsqnorm: Tensor,
    u: Tensor,
    z: Tensor,
    A: Tensor,
    Bt: Tensor,
    per_column: Tensor,
    K: int,
) -> tuple[Tensor, Tensor]:
    """The backward of the above by hand, which is faster than what autograd makes of it."""
    v = dy @ Bt.t()
    dlam = (u.float() * v.float()).sum(0).view(K, -1).sum(-1)
    T, R = u.shape
    curved = (2 * dquad).to(u.dtype)[:, :, None] * u.view(T, K, R // K)
    c = torch.addcmul(curved.view(T, R), v, per_column)
    return torch.addmm((2 * dsqnorm).to(z.dtype)[:, None] * z, c, A), dlam


def fused(data: Data) -> dict[str, Callable[[], object]]:
    s = data.shape
    offsets = tuple(range(0, s.R + 1, s.rank))
    call = Call(data.z.device, data.z.dtype, s.T, s.d, s.d, offsets)
    backend = dispatch.select(dispatch.chosen(), call)
    factors = (data.A, data.Bt, offsets, data.lam)
    forward = ForwardCall(data.z, *factors, data.base, True, True)
    backward = BackwardCall(data.dy, data.dquad, data.dsqnorm, data.u, data.z, *factors, None, True, True)
    return {"forward": lambda: backend.forward(forward), "backward": lambda: backend.backward(backward)}


def concatenated(data: Data, compiled: bool = False) -> dict[str, Callable[[], object]]:
    forward, backward = concatenated_forward, concatenated_backward
    if compiled:
        torch._dynamo.reset()
        forward = torch.compile(concatenated_forward, fullgraph=True, dynamic=False)
        backward = torch.compile(concatenated_backward, fullgraph=True, dynamic=False)
    d, K = data, data.shape.K
    return {
        "forward": lambda: forward(d.z, d.A, d.Bt, d.per_column, d.base, K),
        "backward": lambda: backward(d.dy, d.dquad, d.dsqnorm, d.u, d.z, d.A, d.Bt, d.per_column, K),
    }


class PeftLoop(nn.Module):
    """The adapter part of ``peft.tuners.lora.layer.Linear.forward`` with several active adapters: no statistics."""

    def __init__(self, data: Data):
        super().__init__()
        s = data.shape
        self.down = nn.ModuleList(nn.Linear(s.d, s.rank, bias=False, dtype=data.z.dtype) for _ in range(s.K))
        self.up = nn.ModuleList(nn.Linear(s.rank, s.d, bias=False, dtype=data.z.dtype) for _ in range(s.K))
        self.to(data.z.device).requires_grad_(False)
        self.scaling = nn.Parameter(data.lam.to(data.z.dtype))

    def forward(self, z: Tensor, result: Tensor) -> Tensor:
        for k, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            result = result + up(down(z)) * self.scaling[k]
        return result


def peft_loop(data: Data) -> dict[str, Callable[[], object]]:
    loop = PeftLoop(data)
    z = data.z.detach().requires_grad_()
    y = loop(z, data.base)

    def forward() -> Tensor:
        with torch.no_grad():
            return loop(data.z, data.base)

    return {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(y, (z, loop.scaling), data.dy, retain_graph=True),
    }
