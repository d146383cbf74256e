"""Measures the rows of the quality tables on a suite: merges, chooses scales, and says what came of it."""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Mapping
from typing import Any

import nsc_merge
from nsc_merge.adapters import Adapter, load_adapter
from nsc_merge.evaluation.normalise import Scores
from nsc_merge.methods import METHODS, Method
from nsc_merge.methods.scale_tuning import tune_scale
from nsc_merge.models.fitting import fit
from nsc_merge.results.result import MergeResult

from .controls import CONTROLS, finetuned_scores, shuffled
from .records import versions
from .rows import EXTENTS, GRADIENT_STEPS, SHUFFLED, Row
from .suite import Suite, average, evaluate, normalised

# From here on the search for a scale goes no further.
HIGHEST = 10.0


class Bench:
    """A suite at one seed, and what every row needs of it."""

    def __init__(self, suite: Suite, progress: bool | None) -> None:
        self.suite, self.progress, self.extent = suite, progress, EXTENTS[suite.name]
        loaded = {task: load_adapter(folder, task) for task, folder in suite.adapters.items()}
        self.adapters: dict[str, Adapter] = fit(loaded, suite.model)
        self._known: dict[str, MergeResult] = {}
        self.reference = {split: finetuned_scores(suite, self.adapters, split) for split in ("val", "test")}

    def record(self, row: Row) -> dict[str, Any]:
        """Merge and measure one row."""
        started = time.perf_counter()
        result, tuning = self._merged(row)
        seconds = time.perf_counter() - started
        test = evaluate(self.suite, result, "test")
        val = evaluate(self.suite, result, "val")
        reference = self.reference["test"]
        return {
            "suite": self.suite.name,
            "seed": self.suite.seed,
            "tasks": list(self.suite.tasks),
            "row": row.name,
            "method": row.method,
            "options": self._options(row),
            "init": result.options.get("init"),
            "tuned": tuning,
            "metrics": test.metrics,
            "losses": test.losses,
            "normalised": normalised(self.suite, test, reference),
            "average": average(self.suite, test, reference),
            "val_average": average(self.suite, val, self.reference["val"]),
            "val_losses": val.losses,
            "coefficients": coefficient_statistics(result),
            "objective": objective_ends(result),
            "seconds": round(seconds, 2),
            "versions": versions(),
        }

    def _options(self, row: Row) -> dict[str, Any]:
        options = row.resolved(len(self.suite.tasks), self.extent.rank)
        return {**options, **self.extent.oracle} if row.method == "oracle" else options

    def _merged(self, row: Row) -> tuple[MergeResult, dict[str, Any] | None]:
        options, batch = self._options(row), row.batch or self.extent.batch
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
                    **{**options, **self._implied(METHODS[method], options)},
                )
            self._known[key] = result
        return self._known[key]

    def _implied(self, method: Method, given: Mapping[str, Any]) -> dict[str, Any]:
        """Options that follow from the suite and those ``given``: the tasks' heads, for methods that look at outputs,
        and which tasks write answers.
        """
        options: dict[str, Any] = {}
        if "progress" in method.option_names:
            options["progress"] = self.progress
        tasks = self.suite.tasks.values()
        if "outputs" in method.needs and any(info.kind != "generation" for info in tasks):
            counted = [info for info in tasks if method.name != "adamerging" or info.has_classes]
            options["outputs"] = {info.name: functools.partial(self.suite.output, info.name) for info in counted}
            if "new_tokens" in given:
                written = [info.name for info in counted if info.kind == "generation"]
                options["new_tokens"] = dict.fromkeys(written, given["new_tokens"])
                # Of suites with such tasks alone.
                suite: Any = self.suite
                options["outputs"].update((task, suite.next_tokens) for task in written)
        if "likelihood" in method.option_names:
            options["likelihood"] = {info.name: "categorical" if info.has_classes else "gaussian" for info in tasks}
        return options

    def _tuned(self, unscaled: MergeResult, by: str) -> tuple[MergeResult, dict[str, Any]]:
        """The best scale on labelled validation data."""

        def quality(result: MergeResult) -> float:
            return self._quality(evaluate(self.suite, result, "val"), by)

        extent = self.extent
        found = tune_scale(unscaled, quality, coarse=extent.coarse, fine_step=None)
        trail = list(found.trail)
        last, beyond = extent.coarse[-1], extent.beyond
        while found.scale == last and last < HIGHEST:
            further = tune_scale(unscaled, quality, coarse=beyond, fine_step=None)
            trail += further.trail
            found = max(found, further, key=lambda tuned: tuned.score)
            last, beyond = beyond[-1], tuple(round(beyond[-1] * factor, 2) for factor in (1.25, 1.5, 1.75, 2.0))
        fine = tune_scale(
            unscaled, quality, coarse=(found.scale,), fine_step=extent.fine_step, fine_steps=extent.fine_steps
        )
        trail += fine.trail[1:]
        note = {
            "by": "normalised average on labelled validation data" if by == "metric" else "summed raw validation loss",
            "option": "scale",
            "value": fine.scale,
            "trail": [[scale, round(value, 4)] for scale, value in sorted(trail)],
        }
        return fine.result, note

    def _quality(self, scores: Scores, by: str) -> float:
        return average(self.suite, scores, self.reference["val"]) if by == "metric" else -sum(scores.losses.values())


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
