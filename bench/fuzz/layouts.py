"""Matrices that lie in memory in other ways than one row after another."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

STRIDES = ("plain", "columns_of_wider", "every_other_row", "every_other_column", "transposed")
LAYOUTS = (*STRIDES, "expanded")


def laid_out(x: np.ndarray, layout: str, dtype: torch.dtype, between: float = np.nan) -> Tensor:
    """``x [T, d]`` as a tensor with other strides; ``between`` lies between its elements where something does."""
    t = torch.from_numpy(x).to(dtype)
    T, d = t.shape
    if layout == "columns_of_wider":
        whole = torch.full((T, d + 5), between, dtype=dtype)
        whole[:, 2:-3] = t
        return whole[:, 2:-3]
    if layout == "every_other_row":
        whole = torch.full((2 * T, d), between, dtype=dtype)
        whole[::2] = t
        return whole[::2]
    if layout == "every_other_column":
        whole = torch.full((T, 2 * d), between, dtype=dtype)
        whole[:, ::2] = t
        return whole[:, ::2]
    if layout == "transposed":
        return t.t().contiguous().t()
    if layout == "one_number":
        return t[:1, :1].expand(T, d)
    return t[:1].expand(T, d) if layout == "expanded" else t
