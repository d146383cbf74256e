"""The tasks' own models, which methods compare the merged one with: run once per batch, and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor

from nsc_merge.calibration.batches import Batch
from nsc_merge.descent.coefficients import BoundedCoefficients
from nsc_merge.methods.method import Problem
from nsc_merge.models.attachment import presence
from nsc_merge.models.merged.measured_linear import MeasuredLoRALinear
from nsc_merge.models.merged.whole import MergedWhole
from nsc_merge.processes.group import current

# Bytes that are kept; beyond, what was kept for other batches is dropped and computed anew.
LIMIT = 2 * 2**30

Value = TypeVar("Value")


class OwnModels:
    """Turns an attached model into that of one task, or into the base.

    Made while adapters are attached.

    Args:
        problem: the adapters, and the model that they are attached to.
        coefficients: of the attached model.
        present: ``[modules, K]``, where an adapter touches a module that has coefficients.
    """

    def __init__(self, problem: Problem, coefficients: BoundedCoefficients, present: Tensor) -> None:
        self._coefficients = coefficients
        self._present = present.to(coefficients.flat)
        # Shared modules with a share that is not learnt: in its own model, a task has all of its own.
        shared = {
            path: module
            for path, module in problem.model.named_modules()
            if isinstance(module, MeasuredLoRALinear | MergedWhole)
            and not coefficients.has(module)
        }
        self._shared = list(zip(shared.values(), presence(shared, problem.adapters), strict=True))

    @contextmanager
    def of(self, number: int | None) -> Iterator[None]:
        """Task ``number``'s own model, the base for None, without gradients. Afterwards modules with coefficients
        keep what they were given here: whoever runs the merged model next calls ``coefficients.spread()``.
        """
        only = torch.arange(self._present.shape[1], device="cpu") == (-1 if number is None else number)
        merged = [module.lam for module, _ in self._shared]
        with torch.no_grad():
            self._coefficients.give(self._present * only.to(self._present))
            try:
                for module, touched in self._shared:
                    module.lam = (touched & only).to(module.lam)
                yield
            finally:
                for (module, _), lam in zip(self._shared, merged, strict=True):
                    module.lam = lam


class Kept(Generic[Value]):
    """Values computed once per batch and model, which is a task's number, or None for the base.

    Processes that share the work compute together or not at all: a model in shards runs in all of them at once.

    Args:
        size: bytes of a value.
        on_new: told every value that was not known, with batch and model.
    """

    def __init__(self, size: Callable[[Value], int], on_new: Callable[[int | None, Value], None] | None = None) -> None:
        self._size, self._on_new = size, on_new
        # Whether the last call computed anything, in whichever process.
        self.fresh = False
        # The batches are kept alive, so that no other object takes their identity.
        self._values: dict[tuple[int, int | None], tuple[Batch, Value]] = {}
        self.held = 0

    def __call__(
        self, batch: Batch, numbers: Sequence[int | None], compute: Callable[[int | None], Value]
    ) -> dict[int | None, Value]:
        """Model -> the value of that batch, for the models of ``numbers``."""
        places = {number: (id(batch), number) for number in numbers}
        self.fresh = current().any(any(place not in self._values for place in places.values()))
        if self.fresh:
            for number, place in places.items():
                value = compute(number)
                if place not in self._values:
                    self._keep(batch, place, value)
        return {number: self._values[place][1] for number, place in places.items()}

    def _keep(self, batch: Batch, place: tuple[int, int | None], value: Value) -> None:
        if self.held + self._size(value) > LIMIT:
            # Only the batch at hand is kept, then.
            self._values = {one: held for one, held in self._values.items() if one[0] == id(batch)}
            self.held = sum(self._size(held) for _, held in self._values.values())
        self.held += self._size(value)
        self._values[place] = batch, value
        if self._on_new is not None:
            self._on_new(place[1], value)
