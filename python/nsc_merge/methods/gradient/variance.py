"""The variance of values that come in parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nsc_kernels.devices import to_float64


class Variance:
    """Of values ``[..., C]`` around the mean of their component, over all that were added."""

    def __init__(self) -> None:
        self._count = 0
        self._origin: Tensor | None = None
        self._sums: list[Tensor] = []

    def add(self, values: Tensor) -> None:
        rows = to_float64(values.flatten(0, -2) if values.dim() > 1 else values[:, None])
        if not len(rows):
            return
        if self._origin is None:
            # Sums of squares far from zero would cancel, and values that are all alike not give 0.
            self._origin = rows[0]
            self._sums = [torch.zeros_like(rows[0]), torch.zeros_like(rows[0])]
        rows = rows - self._origin
        self._count += len(rows)
        self._sums = [self._sums[0] + rows.sum(0), self._sums[1] + rows.square().sum(0)]

    @property
    def moments(self) -> tuple[int, Tensor, Tensor]:
        """How many rows there are, their mean, and their variance around it, by component, on the host."""
        if self._origin is None:
            nothing = torch.zeros((), dtype=torch.float64, device="cpu")
            return 0, nothing, nothing
        mean, square = (total / self._count for total in self._sums)
        return self._count, (self._origin + mean).cpu(), (square - mean.square()).cpu()


def variance_of(parts: Sequence[tuple[int, Tensor, Tensor]]) -> Tensor:
    """Mean over the components, a float64 scalar, of the variance of all rows that several were made of; of each its
    :attr:`Variance.moments`.
    """
    counts, means, inside = zip(*parts, strict=True)
    # From the first, for the reason that each of them has an origin.
    shifts = [mean - means[0] for mean in means]
    total = sum(counts)
    shift = sum((count * one for count, one in zip(counts, shifts, strict=True)), torch.zeros_like(means[0])) / total
    squares = [v + (one - shift).square() for v, one in zip(inside, shifts, strict=True)]
    return (sum(count * square for count, square in zip(counts, squares, strict=True)) / total).mean()
