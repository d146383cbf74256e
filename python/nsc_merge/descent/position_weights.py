"""What part each position has in the mean null-space ratio of each task (Eq. 4 of arXiv 2603.26317)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nsc_merge.calibration.forward_passes import Pass
from nsc_merge.models.real_tokens import at_positions, mask_named, positions_first, without_heads


class PositionWeights:
    """Weights of the positions of a pass, kept as long as they serve.

    Args:
        model: that is run.
        tasks: how many there are.
        mask: name of the model input ``[B, T]`` that is 0 at padding; None averages over every position.
        unmasked: paths of towers whose positions no mask speaks of; None stands for none.
    """

    def __init__(self, model: nn.Module, tasks: int, mask: str | None, unmasked: Sequence[str | None]) -> None:
        self._model, self._tasks = model, tasks
        self._mask, self._unmasked = mask, [path for path in unmasked if path]
        self._kept: dict[Any, Tensor] = {}
        self._rows: dict[Any, Tensor] = {}

    def begin(self) -> None:
        """Of a pass: what belongs to the batches of the last one is let go."""
        self._kept = {key: kept for key, kept in self._kept.items() if key[0] is None}

    def of(self, path: str, one: Pass, sqnorm: Tensor) -> Tensor:
        """``[..., K]`` or what broadcasts to it: each position's part in the mean of each task, of the positions at
        which the linear at ``path`` is measured in a pass, ``sqnorm [...]`` being what is measured there.

        Raises:
            ValueError: if a mask does not fit, or rows cannot be told apart by task.
        """
        if sqnorm.dim() == 2 and positions_first(self._model, path):
            return self._of_rows(path, one, sqnorm.t()).transpose(0, 1)
        return self._of_rows(path, one, sqnorm)

    def _of_rows(self, path: str, one: Pass, sqnorm: Tensor) -> Tensor:
        mask = one.inside if self._mask is None else mask_named(self._mask, one.whole)
        mask = None if self._is_unmasked(path) else mask
        # Without a mask the weights depend on shapes alone and serve every later pass of the kind.
        kind = (one.tasks, one.sizes, one.part and one.part.key, sqnorm.shape, sqnorm.device)
        key = (None if mask is None else one.key, kind)
        kept = self._kept.get(key)
        if kept is None:
            kept = self._kept[key] = self._new(path, one, sqnorm, mask)
        return kept

    def _new(self, path: str, one: Pass, sqnorm: Tensor, mask: Tensor | None) -> Tensor:
        shape = self._whole_shape(path, one, sqnorm)
        rows = self._owners(one, sqnorm)
        if mask is None:
            positions = shape.numel() // max(rows.shape[0], 1)
            weights = rows / (rows.flatten(0, -2).sum(0) * positions).clamp(min=1)
            return one.mine(weights.expand(shape[0], *weights.shape[1:]))
        told = isinstance(mask, Tensor)
        inner = without_heads(shape)
        if told and mask.shape != inner and len(inner) == 2:
            mask = at_positions(self._model, mask, inner[1])
        if told and mask.shape == inner:
            mask = mask.reshape(shape)
        if not told or mask.shape != shape:
            found = list(mask.shape) if told else type(mask).__name__
            way_out = "batch_tasks=False" if one.inside is not None else "include_pad=True averages over every position"
            raise ValueError(
                f"{self._mask or 'batch_tasks'}: expected shape {list(shape)}, that of the positions measured "
                f"at {path}, found {found}; {way_out}"
            )
        counted = (mask != 0).to(sqnorm)[..., None] * rows
        return one.mine(counted / counted.flatten(0, -2).sum(0).clamp(min=1))

    def _whole_shape(self, path: str, one: Pass, sqnorm: Tensor) -> torch.Size:
        """The shape of what all processes measure in a pass, of which this one measures ``sqnorm``."""
        rows = sum(one.sizes) if one.sizes is not None else None
        if one.part is not None and one.part.rows is not None:
            rows = one.part.rows.stop - one.part.rows.start
        if rows is not None and rows != sqnorm.shape[0]:
            raise ValueError(
                f"batch_tasks: {path} sees an input of {sqnorm.shape[0]} rows for {rows} rows of "
                "calibration data, so rows cannot be told apart by task; use batch_tasks=False"
                + (" in one process" if one.part is not None else "")
            )
        total = one.part.total if one.part is not None else None
        return sqnorm.shape if total is None else torch.Size([total, *sqnorm.shape[1:]])

    def _owners(self, one: Pass, sqnorm: Tensor) -> Tensor:
        """``[rows, 1, ..., K]``: 1 where a row belongs to a task. One row where all belong to the same."""
        key = (one.tasks, one.sizes, sqnorm.dim(), sqnorm.device)
        kept = self._rows.get(key)
        if kept is None:
            owners = torch.zeros(len(one.tasks), self._tasks, dtype=sqnorm.dtype, device="cpu")
            for source, numbers in enumerate(one.tasks):
                owners[source, list(numbers)] = 1
            sizes = torch.tensor(one.sizes if one.sizes is not None else [1], device="cpu")
            shape = (-1, *[1] * (sqnorm.dim() - 1), self._tasks)
            # Built on the host once and kept, so that no later step copies anything to the device.
            kept = self._rows[key] = owners.repeat_interleave(sizes, 0).view(shape).to(sqnorm.device)
        return kept

    def _is_unmasked(self, path: str) -> bool:
        return any(path.startswith(f"{tower}.") for tower in self._unmasked)
