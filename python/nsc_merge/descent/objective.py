"""What an objective is that :mod:`nsc_merge.descent.optimisation` minimises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from nsc_merge.calibration.batches import Batch


class Parameters(Protocol):
    """The coefficients ``flat [modules, K]``, one leaf tensor."""

    @property
    def flat(self) -> Tensor: ...


class Objective(Protocol):
    """What can be minimised; see :class:`nsc_merge.descent.null_space_objective.Objective`."""

    batch_tasks: bool | None

    @property
    def coefficients(self) -> Parameters: ...

    def accumulate(self, drawn: Sequence[Batch]) -> Tensor:
        """Add the gradient on one batch per task to ``coefficients.flat.grad``; returns the objective per task."""
        ...

    def measure(self, drawn: Sequence[Batch]) -> Tensor:
        """What :meth:`accumulate` returns, and no gradient."""
        ...

    def remembered(self) -> dict[str, Tensor]:
        """What the next step depends on beside the coefficients and the batches of the steps before; nothing before the
        first."""
        ...

    def replay(self, drawn: Sequence[Batch]) -> None:
        """A step before the one that is gone on from: what is kept of its batches, without its gradient."""
        ...

    def recall(self, tensors: Mapping[str, Tensor], dead: Tensor) -> None:
        """Take back what was :meth:`remembered`, after all steps before were replayed, in which nothing depended on
        the coefficients ``dead [modules, K]``."""
        ...
