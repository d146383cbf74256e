"""The tables of a GPU run, and the ledger entry that it earns.

    python -m bench.hardware.report FOLDER            what the stages left there; are the kernels shown correct?
    python -m bench.hardware.report FOLDER --accept   also enter it in nsc_kernels/triton/verified.json

What an entry needs is told by nsc_kernels/verify/verdict.py. Neither a GPU nor a build with CUDA is needed to accept
the rows of a machine that had them. Exits with 0 if every backend with trials was shown correct.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nsc_kernels import verified_hardware
from nsc_kernels.bench.trials import results, under_way
from nsc_kernels.printing import exit_status
from nsc_kernels.verify.verdict import CORRECTNESS, OPTIONAL, accept, entry, shortcomings

from ..merging.merge_step_tables import print_merge_step
from .speed_tables import print_ceilings, print_speed


def print_correctness(folder: Path) -> list[str]:
    """Prints what did not pass, and where a stage was cut off; returns the backends that were tried."""
    rows = results(folder / CORRECTNESS)
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
            accept(earned, verified_hardware.VERIFIED)
    if not trying:
        print("no trial of any backend is there")
    return int(not trying or shown < len(trying))


if __name__ == "__main__":
    sys.exit(exit_status(main))
