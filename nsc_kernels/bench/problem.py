"""What a contender is given: the inputs of one forward and one backward of one adapted layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

import nsc_kernels as nk

from ..contract import Call
from .shapes import Shape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def call_of(device: torch.device, dtype: torch.dtype, shape: Shape) -> Call:
    """What a backend is asked about."""
    return Call(device, dtype, shape.T, shape.d_in, shape.d_out, tuple(range(0, shape.R + 1, shape.r)))


class Problem:
    """Random inputs of a layer; d is one of its two widths, R = K r the ranks of all adapters.

    Attributes:
        shape: T, d_in, d_out, K, r, R and a name.
        whole: whether the frozen layer is part of the call (``linear``), or its output is given (``operator``).
        z: ``[T, d_in]``, the layer's input; requires a gradient.
        A: ``[R, d_in]``, the down-projections one above the other; adapter k owns rows ``k r`` to ``(k + 1) r``.
        Bt: ``[R, d_out]``, the up-projections, transposed and scaled.
        lam: ``[K]`` in float32, the coefficients; requires a gradient.
        base: ``[T, d_out]``, the frozen layer's output, where it is given.
        dy, dquad, dsqnorm: ``[T, d_out]``, ``[T, K]`` and ``[T]``, gradients that come in; the last two in float32.
        dz_base: ``[T, d_in]``, a gradient that is there already: what works in place adds to it and overwrites it.
        W: ``[d_out, d_in]``, the frozen weight; None in ``operator``.
        bank: A and Bt as this package's functions take them.
    """

    W: Tensor | None = None

    def __init__(
        self, shape: Shape, on: torch.device, seed: int, whole: bool = False, dtype: torch.dtype = torch.bfloat16
    ):
        source = torch.Generator(on).manual_seed(seed)
        T, d_in, d_out, K, R = shape.T, shape.d_in, shape.d_out, shape.K, shape.R

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(size, generator=source, device=on) * scale).to(dtype)

        f32: dict[str, Any] = {"device": on, "dtype": torch.float32, "generator": source}
        self.shape, self.whole, self.dtype, self.device = shape, whole, dtype, on
        # The update has the size of base, which then stays bounded under calls in place: an addition that is less than
        # half a unit in the last place changes nothing.
        self.bank = nk.AdapterBank(
            normal(R, d_in, scale=d_in**-0.5), normal(R, d_out, scale=R**-0.5), range(0, R + 1, shape.r)
        )
        self.A, self.Bt = self.bank.A, self.bank.Bt
        self.z = normal(T, d_in).requires_grad_()
        self.lam = (0.5 + torch.rand(K, **f32)).requires_grad_()
        self.dy = normal(T, d_out)
        self.dquad, self.dsqnorm = torch.randn(T, K, **f32), torch.randn(T, **f32)
        self.base, self.dz_base = normal(T, d_out), normal(T, d_in)
        if whole:
            self.W = normal(d_out, d_in, scale=d_in**-0.5)

    @property
    def grads(self) -> tuple[Tensor, Tensor, Tensor]:
        """What comes in for y, quad and sqnorm."""
        return self.dy, self.dquad, self.dsqnorm

    @property
    def factors(self) -> tuple[Tensor, Tensor, tuple[int, ...], Tensor]:
        return self.A, self.Bt, self.bank.offsets, self.lam

    def y0(self) -> Tensor:
        """The frozen layer's output: what is given, or the layer's product, made anew."""
        return self.base if self.W is None else linear(self.z, self.W)

    def dz0(self, inplace: bool = False) -> Tensor | None:
        """The gradient to add to: the frozen layer's own, made anew; one that is there; or None."""
        return self.dy @ self.W if self.W is not None else self.dz_base if inplace else None

    def fused(self) -> tuple[Tensor, ...]:
        """The public operator, through autograd."""
        return nk.merged_lora_nsc(self.z, self.bank, self.lam, self.y0())

    def backward(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Through autograd, of those of y, quad and sqnorm that there are."""
        gradients = self.grads[: len(outputs)]
        return torch.autograd.grad(outputs, (self.z, self.lam), gradients, retain_graph=True)
