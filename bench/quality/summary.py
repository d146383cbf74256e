"""The tables of docs/results.md: every row's average over tasks, and gains over the start, in all suites side by side.

    python -m bench.quality.summary

Averages are means ± standard deviations over the seeds (n - 1); gains are per seed, in points of the average.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .records import RESULTS, SUITES, read_records
from .report import mean_and_spread, sets_of_tasks
from .rows import CONTROL, GRADIENT_FREE, GROUPS, ROWS

NAMES = {"vit": "ViT", "siglip": "SigLIP", "llama": "LLaMA", "llava": "LLaVA", "smollm2": "SmolLM2"}
START = "TA@0.4"
MATCHING = ("match", "distill", "distill bounded", "distill answers", "distill answers regmean")
COMPARED = ("NSC", *(row.name for row in ROWS if row.group == CONTROL), "AdaMerging", *MATCHING)

# Row -> seed -> average.
Averages = dict[str, dict[int, float]]


def columns(folder: Path) -> dict[str, Averages]:
    """Title -> averages, for each suite and set of tasks, the largest sets first."""
    found: dict[str, Averages] = {}
    for suite in SUITES:
        records = read_records(folder / f"{suite}.jsonl")
        for tasks in sets_of_tasks(records):
            column = found.setdefault(f"{NAMES[suite]}, K = {len(tasks)}", {})
            for record in records:
                if tuple(record["tasks"]) == tasks:
                    column.setdefault(record["row"], {})[record["seed"]] = record["average"]
    return found


def averages_table(found: dict[str, Averages]) -> list[str]:
    lines = [f"| | {' | '.join(found)} |", "|---" * (1 + len(found)) + "|"]
    for group in GROUPS:
        body = []
        for row in (row for row in ROWS if row.group == group):
            cells = [_spread(list(column.get(row.name, {}).values())) for column in found.values()]
            if any(cells):
                body.append(f"| {row.name} | {' | '.join(cells)} |")
        if body:
            lines += [f"| *{group}* |{' |' * len(found)}", *body]
    return lines


def gains_table(found: dict[str, Averages]) -> list[str]:
    """What NSC, its controls and other learnt rows add to where they start, and to the best row tuned with labels."""
    starts = [column.get(START, {}) for column in found.values()]
    best = [best_gradient_free(column) for column in found.values()]
    body = [(name, _all_gains(found, name, starts)) for name in COMPARED]
    body += [
        (f"{name} - best gradient-free row of the seed", _all_gains(found, name, best)) for name in ("NSC", *MATCHING)
    ]
    return [
        f"| against {START}, per seed | {' | '.join(found)} |",
        "|---" * (1 + len(found)) + "|",
        *(f"| {name} | {' | '.join(cells)} |" for name, cells in body if any(cells)),
    ]


def best_gradient_free(column: Averages) -> dict[int, float]:
    """Seed -> the best of many on the test data itself, tuned with labels: a high bar."""
    best: dict[int, float] = {}
    for row in ROWS:
        if row.group == GRADIENT_FREE:
            for seed, value in column.get(row.name, {}).items():
                best[seed] = max(value, best.get(seed, value))
    return best


def _all_gains(found: dict[str, Averages], name: str, starts: Sequence[dict[int, float]]) -> list[str]:
    """What a row adds to ``starts``, in every column."""
    cells = []
    for column, start in zip(found.values(), starts, strict=True):
        pairs = [(value, start[seed]) for seed, value in sorted(column.get(name, {}).items()) if seed in start]
        cells.append(" / ".join(f"{value - before:+.1f}" for value, before in pairs))
    return cells


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return mean_and_spread(values, 1) + (" (1 seed)" if len(values) == 1 else "")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    found = columns(given.results)
    if not found:
        print(f"{given.results} holds no results; run.py makes them", file=sys.stderr)
        return 1
    print("\n".join([*averages_table(found), "", *gains_table(found)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
