"""Layers that ``kernels.kernelize`` puts under a module of yours: forwards without state of their own.

In a build they stand in ``layers``, and call that build's operator. What they find on the module that takes them over
is written at each class. ``bank`` may be an ``AdapterBank`` of any build or of the installed package, or any other
module with

    A        ``[R, d_in]``, the down-projections packed along the rank
    Bt       ``[R, d_out]``, the up-projections, transposed, with their scaling
    offsets  ``K + 1`` ints; adapter k owns rows ``offsets[k]:offsets[k + 1]``

Both factors are frozen: gradients flow to z and ``lam``.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...bank import AdapterBank
from ...functional import merged_linear

# Banks of other classes, as this build's class with the same tensors. Not kept on the bank itself, which would then be
# copied and pickled with it.
_KEPT: WeakKeyDictionary[nn.Module, AdapterBank] = WeakKeyDictionary()


def own_bank(bank: Any) -> AdapterBank:
    """``bank`` as an ``AdapterBank`` of this build that shares its tensors.

    Raises:
        TypeError: if it has not what a bank needs.
        ValueError: if these do not fit each other.
        RuntimeError: if a factor asks for a gradient, which the operator does not compute.
    """
    if isinstance(bank, AdapterBank):
        return bank
    missing = [name for name in ("A", "Bt", "offsets") if not hasattr(bank, name)]
    if missing or not isinstance(bank, nn.Module):
        lack = f"without {' and '.join(missing)}" if missing else "which is no nn.Module"
        raise TypeError(f"bank must be a module with A, Bt and offsets, found {type(bank).__name__}, {lack}")
    held: Any = bank
    A, Bt, offsets = held.A, held.Bt, tuple(held.offsets)
    if torch.is_grad_enabled() and (A.requires_grad or Bt.requires_grad):
        name = "A" if A.requires_grad else "Bt"
        raise RuntimeError(
            f"bank.{name} requires a gradient, but the factors are frozen here: freeze them with "
            "bank.requires_grad_(False), or leave this module out of kernelize (condition=) while they are trained"
        )
    if torch.compiler.is_compiling():
        return AdapterBank(A, Bt, offsets)
    kept = _KEPT.get(bank)
    if kept is None or kept.offsets != offsets or not (_is_shared(kept.A, A) and _is_shared(kept.Bt, Bt)):
        kept = _KEPT[bank] = AdapterBank(A.detach(), Bt.detach(), offsets)
    return kept


def _is_shared(kept: Tensor, given: Tensor) -> bool:
    """Whether what is written into one is in the other: not once a module was moved or converted, which may leave its
    parameters the same objects.
    """
    return (
        kept.data_ptr() == given.data_ptr()
        and kept.shape == given.shape
        and kept.stride() == given.stride()
        and kept.dtype is given.dtype
        and kept.device == given.device
    )


class MergedLoRALinear(nn.Module):
    """``linear(z) + sum_k lam_k s_k B_k A_k z`` for a module with a frozen ``linear``, a ``bank`` and ``lam [K]``.

    ``forward(z [..., d_in])`` returns ``[..., d_out]`` in z's dtype. The factors need not be whitened.
    """

    linear: nn.Module
    bank: nn.Module
    lam: Tensor
    can_torch_compile = True
    has_backward = True

    def forward(self, z: Tensor) -> Tensor:
        return merged_linear(z, self.linear, own_bank(self.bank), self.lam, stats=False)


class MergedLoRALinearNSC(nn.Module):
    """:class:`MergedLoRALinear` for a module whose forward returns the null-space statistics as well.

    ``forward(z [..., d_in])`` returns ``(y [..., d_out], quad [..., K], sqnorm [...])``, the statistics in float32
    (float64 for float64 z). ``quad`` is the quadratic form of Eq. 6 of arXiv 2603.26317 where the rows of ``bank.A``
    are orthonormal within each adapter, as ``AdapterBank.from_factors`` makes them; else it is ``||A_k z||^2``.
    """

    linear: nn.Module
    bank: nn.Module
    lam: Tensor
    can_torch_compile = True
    has_backward = True

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return merged_linear(z, self.linear, own_bank(self.bank), self.lam, stats=True)
