"""Which GPU architectures a backend's kernels have been shown correct on, and at which source.

``nsc_kernels/triton/verified.json`` is a list of entries, one per backend, architecture and source, written by
``bench/gpu_report.py --accept`` from a correctness run on that hardware. An entry counts only while the source it names
is the source in use: any edit of a Triton kernel, its launcher or its configurations withdraws it, and any edit of
csrc/cuda once the library is built from it.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from . import native

PACKAGE = Path(__file__).parent / "triton"
CUDA = Path(__file__).parents[1] / "csrc" / "cuda"
VERIFIED = PACKAGE / "verified.json"
SOURCES = ("kernels.py", "steps.py", "columns.py", "configs.py", "../counters.py", "launch.py")
BACKENDS = ("triton", "cuda")


@cache
def triton_source() -> str:
    """sha256 of the sources that decide what the kernel computes, tables of configurations included."""
    files = [PACKAGE / name for name in SOURCES] + sorted((PACKAGE / "tables").glob("*.json"))
    digest = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def source(backend: str) -> str | None:
    """The digest that names a backend's kernels; None where the CUDA library is not loaded."""
    return native.cuda_source() if backend == "cuda" else triton_source()


def checkout_source(backend: str) -> str | None:
    """The digest that a backend built from this checkout has, whether or not it can be loaded; None without one.

    For ``csrc/cuda`` what CMakeLists.txt computes, so that a result from a machine with a GPU can be entered here.
    """
    if backend != "cuda":
        return triton_source()
    files = sorted(path for path in CUDA.glob("*") if path.is_file())
    lines = (f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n" for path in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest() if files else None


@cache
def entries() -> tuple[dict[str, Any], ...]:
    """All entries: ``backend``, ``arch``, ``device``, ``source``, ``torch``, ``triton``, ``cases``."""
    return tuple(json.loads(VERIFIED.read_text())) if VERIFIED.is_file() else ()


def backend_of(entry: dict[str, Any]) -> str:
    """The backend that an entry is about: Triton's where it does not say."""
    return entry.get("backend", "triton")


def verified(arch: str, backend: str = "triton") -> dict[str, Any] | None:
    """The entry that shows the kernels in use correct on ``arch`` ("sm_90"), or None."""
    current = source(backend)
    return next(
        (e for e in entries() if backend_of(e) == backend and e["arch"] == arch and e["source"] == current), None
    )
