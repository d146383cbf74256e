"""MergedLoRALinear: a frozen linear layer with K merged adapters on top."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear as OutProjection

from .bank import AdapterBank
from .functional import merged_linear, refuse_other_bank


class MergedLoRALinear(nn.Module):
    """``linear(z) + sum_k lam_k s_k B_k A_k z`` around an existing linear layer.

    Args:
        linear: the layer, used in place (the same weight tensors, no copy) and frozen by this constructor: an
            nn.Linear, or any other module with ``in_features``, ``out_features`` and a forward from ``[..., d_in]`` to
            ``[..., d_out]``, such as a quantised one. Its own forward is what runs then, and its weight is never read.
        bank: its adapters, of the linear's device; dtype of the activations. Where a layer other than nn.Linear takes
            or gives another dtype, the update is computed in the bank's and the sum has the layer's.
        lam: ``[K]``. An ``nn.Parameter`` is registered as one and learnt; a tensor or a list of floats becomes a
            buffer. Kept in float32 (or float64) when the module is converted to a narrower dtype.

    ``forward(z [..., d_in])`` returns ``[..., d_out]``; :meth:`nsc` also returns the null-space statistics.

    ``weight``, ``bias``, ``in_features`` and ``out_features`` are the linear's, for code that asks a layer for its
    dtype, device or shape. They are the base's and read only: who multiplies by ``weight`` himself gets the layer
    without its adapters, and ``linear.weight + bank.delta(lam)`` is the merged weight. Of a quantised layer, ``weight``
    is what its library keeps there, which may be packed codes; where it keeps nothing of that name, there is an
    AttributeError as from the layer itself. Gradients to z need a layer whose forward has them.

    Within an ``nn.TransformerEncoderLayer`` it is called, which keeps torch's fast path for inference off.

    Raises:
        TypeError: if ``linear`` is no such layer, or the ``out_proj`` of an ``nn.MultiheadAttention``, which multiplies
            by its weight and never calls it. A subclass whose ``weight`` has the update in it may take its place.
        ValueError: if its shape or device is not the bank's, or if ``lam`` has another shape.
    """

    lam: Tensor
    linear: Any

    def __init__(self, linear: nn.Module, bank: AdapterBank, lam: Tensor | Sequence[float]):
        super().__init__()
        shape = tuple(getattr(linear, name, None) for name in ("in_features", "out_features"))
        if not isinstance(linear, nn.Module) or not all(isinstance(size, int) for size in shape):
            raise TypeError(
                "linear must be an nn.Linear, or a module with in_features and out_features, found "
                f"{type(linear).__name__}"
            )
        if isinstance(linear, OutProjection) and type(self).weight is MergedLoRALinear.weight:
            raise TypeError(
                "linear is the out_proj of nn.MultiheadAttention, which multiplies by its weight and never calls it: "
                "adapters would have no effect; where code of your own does call it, give an nn.Linear of its weight"
            )
        refuse_other_bank(bank)
        if shape != (bank.d_in, bank.d_out):
            raise ValueError(f"bank adapts a {bank.d_in} -> {bank.d_out} layer, but linear is {shape[0]} -> {shape[1]}")
        held = next(itertools.chain(linear.parameters(), linear.buffers()), None)
        # accelerate brings the weights of a layer with its hook to another device for every call.
        if held is not None and held.device != bank.device and not hasattr(linear, "_hf_hook"):
            raise ValueError(f"linear is on {held.device}, but the bank is on {bank.device}")
        if not isinstance(lam, Tensor):
            if not isinstance(lam, Iterable):
                raise TypeError(f"lam must be a tensor or a list of floats, one per adapter, found {lam!r}")
            lam = torch.tensor(list(lam), dtype=torch.float32, device=bank.device)
        if not lam.is_floating_point():
            raise TypeError(f"lam must be of a floating dtype, found {lam.dtype}")
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
        return getattr(self.linear, "bias", None)

    @property
    def in_features(self) -> int:
        return self.bank.d_in

    @property
    def out_features(self) -> int:
        return self.bank.d_out

    def __setattr__(self, name: str, value: Any) -> None:
        # torch's fast path of nn.TransformerEncoderLayer reads the weights of its layers and calls none, unless a
        # module within it has a hook. Nobody calls a bank, so that this one costs nothing.
        if name == "bank" and isinstance(value, AdapterBank) and not value._forward_pre_hooks:
            value.register_forward_pre_hook(_never_called)
        super().__setattr__(name, value)

    def forward(self, z: Tensor) -> Tensor:
        return merged_linear(z, self.linear, self.bank, self.lam, stats=False)

    def nsc(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(y [..., d_out], quad [..., K], sqnorm [...])``; see :func:`nsc_kernels.merged_lora_nsc`.

        Of a layer that ``fully_shard`` has sharded, ``register_fsdp_forward_method(layer, "nsc")`` makes it callable.
        """
        return merged_linear(z, self.linear, self.bank, self.lam, stats=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep_wide(t: Tensor) -> Tensor:
            applied = fn(t)
            return applied if applied.dtype.itemsize >= 4 else t.to(applied.device, torch.float32)

        if recurse:
            for name, child in self.named_children():
                # Where lam has a parametrization it is in there.
                child._apply(keep_wide if name == "parametrizations" else fn)
        # What is left is lam and its gradient.
        return super()._apply(keep_wide, recurse=False)


def _never_called(*arguments: Any) -> None:
    pass
