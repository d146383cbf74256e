"""Merge coefficients as one leaf tensor, and as a result holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nsc_merge.models.merged.measured_linear import MeasuredLoRALinear
from nsc_merge.processes.group import current


class Coefficients:
    """All coefficients of an attached model as one parameter, so that a step updates a single tensor.

    Attributes:
        flat: ``[modules, K]``, in the order of ``merged``; the modules' own ``lam`` are views of it.
    """

    def __init__(self, merged: Mapping[str, MeasuredLoRALinear]) -> None:
        self._modules = list(merged.values())
        device = self._modules[0].lam.device
        self.flat = nn.Parameter(torch.stack([module.lam.detach().to(device) for module in self._modules]))
        for module in self._modules:
            del module.lam

    def spread(self) -> None:
        """Give every module its row, as part of a new graph."""
        self.give(self.flat)

    def give(self, values: Tensor) -> None:
        """Give every module its row of ``values [modules, K]``."""
        for module, row in zip(self._modules, values.unbind(0), strict=True):
            module.lam = row.to(module.bank.device)

    def add_up(self, total: Tensor) -> Tensor:
        """Where several processes share the work, make the gradient, which was zero before this step, and ``total`` the
        sums over them, by one exchange. Returns ``total``.
        """
        group = current()
        if group.size > 1:
            if self.flat.grad is None:
                self.flat.grad = torch.zeros_like(self.flat)
            group.add([self.flat.grad, total])
        return total


class BoundedCoefficients(Coefficients):
    """Coefficients that the model sees within bounds; outside of them no gradient reaches them."""

    def __init__(self, merged: Mapping[str, MeasuredLoRALinear], clamp: Sequence[float] | None) -> None:
        super().__init__(merged)
        self._clamp = clamp

    @property
    def seen(self) -> Tensor:
        """``[modules, K]``, as the model sees them."""
        return self.flat if self._clamp is None else self.flat.clamp(*self._clamp)

    def spread(self) -> None:
        self.give(self.seen)

    def has(self, module: nn.Module) -> bool:
        """Whether they are those of ``module``, among others."""
        return module in self._modules


def by_path(lam: Tensor, paths: Sequence[str], tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    """Coefficients ``lam [modules, K]`` as a result holds them."""
    return {path: dict(zip(tasks, row, strict=True)) for path, row in zip(paths, lam.tolist(), strict=True)}


def tasks_where(mask: Tensor, paths: Sequence[str], tasks: Sequence[str]) -> dict[str, list[str]]:
    """Path -> tasks where ``mask [modules, K]`` is set, of the modules where it is for some."""
    return {
        path: [task for task, is_set in row.items() if is_set]
        for path, row in by_path(mask, paths, tasks).items()
        if any(row.values())
    }
