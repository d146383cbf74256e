"""A module around whose matrices merged updates stand: a mixture's experts, or its router."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nsc_kernels import AdapterBank
from nsc_merge.models.merged.matrices import Matrix

LowRank = Sequence[tuple[int, Tensor, Tensor]]


class MergedMatrix(nn.Module):
    """The coefficients of one matrix ``[K]``, and the updates that they scale.

    Attributes:
        lam, bank, path, linear, measure, folded, gains, biases, denses: as of a merged linear, which stands beside it;
            nothing is measured, and there is no bias.
        matrix: which.
        low_rank: number of the adapter, ``scaling * A [r, d_in]`` and ``B [d_out, r]``, until all are put together.
    """

    path: str = ""
    measure = None
    folded = None
    gains = None
    biases: Tensor | None = None
    denses: Tensor | None = None

    def __init__(self, matrix: Matrix, lam: Tensor, bank: AdapterBank, low_rank: LowRank):
        super().__init__()
        self.matrix, self.lam, self.bank, self.low_rank = matrix, lam, bank, low_rank

    @property
    def linear(self) -> nn.Module:
        module: nn.Module = self.matrix.module
        return module


class MergedParameters(nn.Module):
    """A module that runs with parameters which are the base's plus every update times its coefficient.

    Attributes:
        module: the base's.
        parts: the merged matrices, of all its parameters.
    """

    def __init__(self, parts: Sequence[MergedMatrix]):
        super().__init__()
        self.module = parts[0].linear
        self.parts = nn.ModuleList(parts)
        names = dict.fromkeys(part.matrix.name for part in parts)
        self._sums = {name: _Sum([part for part in parts if part.matrix.name == name]) for name in names}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Such as the number of experts, that models look at.
            return getattr(super().__getattr__("module"), name)

    def merged(self) -> dict[str, Tensor]:
        """The merged parameters by name, differentiable in the coefficients."""
        return {name: one.merged(self.module._parameters[name]) for name, one in self._sums.items()}

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return functional_call(self.module, self.merged(), inputs, named)


class _Sum:
    """The updates of the matrices of one parameter, in one product."""

    def __init__(self, parts: Sequence[MergedMatrix]) -> None:
        self._parts = parts
        self._transposed = parts[0].matrix.transposed
        like = parts[0].bank.A
        ranks: dict[int, int] = {}
        for part in parts:
            for adapter, A, _ in part.low_rank:
                ranks[adapter] = max(ranks.get(adapter, 0), len(A))
        begins = dict(zip(ranks, torch.tensor([0, *ranks.values()], device="cpu").cumsum(0).tolist(), strict=False))
        total, first = sum(ranks.values()), parts[0].matrix
        # Where an adapter's rank is less than its largest, or it has none, rows and columns are 0.
        self._A = like.new_zeros(len(parts), total, first.in_features)
        self._B = like.new_zeros(len(parts), first.out_features, total)
        for place, part in enumerate(parts):
            for adapter, A, B in part.low_rank:
                rows = slice(begins[adapter], begins[adapter] + len(A))
                self._A[place, rows], self._B[place, :, rows] = A, B
            part.low_rank = ()
        adapters = [adapter for adapter, rank in ranks.items() for _ in range(rank)]
        self._of = torch.tensor(adapters, dtype=torch.long, device=like.device)
        numbers = [part.matrix.number or 0 for part in parts]
        self._numbers = torch.tensor(numbers, dtype=torch.long, device=like.device)

    def merged(self, own: Tensor | None) -> Tensor:
        assert own is not None
        lam = torch.stack([part.lam for part in self._parts])
        scaled = self._B.to(lam) * lam[:, self._of].unsqueeze(1)
        update = scaled @ self._A.to(lam)
        if self._transposed:
            update = update.mT
        wide = own.to(lam.dtype).reshape(-1, *own.shape[-2:])
        return wide.index_add(0, self._numbers, update).reshape(own.shape).to(own.dtype)


def around(merged: Mapping[str, Any]) -> dict[str, MergedParameters]:
    """Path of a module -> what stands around it, of the merged matrices among merged modules of all kinds."""
    parts: dict[str, list[MergedMatrix]] = {}
    for module in merged.values():
        if isinstance(module, MergedMatrix):
            parts.setdefault(module.matrix.owner, []).append(module)
    return {owner: MergedParameters(held) for owner, held in parts.items()}
