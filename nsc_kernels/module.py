"""MergedLoRALinear: a frozen nn.Linear with K merged adapters on top."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .bank import AdapterBank
from .functional import merged_linear


class MergedLoRALinear(nn.Module):
    """``linear(z) + sum_k lam_k s_k B_k A_k z`` around an existing linear layer.

    Args:
        linear: the layer, used in place (the same weight tensors, no copy) and frozen by this constructor.
        bank: its adapters, of the linear's device; dtype of the activations.
        lam: ``[K]``. An ``nn.Parameter`` is registered as one and learnt; a tensor or a list of floats becomes a
            buffer. Kept in float32 (or float64) when the module is converted to a narrower dtype.

    ``forward(z [..., d_in])`` returns ``[..., d_out]``; :meth:`nsc` also returns the null-space statistics.

    ``weight``, ``bias``, ``in_features`` and ``out_features`` are the linear's, for code that asks a layer for its
    dtype, device or shape. They are the base's and read only: who multiplies by ``weight`` himself gets the layer
    without its adapters, and ``linear.weight + bank.delta(lam)`` is the merged weight.
    """

    lam: Tensor

    def __init__(self, linear: nn.Linear, bank: AdapterBank, lam: Tensor | Sequence[float]):
        super().__init__()
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be an nn.Linear, found {type(linear).__name__}")
        if (linear.in_features, linear.out_features) != (bank.d_in, bank.d_out):
            raise ValueError(
                f"bank adapts a {bank.d_in} -> {bank.d_out} layer, "
                f"but linear is {linear.in_features} -> {linear.out_features}"
            )
        # accelerate brings the weights of a layer with its hook to another device for every call.
        if linear.weight.device != bank.device and not hasattr(linear, "_hf_hook"):
            raise ValueError(f"linear is on {linear.weight.device}, but the bank is on {bank.device}")
        if not isinstance(lam, Tensor):
            lam = torch.tensor(list(lam), dtype=torch.float32, device=bank.device)
        if lam.shape != (bank.K,):
            raise ValueError(f"lam must have shape ({bank.K},), one per adapter, found {tuple(lam.shape)}")
        self.linear = linear.requires_grad_(False)
        self.bank = bank
        if isinstance(lam, nn.Parameter):
            self.lam = lam
        else:
            self.register_buffer("lam", lam)

    @property
    def weight(self) -> Tensor:
        """The layer's own, without the update."""
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        """The layer's own."""
        return self.linear.bias

    @property
    def in_features(self) -> int:
        return self.linear.in_features

    @property
    def out_features(self) -> int:
        return self.linear.out_features

    def forward(self, z: Tensor) -> Tensor:
        return merged_linear(z, self.linear, self.bank, self.lam, stats=False)

    def nsc(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(y [..., d_out], quad [..., K], sqnorm [...])``; see :func:`nsc_kernels.merged_lora_nsc`."""
        return merged_linear(z, self.linear, self.bank, self.lam, stats=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep_wide(t: Tensor) -> Tensor:
            applied = fn(t)
            return applied if applied.dtype.itemsize >= 4 else t.to(applied.device)

        if recurse:
            for child in self.children():
                child._apply(fn)
        # What is left is lam and its gradient.
        return super()._apply(keep_wide, recurse=False)
