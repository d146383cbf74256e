"""A linear with its merged updates, measured on request."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nsc_kernels import MergedLoRALinear
from nsc_merge.models.bases.stored_weights import NotAtHand, is_plain
from nsc_merge.models.merged.folded_linear import Folded

Measure = Callable[[str, Tensor, Tensor], None]


class MeasuredLoRALinear(MergedLoRALinear):
    """A merged linear that hands ``quad [..., K]`` and ``sqnorm [...]`` of its input to a callback.

    Beyond the low-rank updates of its bank it can hold, per adapter, an update of the bias and, for a layer
    that was trained in full, of the whole weight; and of DoRA, a gain of what the base's weight gives. The same
    coefficients scale them.

    Attributes:
        path: of the linear in the model.
        measure: the callback, while the linear is measured.
        folded: what computes the linear and its low-rank updates in one where that pays, while it is not measured.
        biases: updates of the bias, ``[K, d_out]``, if some adapter has one.
        denses: updates of the whole weight, ``[K, d_out, d_in]``, if some adapter has one.
        gains: ``[K, d_out]``, if some adapter has one.
        offset: the base's bias, which no gain counts for, if there are gains and the base has one.
        weight_taken: whether somebody asked for :attr:`weight`, perhaps to compute with it unseen.
    """

    path: str = ""
    measure: Measure | None = None
    folded: Folded | None = None
    biases: Tensor | None = None
    denses: Tensor | None = None
    gains: Tensor | None = None
    offset: Tensor | None = None
    weight_taken: bool = False

    @property
    def weight(self) -> Tensor:
        """The merged weight ``[d_out, d_in]``, for models that compute with it by themselves, as nn.MultiheadAttention
        does; differentiable in the coefficients. Of a weight that is not at hand, being offloaded or quantised, only
        shape and dtype: computing with it is refused, as the update would be left out.
        """
        self.weight_taken = True
        own = self.linear.weight
        if not is_plain(own) or not isinstance(self.linear, nn.Linear):
            return NotAtHand.of(own, (self.out_features, self.in_features), self.path)
        A, Bt, _ = self.bank.packed
        # One coefficient for each row of A, without asking the device for anything.
        shares = torch.cat([one.expand(rank) for one, rank in zip(self.lam, self.bank.ranks, strict=True)])
        scaled = Bt * shares[:, None]
        merged = own + scaled.t() @ A.to(scaled)
        if self.gains is not None:
            merged = merged + (self.lam @ self.gains)[:, None] * own
        if self.denses is not None:
            merged = merged + torch.tensordot(self.lam, self.denses.to(self.lam), 1)
        return merged.to(own.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The merged bias ``[d_out]``, where the linear has one or an adapter gives it one."""
        own = super().bias
        if self.biases is None:
            return own
        update = self.lam @ self.biases.to(self.lam)
        return update.to(self.biases.dtype) if own is None else (own + update).to(own.dtype)

    def forward(self, z: Tensor) -> Tensor:
        if self.measure is not None:
            y, quad, sqnorm = self.nsc(z)
            self.measure(self.path, quad, sqnorm)
        elif self.folded is not None and self.folded.pays(z):
            y = self.folded(z, self.lam)
        elif self.bank.R == 0:
            y = self.linear(z)
        else:
            y = super().forward(z)
        # The coefficients stay as wide as they are: rounded to bfloat16, small steps would change nothing.
        if self.denses is not None:
            stacked = self.denses.flatten(0, 1).to(z.dtype)
            shares = nn.functional.linear(z, stacked).unflatten(-1, self.denses.shape[:2])
            y = y + (self.lam[:, None] * shares).sum(-2).to(y.dtype)
        if self.gains is not None:
            given = self.linear(z).to(y.dtype)
            given = given if self.offset is None else given - self.offset.to(y.dtype)
            y = y + ((self.lam @ self.gains) * given).to(y.dtype)
        if self.biases is not None:
            y = y + (self.lam @ self.biases.to(self.lam.dtype)).to(y.dtype)
        return y
