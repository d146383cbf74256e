"""Trains a quality suite, merges its adapters in every way, and measures the results.

    python bench/quality/run.py --suite vit --seeds 0 1 2
    python bench/quality/run.py --suite vit --seeds 0 --tasks depth,normal,edge,semseg --methods 'TA*' NSC
    python bench/quality/run.py --suite vit --train-only --permuted

Everything trained is kept in --work and trained once. One JSON line per suite, seed, set of tasks and row is appended
to OUT/<suite>.jsonl; rows that are there already are skipped, so an interrupted run goes on where it was.
`report.py` makes tables of them. Exit codes: 0 done, 1 some row failed, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import importlib
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import nsc_merge
from nsc_merge.adapters import Adapter, load_adapter
from nsc_merge.methods import METHODS, Method
from nsc_merge.methods.tuning import COARSE, tune_scale
from nsc_merge.remap import fit
from nsc_merge.result import MergeResult

from .controls import CONTROLS, finetuned_scores, shuffled
from .rows import BATCH, GRADIENT_STEPS, ROWS, SHUFFLED, Row
from .suite import Scores, Subset, Suite, evaluate, merged

HERE = Path(__file__).parent
SUITES = ("vit", "siglip", "llama", "llava")
# Scales beyond the papers' grid, tried where its last is the best; then finer steps around the best.
BEYOND = tuple(round(1 + 0.2 * step, 1) for step in range(1, 11))
FINE_STEP, FINE_STEPS = 0.02, 4


class Bench:
    """A suite at one seed, and what every row needs of it."""

    def __init__(self, suite: Suite, progress: bool | None) -> None:
        self.suite, self.progress = suite, progress
        loaded = {task: load_adapter(folder, task) for task, folder in suite.adapters.items()}
        self.adapters: dict[str, Adapter] = fit(loaded, suite.model)
        self._known: dict[str, MergeResult] = {}
        self.reference = {split: finetuned_scores(suite, self.adapters, split) for split in ("val", "test")}

    def record(self, row: Row) -> dict[str, Any]:
        """Merge and measure one row."""
        started = time.perf_counter()
        result, tuning = self._merged(row)
        seconds = time.perf_counter() - started
        models = merged(self.suite, result)
        test = evaluate(self.suite, models, "test")
        val = evaluate(self.suite, models, "val")
        reference = self.reference["test"]
        return {
            "suite": self.suite.name,
            "seed": self.suite.seed,
            "tasks": list(self.suite.tasks),
            "row": row.name,
            "method": row.method,
            "options": row.resolved(len(self.suite.tasks)),
            "init": result.options.get("init"),
            "tuned": tuning,
            "metrics": test.metrics,
            "losses": test.losses,
            "normalised": test.normalised(self.suite, reference),
            "average": test.average(self.suite, reference),
            "val_average": val.average(self.suite, self.reference["val"]),
            "val_losses": val.losses,
            "coefficients": coefficient_statistics(result),
            "objective": objective_ends(result),
            "seconds": round(seconds, 2),
            "versions": versions(),
        }

    def _merged(self, row: Row) -> tuple[MergeResult, dict[str, Any] | None]:
        options = row.resolved(len(self.suite.tasks))
        batch = row.batch or BATCH[self.suite.name]
        if row.method == SHUFFLED:
            shuffle = options.pop("shuffle")
            return shuffled(self._learnt("nsc", options, batch, row.batches), shuffle, self.suite.seed), None
        result = self._learnt(row.method, options, batch, row.batches)
        return (result, None) if row.tuned is None else self._tuned(result, row.tuned)

    def _learnt(self, method: str, options: dict[str, Any], batch: int, batches: int | None) -> MergeResult:
        """The merge, kept for the rows that start from the same one."""
        key = json.dumps([method, options, batch, batches])
        if key not in self._known:
            calibration = self.suite.calibration(batch, batches or options.get("steps", GRADIENT_STEPS))
            if method in CONTROLS:
                result = CONTROLS[method](self.suite, self.adapters, calibration, **options)
            else:
                result = nsc_merge.merge(
                    self.suite.model,
                    self.adapters,
                    calibration,
                    method=method,
                    **options,
                    **self._implied(METHODS[method]),
                )
            self._known[key] = result
        return self._known[key]

    def _implied(self, method: Method) -> dict[str, Any]:
        """Options that follow from the suite: the tasks' heads, for methods that look at outputs."""
        options: dict[str, Any] = {}
        if "progress" in method.option_names:
            options["progress"] = self.progress
        tasks = self.suite.tasks.values()
        if "outputs" in method.needs and any(info.kind != "generation" for info in tasks):
            counted = [info for info in tasks if method.name != "adamerging" or info.has_classes]
            options["outputs"] = {info.name: functools.partial(self.suite.output, info.name) for info in counted}
        if "likelihood" in method.option_names:
            options["likelihood"] = {info.name: "categorical" if info.has_classes else "gaussian" for info in tasks}
        return options

    def _tuned(self, unscaled: MergeResult, by: str) -> tuple[MergeResult, dict[str, Any]]:
        """The best scale on labelled validation data."""

        def quality(result: MergeResult) -> float:
            scores = evaluate(self.suite, merged(self.suite, result), "val")
            return self._quality(scores, by)

        found = tune_scale(unscaled, quality, coarse=COARSE, fine_step=None)
        trail = list(found.trail)
        if found.scale == COARSE[-1]:
            beyond = tune_scale(unscaled, quality, coarse=BEYOND, fine_step=None)
            trail += beyond.trail
            found = max(found, beyond, key=lambda tuned: tuned.score)
        fine = tune_scale(unscaled, quality, coarse=(found.scale,), fine_step=FINE_STEP, fine_steps=FINE_STEPS)
        trail += fine.trail[1:]
        note = {
            "by": "normalised average on labelled validation data" if by == "metric" else "summed raw validation loss",
            "option": "scale",
            "value": fine.scale,
            "trail": [[scale, round(value, 4)] for scale, value in sorted(trail)],
        }
        return fine.result, note

    def _quality(self, scores: Scores, by: str) -> float:
        return scores.average(self.suite, self.reference["val"]) if by == "metric" else -sum(scores.losses.values())


def coefficient_statistics(result: MergeResult) -> dict[str, float] | None:
    """Of all coefficients of modules that an adapter touches, dead ones included; None without coefficients."""
    values = [
        value
        for path, row in result.coefficients.items()
        for task, value in row.items()
        if path in result.adapters[task].factors
    ]
    if len(values) < 2:
        return None
    found = {
        "mean": statistics.mean(values),
        "std": statistics.stdev(values),
        "min": min(values),
        "max": max(values),
        "dead": sum(map(len, result.dead.values())) / len(values),
    }
    start = result.options.get("init")
    if isinstance(start, float):
        found["moved"] = statistics.mean(abs(value - start) for value in values)
    return found


def objective_ends(result: MergeResult) -> dict[str, float] | None:
    """The objective at the first step and its mean over the last ten; None for methods without steps."""
    values = [entry["objective"] for entry in result.history]
    return {"first": values[0], "last": statistics.mean(values[-10:])} if values else None


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("nsc-kernels", "torch", "transformers", "peft")}


def read_records(path: Path) -> list[dict[str, Any]]:
    """Lines of a result file; of those about the same suite, seed, tasks and row the last counts."""
    if not path.is_file():
        return []
    records = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        records[key_of(record)] = record
    return list(records.values())


def key_of(record: dict[str, Any]) -> tuple[Any, ...]:
    return record["suite"], record["seed"], tuple(record["tasks"]), record["row"]


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
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
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
    parsed.add_argument("--work", type=Path, default=HERE / "work", help="trained parts (default: %(default)s)")
    parsed.add_argument("--out", type=Path, default=HERE.parent / "results" / "quality")
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
    module = importlib.import_module(f".suites.{given.suite}", __package__)
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
