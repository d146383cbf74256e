"""What changed between two reports beyond their spread.

    python -m nsc_kernels.bench compare before.jsonl after.jsonl
    python -m nsc_kernels.bench compare before.jsonl after.jsonl --ratios      by the ratio to the first contender

A figure has changed where the samples between the 20th and the 80th percentile of the two reports do not overlap and
the medians differ by more than --least. Times say something only if both reports are of the same machine and nothing
else ran; ratios to another contender of the same round forgive both.

Exits with 0; with --exit-code with 1 if something has become slower.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .measuring import quantiles
from .report import read
from .tables import Key, Row, is_timed, key_of, of_several

# Of the environment, said where it differs.
SAME = ("device", "torch", "cuda", "triton", "float32_products", "sources", "cores")


class Change(NamedTuple):
    """``ratio``: the later median over the earlier. ``by``: the backend of ours, where the reports have several."""

    key: Key
    by: str
    before: float
    after: float

    @property
    def ratio(self) -> float:
        return self.after / self.before

    def __str__(self) -> str:
        k = self.key
        by = f"by {self.by}" if self.by else ""
        where = " ".join(f"{k.set} {by} {k.dtype} {k.threads or ''} {k.how} {k.cache}".split())
        shape = f"{k.name} {k.d_in}->{k.d_out} {k.K}x{k.r} T={k.T} {k.direction}"
        return f"{k.contender:<16} {where:<32} {shape:<48} {self.before:10.4g} -> {self.after:10.4g}  {self.ratio:.2f}x"


ByTrial = dict[tuple[str, Key], Row]


def by_trial(rows: Sequence[Row]) -> ByTrial:
    return {(row["trial"], key_of(row)): row for row in rows if is_timed(row)}


def samples(row: Row, rows: ByTrial, ratios: bool) -> list[float] | None:
    """Microseconds, or ratios to the first contender's in the same round of the same trial."""
    if not ratios:
        return row["us"]
    first = rows.get((row["trial"], key_of(row)._replace(contender=row["over"])))
    if first is None or first is row:
        return None
    return [a / b for a, b in zip(row["us"], first["us"], strict=True)]


def changes(before: Sequence[Row], after: Sequence[Row], least: float, ratios: bool) -> tuple[list[Change], int]:
    """What changed, the largest first, and how many figures both reports have."""
    earlier, later = (
        {(key_of(row), row.get("backend")): row for row in rows if is_timed(row)} for rows in (before, after)
    )
    firsts = by_trial(before), by_trial(after)
    several = of_several([*before, *after])
    found, both = [], 0
    for which in earlier.keys() & later.keys():
        one, other = samples(earlier[which], firsts[0], ratios), samples(later[which], firsts[1], ratios)
        if one is None or other is None:
            continue
        both += 1
        a, b = quantiles(one), quantiles(other)
        apart = a["p80"] < b["p20"] or b["p80"] < a["p20"]
        if apart and abs(b["p50"] / a["p50"] - 1) > least:
            key, backend = which
            found.append(Change(key, (backend or "") if several else "", a["p50"], b["p50"]))
    return sorted(found, key=lambda change: -abs(change.ratio - 1)), both


def differences(before: Sequence[Row], after: Sequence[Row]) -> list[str]:
    """Of the machines and the software."""
    one, other = (next((row for row in rows if row.get("what") == "environment"), {}) for rows in (before, after))
    return [f"{name}: {one.get(name)} -> {other.get(name)}" for name in SAME if one.get(name) != other.get(name)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m nsc_kernels.bench compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--ratios", action="store_true", help="compare ratios to the first contender, not times")
    parser.add_argument("--least", type=float, default=0.02, help="least change that is told (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="JSON on standard output")
    parser.add_argument("--exit-code", action="store_true", help="exit with 1 if something has become slower")
    arguments = parser.parse_args(argv)
    try:
        before, after = read(arguments.before), read(arguments.after)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{error}\n")
    found, both = changes(before, after, arguments.least, arguments.ratios)
    differing = differences(before, after)
    if arguments.json:
        told: list[dict[str, Any]] = [
            {**one.key._asdict(), "by": one.by, "before": one.before, "after": one.after, "ratio": one.ratio}
            for one in found
        ]
        print(json.dumps({"changes": told, "compared": both, "environment": differing}))
    else:
        print("\n".join([*differing, *map(str, found)]) or "nothing changed beyond the spread")
        slower = sum(change.ratio > 1 for change in found)
        print(f"of {both} figures in both, {slower} are slower and {len(found) - slower} faster", file=sys.stderr)
    if not both:
        print("the two reports have no figure in common", file=sys.stderr)
        return 2
    return int(arguments.exit_code and any(change.ratio > 1 for change in found))
