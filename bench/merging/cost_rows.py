"""Rows of the cost benchmarks: what they ran on, and where they are kept."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import nsc_kernels as nk
from nsc_merge.utils.atomic_file import write_text


def environment(**more: Any) -> dict[str, Any]:
    """The first row: versions and the date, and what else a benchmark says of its conditions."""
    return {
        "op": "environment",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "nsc_kernels": nk.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "dtype": "float32",
        **more,
    }


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Replace a file by these rows, one JSON object in a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
