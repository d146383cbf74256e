"""Trains a quality suite, merges its adapters in every way, and measures the results.

    python -m bench.quality.run --suite vit --seeds 0 1 2
    python -m bench.quality.run --suite vit --seeds 0 --tasks depth,normal,edge,semseg --methods 'TA*' NSC
    python -m bench.quality.run --suite vit --train-only --permuted

Everything trained is kept in --work and trained once. One JSON line per suite, seed, set of tasks and row is appended
to OUT/<suite>.jsonl; rows that are there already are skipped, so an interrupted run goes on where it was.
`report.py` makes tables of them. Exit codes: 0 done, 1 some row failed, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .measuring import Bench
from .records import RESULTS, SUITES, WORK, append_record, key_of, read_records, suite_module
from .rows import ROWS, Row
from .suite import Subset, Suite


def run(
    suite: Suite,
    rows: Sequence[Row],
    out: Path,
    *,
    redo: bool = False,
    progress: bool | None = None,
    log: Callable[[str], None],
) -> tuple[list[dict[str, Any]], list[str]]:
    """Measure ``rows`` on ``suite`` and append them to ``out``; returns new records and the names of failed rows."""
    path = out / f"{suite.name}.jsonl"
    done = {key_of(record) for record in read_records(path)}
    key = (suite.name, suite.seed, tuple(suite.tasks))
    wanted = [row for row in rows if redo or (*key, row.name) not in done]
    label = f"{suite.name} seed {suite.seed} K={len(suite.tasks)}"
    if not wanted:
        log(f"{label}: all {len(rows)} rows are there")
        return [], []
    out.mkdir(parents=True, exist_ok=True)
    bench = Bench(suite, progress)
    added, failed = [], []
    for row in wanted:
        try:
            record = bench.record(row)
        except Exception:
            # One broken method must not cost the rows after it; the exit code tells.
            failed.append(row.name)
            log(f"{label}: {row.name} failed\n{traceback.format_exc()}")
            continue
        append_record(path, record)
        added.append(record)
        scale = f" (scale {record['tuned']['value']:g})" if record["tuned"] else ""
        log(f"{label}: {row.name}{scale}: {record['average']:.2f} %, {record['seconds']:.1f} s")
    return added, failed


def chosen_rows(patterns: Sequence[str] | None, suite: str) -> list[Row]:
    """Rows of a suite whose names match one of the shell-style ``patterns``.

    Raises:
        ValueError: if a pattern matches none.
    """
    rows = [row for row in ROWS if not row.suites or suite in row.suites]
    for pattern in patterns or ():
        if not any(fnmatch.fnmatchcase(row.name, pattern) for row in ROWS):
            raise ValueError(f"--methods: no row matches {pattern!r}; rows: {', '.join(row.name for row in ROWS)}")
    return [row for row in rows if not patterns or any(fnmatch.fnmatchcase(row.name, one) for one in patterns)]


def parser() -> argparse.ArgumentParser:
    parsed = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parsed.add_argument("--suite", choices=SUITES, default="vit")
    parsed.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parsed.add_argument("--tasks", help="comma-separated subset of the suite's tasks, at least two")
    parsed.add_argument("--methods", nargs="+", metavar="ROW", help="names of rows, or patterns such as 'NSC*'; all")
    parsed.add_argument("--work", type=Path, default=WORK, help="trained parts (default: %(default)s)")
    parsed.add_argument("--out", type=Path, default=RESULTS)
    parsed.add_argument("--redo", action="store_true", help="measure rows again that are there already")
    parsed.add_argument("--train-only", action="store_true", help="train what is missing, and stop")
    parsed.add_argument("--permuted", action="store_true", help="also train some adapters on permuted labels")
    parsed.add_argument("--list", action="store_true", help="print the rows, and stop")
    parsed.add_argument("--json", action="store_true", help="print new rows as JSON lines")
    parsed.add_argument("--progress", action=argparse.BooleanOptionalAction, help="bars; by default on a terminal")
    parsed.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parser()
    given = parsed.parse_args(arguments)
    try:
        rows = chosen_rows(given.methods, given.suite)
    except ValueError as error:
        parsed.error(str(error))
    if given.list:
        for row in rows:
            note = f", scale by {row.tuned}" if row.tuned else ""
            print(f"{row.name:<26}{row.method} {dict(row.options)}{note}{'' if row.available else ' (not available)'}")
        return 0
    torch.set_num_threads(given.threads)
    module = suite_module(given.suite)
    failed: list[str] = []

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    for row in rows:
        if not row.available:
            log(f"{row.name}: there is no method {row.method!r}; left out")
    for seed in given.seeds:
        extra = {"permuted": module.PERMUTED} if given.permuted else {}
        suite: Suite = module.load(given.work, seed, log=log, progress=given.progress, **extra)
        if given.train_only:
            continue
        if given.tasks:
            try:
                suite = Subset(suite, given.tasks.split(","))
            except ValueError as error:
                parsed.error(f"--{error}")
        added, broken = run(
            suite,
            [row for row in rows if row.available],
            given.out,
            redo=given.redo,
            progress=given.progress,
            log=log,
        )
        failed += broken
        if given.json:
            for record in added:
                print(json.dumps(record), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
