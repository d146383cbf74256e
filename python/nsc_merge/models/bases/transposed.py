"""GPT-2's linears, ``Conv1D``, whose weight ``[d_in, d_out]`` lies the other way round."""

from __future__ import annotations

from typing import Any

from torch import nn


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is transformers' ``Conv1D``: ``nx`` inputs, ``nf`` outputs, ``weight [nx, nf]`` and a
    bias."""
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    sizes = (getattr(module, "nx", None), getattr(module, "nf", None))
    return weight is not None and bias is not None and tuple(weight.shape) == sizes


def as_linear(module: Any) -> nn.Linear:
    """An ``nn.Linear`` that computes what a ``Conv1D`` does, on the very same numbers: its weight is a view."""
    linear = nn.Linear(module.nx, module.nf, device="meta")
    linear.weight = nn.Parameter(module.weight.detach().t(), requires_grad=False)
    linear.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
    return linear.train(module.training)
