"""A quantised linear that is no nn.Linear, in the manner of GPTQ's and AWQ's, and models made of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_SHIFTS = 4 * torch.arange(8, dtype=torch.int32)


class PackedLinear(nn.Module):
    """4-bit codes, eight in an int32, with a scale per row. It has no ``weight``; all that it has are buffers.

    Args:
        linear: whose weight is rounded.
        gradients: False for one whose output has none, as of kernels for inference.
    """

    def __init__(self, linear: nn.Linear, gradients: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features, self.gradients = linear.in_features, linear.out_features, gradients
        weight = linear.weight.detach()
        scales = weight.abs().amax(1, keepdim=True).float() / 7
        codes = (weight / scales).round().int() + 8
        self.register_buffer("qweight", (codes.unflatten(1, (-1, 8)) << _SHIFTS).sum(-1, dtype=torch.int32))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def numbers(self) -> Tensor:
        codes = (self.qweight[..., None] >> _SHIFTS) & 15
        return (codes.flatten(1) - 8) * self.scales

    def forward(self, z: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.gradients and torch.is_grad_enabled()):
            return nn.functional.linear(z, self.numbers().to(z.dtype), self.bias)


def packed(model: nn.Module, **settings: bool) -> nn.Module:
    """The model with every linear of its blocks packed."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in path:
            model.set_submodule(path, PackedLinear(module, **settings))
    return model


def unpacked(model: nn.Module) -> nn.Module:
    """The model with an nn.Linear of the same numbers for everything packed, in place."""
    for path, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            with torch.no_grad():
                linear.weight.copy_(module.numbers())
                if module.bias is not None:
                    linear.bias.copy_(module.bias)
            model.set_submodule(path, linear)
    return model
