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


@cache
def cpu_entries() -> ctypes.CDLL:
    """libnsc_cpu, which is loaded, with the functions that :mod:`nsc_kernels.entries` calls."""
    library = ctypes.CDLL(str(LIBRARY_DIR / "libnsc_cpu.so"))
    library.nsc_cpu_entries.restype = library.nsc_cpu_draw.restype = ctypes.c_char_p
    library.nsc_cpu_draw.argtypes = [*[ctypes.c_int64] * 4, ctypes.c_void_p]
    return library


@cache
def _cuda_library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY_DIR / "libnsc_cuda.so"))
    library.nsc_cuda_source.restype = ctypes.c_char_p
    library.nsc_cuda_unsupported.restype = ctypes.c_char_p
    return library


def cuda_source() -> str | None:
    """The digest of the sources that libnsc_cuda was built from, None where it does not load."""
    if torch.version.cuda is None or load("nsc_cuda") is not None:
        return None
    return _cuda_library().nsc_cuda_source().decode()


def cuda_unsupported(device: int) -> str | None:
    """Why libnsc_cuda, which is loaded, cannot run on a device; None if it can."""
    return _cuda_library().nsc_cuda_unsupported(device).decode() or None
