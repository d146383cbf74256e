"""Where an output of a task is at real tokens, by the mask that its inputs came with."""

from __future__ import annotations

from torch import Tensor


def real_positions(output: Tensor, mask: Tensor | None) -> Tensor | None:
    """``[N, T]`` bool, False at padding, of an output ``[N, T, C]``; None where the mask does not speak of its
    positions.

    Args:
        output: of every position, or of all but the last where a causal model is scored by the next token; a prediction
            is then real if both tokens are.
        mask: of the inputs, 0 at padding.
    """
    if mask is None or output.dim() != 3:
        return None
    real = mask.bool()
    if output.shape[:2] == real.shape:
        return real
    shifted = real[:, 1:] & real[:, :-1]
    return shifted if output.shape[:2] == shifted.shape else None
