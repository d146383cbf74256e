"""Finding and loading the native libraries that ship inside the package."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch

LIBRARY_DIR = Path(__file__).parent / "lib"


@cache
def load(name: str) -> str | None:
    """Load ``lib/lib<name>.so`` and register its kernels; the reason in words if that fails, else None."""
    path = LIBRARY_DIR / f"lib{name}.so"
    if not path.exists():
        return f"lib{name} was not built (python -m nsc_kernels.info says why)"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} did not load: {error}"
    return None


@cache
def cpu_instruction_sets() -> tuple[str, ...]:
    """The instruction sets of libnsc_cpu that this processor can run, best first."""
    if load("nsc_cpu") is not None:
        return ()
    names = ctypes.CDLL(str(LIBRARY_DIR / "libnsc_cpu.so")).nsc_cpu_isas
    names.restype = ctypes.c_char_p
    return tuple(names().decode().split())
