"""The table of a GPU run, and the ledger entry that it earns.

    python bench/gpu_report.py FOLDER            what the stages left there, and whether the kernels are shown correct
    python bench/gpu_report.py FOLDER --accept   also enter it in nsc_kernels/triton/verified.json

An entry needs every trial of the correctness stage, for the Triton backend, at the source installed now: none failed,
none missing, one launch in each direction. A dry run earns none.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from gpu_check import trials
from gpu_common import read_rows
from nsc_kernels import ledger

COLUMNS = (("forward", "cold"), ("forward", "warm"), ("backward", "cold"), ("backward", "warm"))


def correctness(folder: Path) -> list[dict[str, Any]]:
    """The rows of the check, or of its shares where it was stopped before it put them together."""
    return read_rows(folder / "correctness.jsonl") or [
        row for part in sorted(folder.glob("correctness.*.jsonl")) for row in read_rows(part)
    ]


def shortcomings(folder: Path) -> list[str]:
    """Why the rows do not show the Triton kernel correct; empty if they do."""
    rows = [row for row in correctness(folder) if row["backend"] == "triton"]
    launches = [row for row in read_rows(folder / "launches.jsonl") if row["backend"] == "triton"]
    found = []
    if any(row["dry_run"] or row["source"] != ledger.triton_source() for row in rows + launches):
        found.append("rows of a dry run or of another source")
    expected = sum(1 for _ in trials(["triton"], False, False))
    if len(rows) != expected:
        found.append(f"{len(rows)} of {expected} trials are there")
    failed = [row for row in rows if row["passed"] is not True]
    if failed:
        found.append(f"{len(failed)} trials did not pass, the first: {failed[0]['what']} {failed[0]['why']}")
    if len({row.get("arch") for row in rows}) > 1:
        found.append("rows of several architectures")
    if not launches or any(row["launches"] != 1 for row in launches):
        found.append(f"launches per call: {sorted({row['launches'] for row in launches}) or 'not counted'}")
    return found


def entry(folder: Path) -> dict[str, Any]:
    rows = [row for row in correctness(folder) if row["backend"] == "triton"]
    facts = next(row for row in read_rows(folder / "environment.jsonl") if row["what"] == "environment")
    return {
        "arch": rows[0]["arch"],
        "device": rows[0]["device"],
        "source": ledger.triton_source(),
        "torch": facts["torch"],
        "triton": facts["triton"],
        "cases": len(rows),
    }


def print_ceilings(folder: Path) -> float | None:
    """Prints the environment; returns the copy bandwidth in TB/s."""
    rows = {row["what"]: row for row in read_rows(folder / "environment.jsonl")}
    facts = rows.pop("environment", {})
    names = ("device", "arch", "torch", "triton", "nvidia_smi")
    print("  ".join(f"{name} {facts[name]}" for name in names if facts.get(name)))
    for what, row in rows.items():
        print(f"  {what:<14} {row['p50']:10.3f} {row['unit']}")
    return rows["copy"]["p50"] if "copy" in rows else None


def print_speed(folder: Path, copy: float | None) -> None:
    shapes: dict[tuple[Any, ...], None] = {}
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in read_rows(folder / "bench.jsonl"):
        shape = tuple(row[name] for name in ("name", "T", "d_in", "d_out", "K", "r"))
        if "error" in row:
            print(f"  {row['provider']} {row['direction']} {shape}: {row['error']}")
            continue
        shapes[shape] = None
        found[(shape, row["provider"], row["how"], row["direction"], row["cache"])] = row
    providers = list(dict.fromkeys(key[1] for key in found))
    for how in ("graph", "eager"):
        print(f"{how}: microseconds, and the share of the copy bandwidth on the least bytes")
        print(f"{'':44}" + "".join(f"{direction + ' ' + cache:>20}" for direction, cache in COLUMNS))
        for shape, provider in itertools.product(shapes, providers):
            name, T, d_in, d_out, K, r = shape
            cells = []
            for direction, cache in COLUMNS:
                cell = found.get((shape, provider, how, direction, cache))
                share = f"{100 * cell['tb_per_s'] / copy:4.0f} %" if cell and copy else ""
                cells.append(f"{cell['us_p50']:10.1f} {share}" if cell else "-")
            label = f"{name} T={T} {d_in}->{d_out} R={K * r}"
            print(f"{label:<35}{provider:<9}" + "".join(f"{cell:>20}" for cell in cells))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--accept", action="store_true", help="enter the result in the ledger, if it earns an entry")
    args = parser.parse_args()
    copy = print_ceilings(args.folder)
    print_speed(args.folder, copy)
    for row in correctness(args.folder):
        if row["passed"] is False:
            print(f"FAILED {row['backend']} {row['what']} {row['case']}: {row['why']}")
    missing = shortcomings(args.folder)
    if missing:
        print(f"triton: not shown correct: {'; '.join(missing)}")
        return 1
    earned = entry(args.folder)
    print(f"triton: shown correct on {earned['arch']} ({earned['cases']} trials) at source {earned['source'][:12]}")
    if args.accept:
        kept = [e for e in ledger.entries() if e["arch"] != earned["arch"]]
        ledger.VERIFIED.write_text(json.dumps([*kept, earned], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
