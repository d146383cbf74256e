"""The layers that the GPU scripts measure, their random inputs, and how many bytes a call must move."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import nsc_kernels as nk


class Shape(NamedTuple):
    """One adapted linear layer: K adapters of rank r."""

    name: str
    T: int
    d_in: int
    d_out: int
    K: int
    r: int

    @property
    def R(self) -> int:
        return self.K * self.r


class Data:
    """One set of inputs of a layer. ``whole``: also the layer's own weight, and what ``product_*`` need."""

    def __init__(self, shape: Shape, on: torch.device, seed: int, whole: bool = False):
        source = torch.Generator(on).manual_seed(seed)
        T, d_in, d_out, K, R = shape.T, shape.d_in, shape.d_out, shape.K, shape.R

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(size, generator=source, device=on) * scale).bfloat16()

        f32: dict[str, Any] = {"device": on, "dtype": torch.float32, "generator": source}
        self.shape = shape
        # The update has the size of base, which then stays bounded under calls in place: an addition that is less than
        # half a unit in the last place of bfloat16 changes nothing.
        self.bank = nk.AdapterBank(
            normal(R, d_in, scale=d_in**-0.5), normal(R, d_out, scale=R**-0.5), range(0, R + 1, shape.r)
        )
        self.z = normal(T, d_in).requires_grad_()
        self.lam = (0.5 + torch.rand(K, **f32)).requires_grad_()
        self.grads = normal(T, d_out), torch.randn(T, K, **f32), torch.randn(T, **f32)
        self.base, self.dz_base = normal(T, d_out), normal(T, d_in)
        if whole:
            A, Bt = self.bank.A, self.bank.Bt
            self.W = normal(d_out, d_in, scale=d_in**-0.5)
            self.W_B, self.W_A = torch.cat([self.W, Bt.t()], 1), torch.cat([self.W, A])
            self.z_c = torch.cat([self.z.detach(), normal(T, R)], 1)
            self.dy_c = torch.cat([self.grads[0], normal(T, R)], 1)

    @property
    def factors(self) -> tuple[Tensor, Tensor, tuple[int, ...], Tensor]:
        return self.bank.A, self.bank.Bt, self.bank.offsets, self.lam

    def fused(self) -> tuple[Tensor, ...]:
        """The public operator, through autograd."""
        return nk.merged_lora_nsc(self.z, self.bank, self.lam, self.base)

    def backward(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Of y alone where ``outputs`` is y alone."""
        gradients = self.grads[: len(outputs)]
        return torch.autograd.grad(outputs, (self.z, self.lam), gradients, retain_graph=True)


# The three model families first, so that a run that is cut short has them.
FAMILIES = [
    Shape("ViT-B", 6304, 768, 768, 20, 16),
    Shape("LLaMA-3-8B q, o", 256, 4096, 4096, 6, 16),
    Shape("LLaMA-3-8B v, k", 256, 4096, 1024, 6, 16),
    Shape("LLaVA-7B q, k, v, o", 640, 4096, 4096, 6, 16),
    Shape("LLaMA-3-8B q, o", 1536, 4096, 4096, 6, 16),
    Shape("LLaMA-3-8B v, k", 1536, 4096, 1024, 6, 16),
    Shape("LLaVA-7B q, k, v, o", 3840, 4096, 4096, 6, 16),
]
LARGE = [
    Shape("large T", 16384, 4096, 4096, 8, 16),
    Shape("large T", 16384, 4096, 4096, 1, 16),
    Shape("large T", 8192, 8192, 8192, 8, 16),
]
MLP = [
    Shape(f"LLaMA-3-8B {name}", T, *widths, 6, 16)
    for T in (256, 1536)
    for name, widths in (("gate, up", (4096, 14336)), ("down", (14336, 4096)))
]
SHAPES = [*FAMILIES, *LARGE, *MLP]
DRY_RUN = Shape("dry run", 5, 24, 40, 2, 4)


def touched(shape: Shape, whole: bool) -> int:
    """Bytes that every contender reads or writes in either direction: one input, one output, the weights."""
    weights = 2 * shape.R * (shape.d_in + shape.d_out) + whole * 2 * shape.d_in * shape.d_out
    return weights + 2 * shape.T * (shape.d_in + shape.d_out)


def least_bytes(shape: Shape, direction: str, whole: bool, inplace: bool) -> int:
    """Each input once, each output once; u is written by the forward and read by the backward.

    The whole layer need not write what its own weight makes, nor read it again.
    """
    T, d_in, d_out = shape.T, shape.d_in, shape.d_out
    small = 2 * T * shape.R + 4 * T * (shape.K + 1)
    if direction == "forward":
        more = 0 if whole else 2 * T * d_out  # base
    else:
        more = 2 * T * d_in * (2 if inplace and not whole else 1)  # z, for the norm's gradient, and dz_base
    return touched(shape, whole) + small + more


def operations(shape: Shape, whole: bool) -> int:
    """Floating-point operations of the products of one direction."""
    return 2 * shape.T * (shape.R * (shape.d_in + shape.d_out) + whole * shape.d_in * shape.d_out)


def rotation(shape: Shape, whole: bool, l2_bytes: int) -> int:
    """How many sets there must be for the others to move three times the L2 between two turns of one."""
    return max(2, 1 + -(-3 * l2_bytes // touched(shape, whole)))
