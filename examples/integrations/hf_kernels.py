"""Layers written in plain PyTorch, with the forward of this project's kernel under them.

    python -m nsc_kernels.integrations.hf_kernels nsc-kernel      # where nsc_kernels is installed
    python examples/integrations/hf_kernels.py nsc-kernel         # anywhere: needs torch, kernels and the folder
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from kernels import (
    LocalLayerRepository,
    Mode,
    get_local_kernel,
    kernelize,
    use_kernel_forward_from_hub,
    use_kernel_mapping,
)


class Packed(nn.Module):
    """Adapters of one layer, packed along the rank: what the kernel asks of a bank."""

    def __init__(self, A: list[Tensor], B: list[Tensor], scaling: float) -> None:
        super().__init__()
        self.register_buffer("A", torch.cat(A))
        self.register_buffer("Bt", torch.cat([scaling * b.t() for b in B]))
        self.offsets = [0, *torch.tensor([len(a) for a in A]).cumsum(0).tolist()]


@use_kernel_forward_from_hub("MergedLoRALinear")
class Merged(nn.Module):
    """A frozen linear with adapters on top, one coefficient each."""

    def __init__(self, linear: nn.Linear, bank: Packed, lam: nn.Parameter) -> None:
        super().__init__()
        self.linear, self.bank, self.lam = linear.requires_grad_(False), bank, lam

    def forward(self, z: Tensor) -> Tensor:
        y = self.linear(z)
        for k, coefficient in enumerate(self.lam):
            rows = slice(self.bank.offsets[k], self.bank.offsets[k + 1])
            y = y + coefficient * ((z @ self.bank.A[rows].t()) @ self.bank.Bt[rows])
        return y


def layer(d_in: int, d_out: int, rank: int = 8, tasks: int = 3) -> Merged:
    A = [torch.randn(rank, d_in) / d_in**0.5 for _ in range(tasks)]
    B = [torch.randn(d_out, rank) / rank**0.5 for _ in range(tasks)]
    return Merged(nn.Linear(d_in, d_out), Packed(A, B, 0.5), nn.Parameter(torch.full((tasks,), 0.3)))


def main(folder: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(layer(64, 96), nn.GELU(), layer(96, 32))
    z = torch.randn(10, 64)

    def outcome() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        y = model(z)
        y.square().mean().backward()
        return y.detach(), torch.cat([model[0].lam.grad, model[2].lam.grad])

    before = outcome()
    repository = LocalLayerRepository(folder, layer_name="MergedLoRALinear")
    with use_kernel_mapping({"MergedLoRALinear": {"cpu": repository, "cuda": repository}}):
        kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE)
    after = outcome()

    kernel = get_local_kernel(folder)
    print(f"{kernel.__name__}: {kernel.available_backends()}")
    for name, one, other in zip(("outputs", "gradients"), before, after, strict=True):
        print(f"{name} differ by {float((one - other).norm() / one.norm()):.1e}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER")
    main(Path(sys.argv[1]).resolve())
