"""The tables of a GPU run, and the ledger entry that it earns.

    python -m bench.hardware.report FOLDER            what the stages left there; are the kernels shown correct?
    python -m bench.hardware.report FOLDER --accept   also enter it in nsc_kernels/triton/verified.json

An entry needs every trial of the correctness stage for that backend, at this checkout's source: none failed, none
missing, one launch in each direction. Not counted against a backend: what the CUDA C++ kernels do not serve (float32,
widths that are no multiples of 8; Triton serves everything), too little free memory for the one case beyond 2^31
elements, and what nothing promises to be possible (repeats.QUESTIONS). A dry run earns none. Neither a GPU nor a
build with CUDA is needed to accept the rows of a machine that had them. Exits with 0 if every backend with trials was
shown correct.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from nsc_kernels import verified_hardware
from nsc_kernels.bench.measuring import read_rows
from nsc_kernels.bench.trials import results, under_way
from nsc_kernels.printing import exit_status

from ..merging.merge_step_tables import print_merge_step
from .check import trials
from .repeats import QUESTIONS
from .speed_tables import print_ceilings, print_speed

Row = dict[str, Any]
OPTIONAL = ("beyond_int32", *QUESTIONS)  # may be impossible on a machine


def of_backend(path: Path, backend: str) -> list[Row]:
    return [row for row in results(path) if row["backend"] == backend]


def shortcomings(folder: Path, backend: str) -> list[str]:
    """Why the rows do not show a backend's kernels correct; empty if they do."""
    rows = {row["trial"]: row for row in of_backend(folder / "correctness.jsonl", backend)}
    launches = of_backend(folder / "launches.jsonl", backend)
    source = verified_hardware.source(backend) or verified_hardware.checkout_source(backend)
    found = []
    if any(row["dry_run"] or row["source"] != source for row in [*rows.values(), *launches]):
        found.append("rows of a dry run or of another source")
    missing = trials([backend], dry_run=False).keys() - rows.keys()
    if missing:
        found.append(f"{len(missing)} trials are missing, as {min(missing)}")
    failed = [row for row in rows.values() if row.get("passed") is not True and not excused(row)]
    if failed:
        found.append(f"{len(failed)} trials did not pass, the first: {failed[0]['trial']}: {failed[0]['why']}")
    if not any(row.get("passed") for row in rows.values()):
        found.append("no trial passed")
    if len({row["arch"] for row in rows.values() if "arch" in row}) > 1:
        found.append("rows of several architectures")
    counted = {row.get("launches", "not counted") for row in launches}
    if counted != {1}:
        found.append(f"launches per call: {sorted(map(str, counted)) or 'not counted'}")
    return found


def excused(row: Row) -> bool:
    """Whether a trial that did not pass says nothing against the kernels, by what it is and not by what they said."""
    if row.get("passed", False) is not None:
        return False
    if row["what"] in OPTIONAL:
        return True
    case = row["case"]
    served = case["dtype"] in ("bfloat16", "float16") and case["d_in"] % 8 == case["d_out"] % 8 == 0
    return row["backend"] == "cuda" and not served


def entry(folder: Path, backend: str) -> Row:
    rows = of_backend(folder / "correctness.jsonl", backend)
    facts = next(row for row in read_rows(folder / "environment.jsonl") if row["what"] == "environment")
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


def accept(earned: Row) -> None:
    """Put an entry in the place of the backend's earlier one on that architecture."""
    verified_hardware.entries.cache_clear()
    key = (earned["backend"], earned["arch"])
    kept = [e for e in verified_hardware.entries() if (verified_hardware.backend_of(e), e["arch"]) != key]
    temporary = verified_hardware.VERIFIED.with_suffix(".tmp")
    temporary.write_text(json.dumps([*kept, earned], indent=2) + "\n")
    os.replace(temporary, verified_hardware.VERIFIED)
    verified_hardware.entries.cache_clear()


def print_correctness(folder: Path) -> list[str]:
    """Prints what did not pass, and where a stage was cut off; returns the backends that were tried."""
    rows = results(folder / "correctness.jsonl")
    refused = {row["trial"] for row in rows if row.get("passed") is False}
    for row in rows:
        if row.get("passed") is False or ("ended" in row and row["trial"] not in refused):
            print(f"FAILED {row['trial']}: {row['why']}")
        elif row.get("passed", True) is None and row["what"] in OPTIONAL:
            print(f"not tried: {row['trial']}: {row['why']}")
    for path in sorted(folder.glob("*.jsonl")):
        for trial in under_way(path):
            print(f"{path.name} was cut off during {trial}")
    return [name for name in verified_hardware.BACKENDS if any(row["backend"] == name for row in rows)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--accept", action="store_true", help="enter the result in the ledger, if it earns an entry")
    args = parser.parse_args()
    copy = print_ceilings(args.folder)
    print_speed(args.folder, copy)
    if (args.folder / "merge-step.jsonl").is_file():
        print_merge_step(args.folder / "merge-step.jsonl")
    trying = print_correctness(args.folder)
    shown = 0
    for backend in trying:
        missing = shortcomings(args.folder, backend)
        if missing:
            print(f"{backend}: not shown correct: {'; '.join(missing)}")
            continue
        shown += 1
        earned = entry(args.folder, backend)
        print(f"{backend}: shown correct on {earned['arch']} ({earned['cases']} trials) at {earned['source'][:12]}")
        if args.accept:
            accept(earned)
    if not trying:
        print("no trial of any backend is there")
    return int(not trying or shown < len(trying))


if __name__ == "__main__":
    sys.exit(exit_status(main))
