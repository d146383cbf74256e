"""A merged linear as one product with the merged weight, for steps of many tokens.

The fused operator applies the adapters of every task to every token, in both directions. Where a step runs many tokens
on the same coefficients, adding ``sum_k lam_k s_k B_k A_k`` to the weight once costs less: a pass then needs the
adapters only for the gradient of the coefficients, ``dlam_k = sum_t (A_k z_t) . (s_k B_k^T dy_t)``, which is half of
their products. The weight's own gradient, a matrix as large as the weight, is never formed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nsc_kernels import AdapterBank
from nsc_merge.models.bases.stored_weights import is_plain

# Bytes of merged weights that a merge may hold unless told to.
LIMIT = 2**30


def least_tokens(d_in: int, d_out: int, R: int) -> float:
    """Tokens of a step from which on it costs less to fold adapters of ``R`` ranks in all into a weight
    ``[d_out, d_in]`` than to apply them to every token.

    Folding takes ``R d_in d_out`` multiply-adds and saves ``R (d_in + d_out)`` per token. What the two come to was
    measured (bench/merging/fold_costs.py): products with the weight run somewhat faster than the fused operator's, and
    reading and writing it costs as much as 16 ranks.
    """
    return 0.7 * (1 + 16 / R) * d_in * d_out / (d_in + d_out)


class Folded:
    """A frozen linear and its adapters, folded into one weight in those steps that have the tokens to repay it.

    Whether a step has them is decided when it first calls the linear, from its batches alone: a run that is resumed
    decides as it would have.

    Args:
        linear: float32 or float64, which can hold the sum without losing small updates.
        bank: its adapters.
        always: fold in every step, however few its tokens.

    Attributes:
        share: part of the step's inputs that the pass at hand holds.
    """

    def __init__(self, linear: nn.Linear, bank: AdapterBank, always: bool = False) -> None:
        self.share = 1.0
        self._linear = linear
        self._A, self._Bt, offsets = bank.packed
        counts = torch.tensor([end - start for start, end in itertools.pairwise(offsets)], device="cpu")
        # [R, K]: 1 where a row of A belongs to an adapter.
        self._owners = torch.eye(len(counts), device="cpu").repeat_interleave(counts, 0).to(linear.weight)
        self._least = 0.0 if always else least_tokens(linear.in_features, linear.out_features, bank.R)
        self._weight = torch.empty(0, device="cpu")
        self._lam = torch.empty(0, device="cpu")
        self._decided: bool | None = None

    def begin(self, lam: Tensor) -> None:
        """A step begins, with the coefficients ``lam [K]``."""
        self._lam, self._decided = lam, None

    def pays(self, z: Tensor) -> bool:
        """Whether this step folds. Its first call decides for all of its passes, from the tokens of ``z [..., d_in]``
        and the pass's :attr:`share`, and folds.
        """
        if self._decided is None:
            self._decided = z.shape[:-1].numel() >= self._least * self.share
            if self._decided:
                self.refresh(self._lam)
        return self._decided

    @torch.no_grad()
    def refresh(self, lam: Tensor) -> None:
        """Fold with the coefficients ``lam [K]``."""
        if not self._weight.numel():
            self._weight = torch.empty_like(self._linear.weight)
        scaled = self._Bt * (self._owners @ lam.to(self._owners))[:, None]
        torch.addmm(self._linear.weight, scaled.t(), self._A, out=self._weight)

    def __call__(self, z: Tensor, lam: Tensor) -> Tensor:
        """``z [..., d_in]`` to ``[..., d_out]``, with gradients for both; ``lam`` must be what was folded last."""
        # As rows: of more dimensions the product is a view, and what a Function gives as one may not be changed in
        # place, as a ReLU behind a linear does.
        rows = z.reshape(-1, z.shape[-1])
        y = _FoldedLinear.apply(rows, lam, self._weight, self._linear.bias, self._A, self._Bt, self._owners)
        return y.view(*z.shape[:-1], y.shape[-1])


class _FoldedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, lam: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, Bt: Tensor, owners: Tensor
    ) -> Tensor:
        u = z @ A.t() if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(u, weight, Bt, owners)
        return nn.functional.linear(z, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        u, weight, Bt, owners = ctx.saved_tensors
        dz = dy @ weight if ctx.needs_input_grad[0] else None
        dlam = None if u is None else (dy @ Bt.t()).mul_(u).sum(0) @ owners
        return dz, dlam, None, None, None, None, None


def should_fold(asked: bool | None, weights: Iterable[Tensor], device: torch.device | None = None) -> bool | None:
    """What the option ``fold`` comes to. None lets every linear and step decide on a CPU, where it has been measured
    what pays, in dtypes that hold the sum and as long as the merged weights are not large. On a GPU neither the
    arithmetic of single precision nor the cost of writing a weight anew is known to leave the same margin.

    Args:
        asked: the option.
        weights: of the linears that might be folded.
        device: that they will be on, where they have no numbers yet.

    Returns:
        True to fold all of ``weights``, None to fold those that a step has the tokens for, False to fold none.

    Raises:
        ValueError: if it was asked for and cannot be.
    """
    # What is offloaded or quantised is left as it is, by can_fold.
    weights = [weight for weight in weights if is_plain(weight) or (device is not None and weight.is_meta)]
    unfit = next((weight for weight in weights if not _holds_the_sum(weight, device or weight.device)), None)
    if asked and unfit is not None:
        raise ValueError(
            f"fold: expected weights in float32 or float64 and no autocast, found {unfit.dtype}"
            + (" under autocast" if torch.is_autocast_enabled((device or unfit.device).type) else "")
        )
    if asked is not None:
        return asked
    small = sum(weight.numel() * weight.element_size() for weight in weights) <= LIMIT
    may = small and unfit is None and all((device or weight.device).type == "cpu" for weight in weights)
    return None if may else False


def _holds_the_sum(weight: Tensor, device: torch.device) -> bool:
    return weight.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(device.type)


def can_fold(linear: nn.Module) -> bool:
    """Whether calling ``linear`` is its product and nothing else, so that another product can stand for it."""
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    return type(linear) is nn.Linear and is_plain(linear.weight) and "forward" not in vars(linear) and not any(hooks)
