"""What batches hold, in numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from nsc_merge.calibration.batches import MASK, Batch


@dataclass(frozen=True)
class Summary:
    """Of all batches of a task.

    Attributes:
        samples: rows, over all batches.
        batches: how many there are.
        tokens: of a batch on average, without padding; 0 where batches are of images alone.
        padding: share of the tokens that are padding.
    """

    samples: int
    batches: int
    tokens: float
    padding: float


def summary(batches: Iterable[Batch]) -> Summary:
    """Count samples, tokens and padding."""
    samples = count = real = places = 0
    for batch in batches:
        count += 1
        ids, mask = batch.get("input_ids"), batch.get(MASK)
        first = ids if isinstance(ids, Tensor) else next(iter(batch.values()))
        samples += len(first)
        if isinstance(ids, Tensor):
            places += ids.numel()
            real += int((mask != 0).sum()) if isinstance(mask, Tensor) and mask.dim() == 2 else ids.numel()
    return Summary(samples, count, real / max(count, 1), 1 - real / places if places else 0.0)
