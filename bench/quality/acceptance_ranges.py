"""The acceptance checks of the ViT suites: what an earlier, independent study of the same setting found.

They hold the library to that study's numbers, good and bad. Nothing here asks NSC to win. The ranges are those of the
study's one base: what they allow for is the noise of adapters and merges, not that of another base.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .rows import GRADIENT_FREE, ROWS

# Suites of the study's tasks.
CHECKED = ("vit", "siglip")
Record = Mapping[str, Any]
DENSE = ("semseg", "depth", "normal", "edge")
SHADED = ("count", "angle", "sal")
BEST = "the best gradient-free row"


class _Results:
    """Records by set of tasks, row and seed."""

    def __init__(self, records: Iterable[Record]) -> None:
        self._records = {(tuple(r["tasks"]), r["row"], r["seed"]): r for r in records}
        self.all = max((tasks for tasks, _, _ in self._records), key=len, default=())

    def runs(self, row: str, tasks: tuple[str, ...]) -> list[Record]:
        return [self._records[key] for key in sorted(self._records) if key[:2] == (tasks, row)]

    def averages(self, row: str, tasks: tuple[str, ...]) -> dict[int, float]:
        """Seed -> average."""
        if row == BEST:
            names = [one.name for one in ROWS if one.group == GRADIENT_FREE]
            seeds: dict[int, float] = {}
            for name in names:
                for seed, value in self.averages(name, tasks).items():
                    seeds[seed] = max(value, seeds.get(seed, value))
            return seeds
        return {run["seed"]: run["average"] for run in self.runs(row, tasks)}

    def gap(self, ours: str, theirs: str, tasks: tuple[str, ...]) -> list[float]:
        """Differences of the averages, seed by seed."""
        first, second = self.averages(ours, tasks), self.averages(theirs, tasks)
        return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]


def vit_checks(
    records: Sequence[Record], training: Sequence[Record], samples: Sequence[Record]
) -> list[dict[str, Any]]:
    """Every check whose figures are there: ``group``, ``what``, ``found``, ``expected``, ``inside``."""
    return [
        *_of_training(training),
        *_of_samples(samples),
        *_of_the_optimiser(_Results(records)),
        *_of_baselines(_Results(records)),
        *_of_the_ranking(_Results(records)),
    ]


def _check(group: str, what: str, values: Sequence[float], low: float, high: float, digits: int = 2) -> list[dict]:
    """``values`` must all lie between ``low`` and ``high``; no values, no check."""
    if not values:
        return []
    wanted = f"{low:g} to {high:g}"
    if high == _NO_LIMIT:
        wanted = f"at least {low:g}"
    elif low == -_NO_LIMIT:
        wanted = f"at most {high:g}"
    return [
        {
            "group": group,
            "what": what,
            "found": " ".join(f"{value:.{digits}f}" for value in values),
            "values": list(values),
            "expected": wanted,
            "inside": all(low <= value <= high for value in values),
        }
    ]


_NO_LIMIT = float("inf")


def _of_training(training: Sequence[Record]) -> list[dict[str, Any]]:
    true = [record for record in training if record["labels"] == "true"]
    permuted = [record for record in training if record["labels"] == "permuted"]
    if not true:
        return []

    def rhos(name: str, tasks: Callable[[str], bool] = lambda task: True) -> list[float]:
        return [r["rho"][name] for r in true if r["rho"][name] is not None and tasks(r["task"])]

    drops = [record["steps"][0]["all"] - record["steps"][-1]["all"] for record in true]
    start = statistics.mean(record["steps"][0]["all"] for record in true)
    end = statistics.mean(record["steps"][-1]["all"] for record in true)
    depth = [record["steps"][-1]["all"] for record in permuted if record["task"] == "depth"]
    return [
        *_check("A", "mean ratio of untrained adapters (random: 0.935)", [start], 0.930, 0.940, 4),
        *_check("B", f"smallest fall of the ratio, all modules ({len(drops)} runs)", [min(drops)], 0, _NO_LIMIT, 3),
        *_check("B", "mean ratio of trained adapters", [end], 0.87, 0.89, 3),
        *_check("B", "rho(loss, ratio), all modules: mean", [statistics.mean(rhos("all"))], 0.85, 1),
        *_check("B", "rho(loss, ratio), all modules: smallest", [min(rhos("all"))], 0.5, 1),
        *_check("B", "rho(loss, ratio), target: mean", [statistics.mean(rhos("target"))], 0.50, 0.80),
        *_check("B", "rho(loss, ratio), target: angle", rhos("target", lambda task: task == "angle"), -1, 0),
        *_check("B", "ratio of depth trained on permuted labels (it falls, too)", depth, -_NO_LIMIT, 0.85, 3),
    ]


def _of_samples(samples: Sequence[Record]) -> list[dict[str, Any]]:
    def mean(model: str, task: str | None = None) -> list[float]:
        found = [
            r["rho"]["all"]
            for r in samples
            if r["model"] == model and task in (None, r["task"]) and r["rho"]["all"] is not None
        ]
        return [statistics.mean(found)] if found else []

    checks = []
    for task, most in (("depth", -0.45), ("normal", -0.45), ("sal", -0.2)):
        what = f"rho(ratio, quality) over samples, fine-tuned: {task}, mean over seeds"
        checks += _check("C", what, mean("finetuned", task), -1, most)
    checks += _check("C", "the same, mean over tasks", mean("finetuned"), -0.25, -0.15)
    return checks + _check("C", "the same for TA@0.4", mean("TA@0.4"), -0.31, -0.21)


def _of_the_optimiser(results: _Results) -> list[dict[str, Any]]:
    tasks = results.all

    def falls(row: str) -> list[float]:
        return [run["objective"]["first"] - run["objective"]["last"] for run in results.runs(row, tasks)]

    def of(row: str, name: str) -> list[float]:
        return [run["coefficients"][name] for run in results.runs(row, tasks)]

    furthest = [
        max(abs(run["coefficients"][end] - 0.4) for end in ("min", "max")) for run in results.runs("NSC lr1e-4", tasks)
    ]
    known_bad = list(results.averages("NSC lr1e-2", tasks).values())
    return [
        *_check("D", "NSC: fall of the objective", falls("NSC"), 0.007, 0.010, 4),
        *_check("D", "NSC: mean move of a coefficient", of("NSC", "moved"), 0.079, 0.087, 3),
        *_check("D", "NSC: mean coefficient", of("NSC", "mean"), 0.39, 0.42, 3),
        *_check("D", "NSC: share of coefficients without a gradient", of("NSC", "dead"), 0.03125, 0.03125, 5),
        *_check("D", "NSC lr1e-4: furthest move of a coefficient", furthest, 0, 0.0101, 4),
        *_check("D", "NSC lr1e-2: fall of the objective", falls("NSC lr1e-2"), 0.055, _NO_LIMIT, 3),
        *_check("D", "NSC lr1e-2: average (known to be bad)", known_bad, 47.3, 53.3, 1),
        *_check("D", "anti-NSC: rise of the objective", [-fall for fall in falls("anti-NSC")], 0.007, 0.010, 4),
    ]


def _of_baselines(results: _Results) -> list[dict[str, Any]]:
    tasks = results.all
    expected = (
        ("zero_shot", 76.2, 77.2),
        ("TA@1/K", 78.7, 80.3),
        ("TA@0.4", 70.3, 72.3),
        ("TA", 78.4, 80.4),
        ("TIES", 78.4, 80.4),
        ("SVD", 78.4, 80.4),
        ("KnOTS-TIES", 78.4, 80.4),
        ("AdaMerging", 63.9, 67.9),
        ("oracle", 85.0, 100.0),
    )
    checks = []
    for row, low, high in expected:
        found = list(results.averages(row, tasks).values())
        checks += _check("E", f"{row}: average, mean over seeds", [statistics.mean(found)] if found else [], low, high)
    scales = [run["tuned"]["value"] for run in results.runs("TA", tasks)]
    return checks + _check("E", "TA: best scale", scales, 0.15, 0.22)


def _of_the_ranking(results: _Results) -> list[dict[str, Any]]:
    many, dense = results.all, DENSE
    bad = list(results.averages("NSC lr1e-2", dense).values())
    return [
        *_check("F", "K=8: NSC - AdaMerging", results.gap("NSC", "AdaMerging", many), 0, _NO_LIMIT),
        *_check("F", "K=8: NSC - TA@0.4", results.gap("NSC", "TA@0.4", many), -7, 2),
        *_check("F", f"K=8: oracle - {BEST}", results.gap("oracle", BEST, many), 5, _NO_LIMIT),
        *_check("F", "K=4 dense: NSC - anti-NSC", results.gap("NSC", "anti-NSC", dense), 0.5, _NO_LIMIT),
        *_check("F", f"K=4 dense: NSC - {BEST}", results.gap("NSC", BEST, dense), -0.5, _NO_LIMIT),
        *_check(
            "F",
            "K=4 dense: NSC init1/K - TA@1/K",
            results.gap("NSC init1/K", "TA@1/K", dense),
            0.5,
            _NO_LIMIT,
        ),
        *_check("F", "K=4 dense: NSC lr1e-2 (known to be bad)", bad, -_NO_LIMIT, 55, 1),
        # What the library recommends for use without labels: with the tasks' heads at hand, and without.
        *(
            check
            for row in ("distill", "match")
            for name, tasks in (("K=8", many), ("K=4 dense", dense), ("K=3", SHADED))
            for check in _check("G", f"{name}: {row} - {BEST}", results.gap(row, BEST, tasks), 0, _NO_LIMIT)
        ),
        *_check("G", "K=8: match lr1e-3 - TA@0.4", results.gap("match lr1e-3", "TA@0.4", many), 6, _NO_LIMIT),
    ]
