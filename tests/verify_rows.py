"""Rows of a correctness run in which everything went well, made up for tests of what rows show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nsc_kernels import verified_hardware
from nsc_kernels.verify import launches
from nsc_kernels.verify.check import trials

Row = dict[str, Any]
FACTS = {"what": "environment", "torch": "2.11.0", "triton": "3.6.0", "source": "x", "dry_run": False}


def passing(backend: str) -> list[Row]:
    """The rows of a run in which everything went well."""
    rows: list[Row] = []
    for key, trial in trials([backend], dry_run=False).items():
        case = trial.payload.case
        facts = {
            "trial": key,
            "backend": backend,
            "source": verified_hardware.checkout_source(backend),
            "dry_run": False,
        }
        served = case is None or (case.dtype != "float32" and case.d_in % 8 == case.d_out % 8 == 0)
        passed = True if backend == "triton" or served else None
        row = {
            "what": trial.payload.what, "case": case and case._asdict(), "arch": "sm_90", "device": "a GPU",
            "passed": passed, "why": None if passed else "not served",
        }  # fmt: skip
        rows += [facts | {"started": 0}, facts | row, facts | {"ended": "done"}]
    return rows


def write(folder: Path, rows: list[Row], **also: Any) -> None:
    """The rows of a run as files, and those of launches of the same backends; what each has ``also``."""
    counted = [
        {
            "trial": key,
            "backend": backend,
            "source": verified_hardware.checkout_source(backend),
            "dry_run": False,
            "launches": 1,
        }
        for backend in dict.fromkeys(row["backend"] for row in rows)
        for key in launches.trials([backend], dry_run=False)
    ]
    for name, content in (("correctness", rows), ("launches", counted), ("environment", [FACTS])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row | also) + "\n" for row in content))
