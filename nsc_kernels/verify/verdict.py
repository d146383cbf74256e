"""What the rows of all trials come to: whether they show a backend's kernels correct, and the ledger's entry for it.

An entry needs every trial for that backend at the source in use: none failed, none missing, one launch in each
direction. Not counted against a backend: what the CUDA C++ kernels do not serve (float32, widths that are no multiples
of 8; Triton serves everything), cases that are larger than the GPU's memory, too little of it free for the one case
beyond 2^31 elements, and what nothing promises to be possible (repeats.QUESTIONS). A dry run earns none.
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

from .. import verified_hardware
from ..bench.measuring import read_rows
from ..bench.trials import results
from . import check, launches
from .cases import Case
from .repeats import QUESTIONS

Row = dict[str, Any]
CORRECTNESS, LAUNCHES, ENVIRONMENT = "correctness.jsonl", "launches.jsonl", "environment.jsonl"
OPTIONAL = ("beyond_int32", *QUESTIONS)  # may be impossible on a machine


def of_backend(path: Path, backend: str) -> list[Row]:
    return [row for row in results(path) if row["backend"] == backend]


def shortcomings(folder: Path, backend: str, settings: str | None = None) -> list[str]:
    """Why the rows do not show a backend's kernels correct; empty if they do.

    ``settings``: those that all rows must have (:class:`nsc_kernels.bench.trials.Trial`); without, all have the same.
    """
    rows = {row["trial"]: row for row in of_backend(folder / CORRECTNESS, backend)}
    launched = {row["trial"]: row for row in of_backend(folder / LAUNCHES, backend)}
    every = [*rows.values(), *launched.values()]
    source = verified_hardware.source(backend) or verified_hardware.checkout_source(backend)
    found = []
    if any(row["dry_run"] or row["source"] != source for row in every):
        found.append("rows of a dry run or of another source")
    if len({row.get("settings") for row in every} | ({settings} if settings else set())) > 1:
        found.append("rows of several GPUs, or of other versions of torch or Triton")
    missing = check.trials([backend], dry_run=False).keys() - rows.keys()
    missing |= launches.trials([backend], dry_run=False).keys() - launched.keys()
    if missing:
        found.append(f"{len(missing)} trials are missing, as {min(missing)}")
    failed = [row for row in rows.values() if row.get("passed") is not True and not excused(row)]
    if failed:
        found.append(f"{len(failed)} trials did not pass, the first: {failed[0]['trial']}: {failed[0]['why']}")
    if not any(row.get("passed") for row in rows.values()):
        found.append("no trial passed")
    if len({row["arch"] for row in rows.values() if "arch" in row}) > 1:
        found.append("rows of several architectures")
    uncounted = [row for row in launched.values() if "launches" not in row]
    if uncounted:
        first = uncounted[0]
        found.append(f"{len(uncounted)} launches could not be counted, the first: {first['trial']}: {first.get('why')}")
    counted = {row["launches"] for row in launched.values() if "launches" in row}
    if counted - {1}:
        found.append(f"launches per call: {sorted(counted)}")
    return found


def excused(row: Row) -> bool:
    """Whether a trial that did not pass says nothing against the kernels, by what it is and not by what they said."""
    if row.get("passed", False) is not None:
        return False
    if row["what"] in OPTIONAL:
        return True
    case = Case(**row["case"])
    if case.memory > row.get("memory", case.memory):
        return True
    served = case.dtype in ("bfloat16", "float16") and case.d_in % 8 == case.d_out % 8 == 0
    return row["backend"] == "cuda" and not served


def entry(folder: Path, backend: str) -> Row:
    """The ledger's entry for a backend whose rows have no shortcomings."""
    rows = of_backend(folder / CORRECTNESS, backend)
    facts = [row for row in read_rows(folder / ENVIRONMENT) if row["what"] == "environment"][-1]
    seen = next(row for row in rows if "arch" in row)
    return {
        "backend": backend,
        "arch": seen["arch"],
        "device": seen["device"],
        "source": seen["source"],
        "torch": facts["torch"],
        "triton": facts["triton"],
        "cases": sum(row.get("passed") is True for row in rows),
    }


def accept(earned: Row, ledger: Path, same: tuple[str, ...] = ("backend", "arch")) -> None:
    """Put an entry in the place of the one in ``ledger`` that agrees with it in the fields ``same``."""
    kept = [e for e in verified_hardware.read(ledger) if any(e.get(field) != earned[field] for field in same)]
    ledger.parent.mkdir(parents=True, exist_ok=True)
    temporary = ledger.with_name(f".{ledger.name}.{secrets.token_hex(8)}")
    try:
        temporary.write_text(json.dumps([*kept, earned], indent=2) + "\n")
        os.replace(temporary, ledger)
    finally:
        temporary.unlink(missing_ok=True)
    verified_hardware.entries.cache_clear()
