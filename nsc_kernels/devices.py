"""What a device can compute with."""

from __future__ import annotations

import torch
from torch import Tensor


def with_float64(device: torch.device | str) -> torch.device:
    """Where float64 is computed for tensors on ``device``: there, or on the CPU where the device has none, as Apple's
    GPUs (``mps``) and some of Intel's.
    """
    device = torch.device(device)
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return torch.device("cpu")
    return device


def to_float64(t: Tensor) -> Tensor:
    """``t`` in float64, on its own device if that has float64, else on the CPU."""
    return t.to(with_float64(t.device), torch.float64)
