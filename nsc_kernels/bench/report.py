"""A report: one JSONL file with the machine, its ceilings, and every figure with all its samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .trials import results


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a report: of every trial its last run, in order.

    Raises:
        OSError: if there is no such file.
        ValueError: if it is not a report.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; a report is what --out FILE.jsonl wrote")
    try:
        return results(path)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a report of python -m nsc_kernels.bench: {error}") from error
