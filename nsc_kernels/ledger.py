"""Which GPU architectures the Triton kernel has been shown correct on, and at which source.

``nsc_kernels/triton/verified.json`` is a list of entries, one per architecture and source, written by
``bench/gpu_report.py --accept`` from a correctness run on that hardware. An entry counts only while the source it names
is the source installed here: any edit of the kernel, its launcher or its configurations withdraws it.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent / "triton"
VERIFIED = PACKAGE / "verified.json"
SOURCES = ("kernels.py", "columns.py", "configs.py", "counters.py", "launch.py")


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


@cache
def entries() -> tuple[dict[str, Any], ...]:
    """All entries: ``arch``, ``device``, ``source``, ``torch``, ``triton``, ``cases``."""
    return tuple(json.loads(VERIFIED.read_text())) if VERIFIED.is_file() else ()


def verified(arch: str) -> dict[str, Any] | None:
    """The entry that shows the installed Triton kernel correct on ``arch`` ("sm_90"), or None."""
    return next((e for e in entries() if e["arch"] == arch and e["source"] == triton_source()), None)
