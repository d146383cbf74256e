"""The table of a GPU run, and the ledger entry that it earns.

    python bench/gpu_report.py FOLDER            what the stages left there, and whether the kernels are shown correct
    python bench/gpu_report.py FOLDER --accept   also enter it in nsc_kernels/triton/verified.json

An entry needs every trial of the correctness stage for that backend, at the source installed now: none failed, none
missing, one launch in each direction. What the CUDA C++ kernels do not serve (float32, widths that are no multiples of
8) is not counted against them; Triton serves everything. A dry run earns none. Exits with 0 if every backend with
trials was shown correct.
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


def shortcomings(folder: Path, backend: str) -> list[str]:
    """Why the rows do not show a backend's kernels correct; empty if they do."""
    rows = [row for row in correctness(folder) if row["backend"] == backend]
    launches = [row for row in read_rows(folder / "launches.jsonl") if row["backend"] == backend]
    source = ledger.source(backend)
    found = []
    if source is None:
        found.append("the library that the rows are about is not loaded here")
    if any(row["dry_run"] or row["source"] != source for row in rows + launches):
        found.append("rows of a dry run or of another source")
    expected = sum(1 for name, *_ in trials(list(ledger.BACKENDS), False, False) if name == backend)
    if len(rows) != expected:
        found.append(f"{len(rows)} of {expected} trials are there")
    failed = [row for row in rows if row["passed"] is not True and not not_served(row)]
    if failed:
        found.append(f"{len(failed)} trials did not pass, the first: {failed[0]['what']} {failed[0]['why']}")
    if not any(row["passed"] for row in rows):
        found.append("no trial passed")
    if len({row.get("arch") for row in rows}) > 1:
        found.append("rows of several architectures")
    if not launches or any(row["launches"] != 1 for row in launches):
        found.append(f"launches per call: {sorted({row['launches'] for row in launches}) or 'not counted'}")
    return found


def not_served(row: dict[str, Any]) -> bool:
    """Whether a trial is outside of what the CUDA C++ kernels are for, by the case and not by what they said."""
    case = row["case"]
    if row["backend"] != "cuda" or case is None or row["passed"] is not None:
        return False
    return case["dtype"] not in ("bfloat16", "float16") or case["d_in"] % 8 > 0 or case["d_out"] % 8 > 0


def entry(folder: Path, backend: str) -> dict[str, Any]:
    rows = [row for row in correctness(folder) if row["backend"] == backend]
    facts = next(row for row in read_rows(folder / "environment.jsonl") if row["what"] == "environment")
    return {
        "backend": backend,
        "arch": rows[0]["arch"],
        "device": rows[0]["device"],
        "source": ledger.source(backend),
        "torch": facts["torch"],
        "triton": facts["triton"],
        "cases": sum(row["passed"] is True for row in rows),
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
    trying = [name for name in ledger.BACKENDS if any(row["backend"] == name for row in correctness(args.folder))]
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
            ledger.entries.cache_clear()
            key = (backend, earned["arch"])
            kept = [e for e in ledger.entries() if (ledger.backend_of(e), e["arch"]) != key]
            ledger.VERIFIED.write_text(json.dumps([*kept, earned], indent=2) + "\n")
    if not trying:
        print("no trial of any backend is there")
    return int(not trying or shown < len(trying))


if __name__ == "__main__":
    sys.exit(main())
