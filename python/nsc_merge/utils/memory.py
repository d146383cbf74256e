"""How much memory there is, and how much was used."""

from __future__ import annotations

import os
import sys

import torch
from torch import nn


def free_memory(device: torch.device) -> float:
    """Bytes of a device that a program may count on; 0 if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in os.sysconf_names:
        # What a container may use is not told reliably, so no more than a few GiB are taken for granted.
        return min(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), 4 * 2**30)
    return 0.0


def total_memory(device: torch.device) -> int:
    """Bytes that there are on a device at all; 0 if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "cpu" and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0


def reset_peak(model: nn.Module) -> None:
    """Forget earlier peaks of the memory of the GPU that the model is on."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(model: nn.Module) -> int:
    """Most memory of the model's GPU in use since :func:`reset_peak`; on the CPU, most that this process ever held."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    # In bytes on macOS, in kibibytes elsewhere.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def size_said(count: float) -> str:
    """A number of bytes, for a person."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
