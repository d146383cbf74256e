"""What the rows of a sweep come to: how many model types compute what PEFT does, and the others by name.

    python -m bench.sweeps.summary bench/results/sweeps/*.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.sweeps.beside_peft import EQUAL

WAYS = ("applied", "model", "lora")
METHODS = ("nsc", "match", "distill")


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines for a terminal."""
    ran = [row for row in rows if "error" not in row]
    unbuilt = [row for row in rows if "error" in row and "parameters" not in row]
    without = [row for row in rows if "error" in row and "parameters" in row]
    lines = [
        f"{len(rows)} model types: {len(ran)} ran, {len(without)} took no such adapter, {len(unbuilt)} were not built",
    ]
    for way in ("merge", *WAYS):
        found = [(row["type"], row[way]) for row in ran if way in row]
        equal = [kind for kind, value in found if not isinstance(value, str) and value <= EQUAL]
        if way != "merge":
            lines.append(f"  {way}: {len(equal)} compute what PEFT does")
        lines += [f"    {kind}: {value}" for kind, value in found if kind not in equal]
    jumps = [(row["type"], row["jumps"]) for row in ran if row.get("jumps", 0) > EQUAL]
    lines += [f"  PEFT's own moves as far with its numbers by 1e-7: {kind}: {value}" for kind, value in jumps]
    lines.append(f"  files: {sum(row.get('files') == 'same' for row in ran)} the same bytes from files and from memory")
    for method in METHODS:
        counts = Counter(_said(row[method]) for row in ran if method in row)
        lines += [f"  {method}: {count} {said}" for said, count in counts.most_common()]
    return lines


def _said(outcome: str) -> str:
    """An outcome without what it says of one model."""
    return outcome if len(outcome) < 30 else outcome.partition(": ")[2].partition(":")[0][:60]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    for file in parser.parse_args(arguments).files:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        print(file.stem, *summary([row for row in rows if "type" in row]), sep="\n")


if __name__ == "__main__":
    main()
