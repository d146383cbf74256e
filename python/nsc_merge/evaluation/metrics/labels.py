"""Labels of classes and tokens, and where they are known."""

from __future__ import annotations

from torch import Tensor

IGNORE = -100


def compared(predicted: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where known labels are predicted, and where labels are known.

    Raises:
        ValueError: if none is known.
    """
    known = labels != IGNORE
    if not bool(known.any()):
        raise ValueError("labels: expected at least one known label, found none")
    return (predicted == labels) & known, known
