"""Keeps what a frozen tower in front of the adapted blocks returns, batch by batch."""

from __future__ import annotations

import copy
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from nsc_merge.calibration.batches import Batch
from nsc_merge.calibration.forward_passes import Pass
from nsc_merge.models.forward_contexts import restore_forward

LIMIT = 2 * 2**30


class _Noted(tuple):
    """A tuple that notes which of its elements are asked for by index."""

    def __new__(cls, values: Any) -> _Noted:
        noted = super().__new__(cls, values)
        noted.used = set()
        return noted

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int):
            self.used.add(index % len(self))
        else:
            self.used.update(range(len(self)))
        return super().__getitem__(index)

    def __iter__(self) -> Any:
        self.used.update(range(len(self)))
        return super().__iter__()

    used: set[int]


class TowerCache:
    """Answers a frozen tower's second call for the same batches with the first call's output.

    Batches count as the same if they are the same objects. Of a tuple in the output, such as all hidden
    states, only the elements that the model took are kept. A context manager that puts itself in place of the
    tower's forward.

    Args:
        tower: a module that depends on the model inputs alone.
        limit: bytes to keep at most; what comes later is computed every time.
    """

    def __init__(self, tower: nn.Module, limit: int = LIMIT) -> None:
        self._tower, self._limit, self._held = tower, limit, 0
        # The batches are kept alive with the output, so that no other object takes their identity.
        self._kept: dict[tuple[Any, ...], tuple[tuple[Batch, ...], Any]] = {}
        self._fresh: tuple[tuple[Any, ...], MutableMapping[str, Any]] | None = None
        self._pass: Pass | None = None
        self._call = 0

    def __enter__(self) -> TowerCache:
        self._own = vars(self._tower).get("forward")
        self._compute = self._tower.forward
        self._tower.forward = self._forward
        return self

    def __exit__(self, *error: object) -> None:
        restore_forward(self._tower, self._own)
        self._kept.clear()

    def now(self, one: Pass) -> None:
        """Say which batches the next forward of the model is for."""
        self._settle()
        self._pass, self._call = one, 0

    def _forward(self, *arguments: Any, **named: Any) -> Any:
        self._settle()
        assert self._pass is not None, "the tower was called outside of a pass"
        key = (*self._pass.key, self._call)
        self._call += 1
        if key in self._kept:
            # A copy, because LLaVA writes into the object that its tower returns.
            return copy.copy(self._kept[key][1])
        # It has no coefficients in front, but a hook may have what it reads require gradients: PEFT and gradient
        # checkpointing put one there, and a graph that is kept can be gone through once.
        with torch.no_grad():
            output = self._compute(*arguments, **named)
        if not isinstance(output, MutableMapping) or self._held >= self._limit:
            return output
        kept = copy.copy(output)
        for name, value in list(kept.items()):
            if isinstance(value, tuple):
                kept[name] = _Noted(value)
        self._fresh = (key, kept)
        return copy.copy(kept)

    def _settle(self) -> None:
        """Store the last output, now that the model has taken from it what it needs."""
        if self._fresh is None or self._pass is None:
            return
        (key, output), self._fresh = self._fresh, None
        for name, value in list(output.items()):
            if isinstance(value, _Noted):
                output[name] = tuple(
                    element if index in value.used else None for index, element in enumerate(value)
                )
        self._kept[key] = (self._pass.sources, output)
        self._held += sum(_nbytes(value) for value in output.values())


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.untyped_storage().nbytes()
    return sum(_nbytes(element) for element in value) if isinstance(value, tuple) else 0
