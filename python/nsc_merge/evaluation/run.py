"""``nsc-merge eval``: every row of a recipe, measured once and kept."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsc_merge.api import merge
from nsc_merge.evaluation.candidates import candidate_of, coefficient_range
from nsc_merge.evaluation.eval_recipe import EvalRecipe, Row, TaskRecipe
from nsc_merge.evaluation.harness.measuring import Harness, HarnessScore
from nsc_merge.evaluation.normalise import Scores, average, normalised
from nsc_merge.evaluation.plots import draw as draw_scores
from nsc_merge.evaluation.rows.fingerprint import fingerprint, measuring_versions
from nsc_merge.evaluation.rows.standard_errors import GROUPS, standard_error, without_each
from nsc_merge.evaluation.rows.tuning_data import check_tuning_data
from nsc_merge.evaluation.scoring import Candidate, joint_hits, predict, score
from nsc_merge.evaluation.suite import RecipeSuite
from nsc_merge.evaluation.tables import as_csv, as_markdown
from nsc_merge.methods.scale_tuning import tune_scale
from nsc_merge.results.beside.plots import draw as draw_merge
from nsc_merge.results.layout import file_names
from nsc_merge.results.result import MergeResult
from nsc_merge.utils.atomic_file import write_text
from nsc_merge.utils.json_text import finite_or_none, from_json, plain
from nsc_merge.utils.progress import Progress
from nsc_merge.utils.provenance import versions

Log = Callable[[str], None]

FORMAT = "nsc_merge.evaluation"
ROWS_FILE = "rows.jsonl"
RESULTS_FILE, TABLE_FILE, CSV_FILE = "results.json", "results.md", "results.csv"
COEFFICIENTS_FOLDER = "coefficients"


def run(
    recipe: EvalRecipe, *, redo: bool, progress: bool | None, log: Log
) -> tuple[dict[str, Any], list[str]]:
    """Measure what the output folder does not hold yet, and write tables and pictures.

    Every row goes into ``rows.jsonl`` as soon as it is measured, with a fingerprint of all that it depends on;
    rows found there are not measured again.

    Args:
        redo: measure them all the same.
        progress: as in :class:`nsc_merge.utils.progress.Progress`.
        log: receives a line about rows that fail.

    Returns:
        The document of ``results.json``, and the names of the rows that failed.

    Raises:
        FileNotFoundError, TypeError, ValueError: if the recipe's files do not fit together, before anything is
            written; if a scale would be chosen on the test data; or if the fine-tuned models cannot be measured.
    """
    seeds = recipe.seeds or (0,)
    known = {} if redo else _known(recipe.out / ROWS_FILE)
    records: list[dict[str, Any]] = []
    failed: list[str] = []
    with Progress("rows", len(seeds) * len(recipe.rows), progress) as bar:
        for seed in seeds:
            bench: _Bench | None = None
            # All before anything is read: a file that changes later does not pass for what was measured.
            prints = {row.name: fingerprint(recipe, row, seed) for row in recipe.rows}
            for row in recipe.rows:
                mark = prints[row.name]
                if mark not in known or (recipe.plots and known[mark].get("drawn") is False):
                    bench = bench or _Bench(recipe, seed, log)
                    try:
                        found = bench.measured(row)
                        if fingerprint(recipe, row, seed) != mark:
                            raise ValueError("a file that it depends on changed while rows were measured: start again")
                    except Exception as error:  # of any kind: in a folder there may be a model of any kind
                        if row.method == "finetuned":
                            raise
                        # One row that cannot be had must not cost the others; the exit status tells.
                        failed.append(row.name)
                        log(f"{row.name}, seed {seed}: {' '.join(str(error).split()) or type(error).__name__}")
                        bar.update(row=row.name, average="failed")
                        continue
                    known[mark] = {**found, "fingerprint": mark}
                    _append(recipe.out / ROWS_FILE, known[mark])
                record = {**known[mark], "row": row.name, "seed": seed}
                records.append(record)
                shown = f"{record['average']:.2f} %" if math.isfinite(record["average"]) else "-"
                bar.update(row=row.name, average=shown)
    # JSON has no NaN and no infinity; what is not defined, or out of range, is null there.
    document = finite_or_none(_document(recipe, records))
    write(document, recipe.out, plots=recipe.plots)
    return document, list(dict.fromkeys(failed))


def write(document: dict[str, Any], out: Path, *, plots: bool) -> None:
    """Tables, and pictures if wanted."""
    text = json.dumps(document, indent=1, allow_nan=False)
    write_text(out / RESULTS_FILE, text + "\n")
    write_text(out / TABLE_FILE, as_markdown(document))
    write_text(out / CSV_FILE, as_csv(document))
    if plots:
        draw_scores(document, out)


@dataclass(frozen=True)
class _Measured:
    """Scores of all tasks, with what the harness says of its own; of test data also those without each group of
    samples, by task.
    """

    scores: Scores
    harness: dict[str, HarnessScore]
    rests: dict[str, list[float]]


class _Bench:
    """The suite at one seed, with the fine-tuned models' scores once they are asked for."""

    def __init__(self, recipe: EvalRecipe, seed: int, log: Log) -> None:
        self._recipe, self._seed = recipe.at(seed), seed
        log(f"loading {self._recipe.model}" + ("" if recipe.local else " from the hub"))
        self._suite = RecipeSuite(self._recipe, shuffle=seed if recipe.seeds else None)
        self._harness = Harness(self._recipe, self._suite) if self._recipe.harness else None
        self._references: dict[str, _Measured] = {}
        if any(row.tune is not None for row in self._recipe.rows):
            check_tuning_data(self._suite, list(self._recipe.labelled), log)

    def measured(self, row: Row) -> dict[str, Any]:
        # A folder or an option may carry the seed.
        row = next(one for one in self._recipe.rows if one.name == row.name)
        started = time.perf_counter()
        candidate = candidate_of(self._suite, self._recipe, row, self._seed)
        tuned = None
        if row.tune is not None:
            assert isinstance(candidate, MergeResult)
            candidate, tuned = self._tuned(candidate, row)
        seconds = time.perf_counter() - started
        found = self._reference("test") if row.method == "finetuned" else self._scores(candidate, "test")
        percents = self._normalised(found, "test")
        by_harness = {"lm_eval": {name: one.record() for name, one in found.harness.items()}} if self._harness else {}
        return {
            "method": row.method,
            "folder": None if row.folder is None else str(row.folder),
            "options": plain(row.options),
            "tuned": tuned,
            "metrics": found.scores.metrics,
            "losses": found.scores.losses,
            "normalised": percents,
            "average": average(percents),
            "stderr": {name: standard_error(rests) for name, rests in found.rests.items()},
            "average_stderr": standard_error(rests := self._averages_of_rests(found)),
            "average_without_each": rests,
            "hits": self._hits(candidate),
            "coefficients": coefficient_range(candidate),
            "drawn": self._drawn(row, candidate),
            "seconds": round(seconds, 2),
            **by_harness,
        }

    def _scores(self, candidate: Candidate, split: str) -> _Measured:
        predicted = predict(self._suite, candidate, split)
        own = score(self._suite, predicted)
        rests = {}
        if split == "test":
            rests = {name: without_each(self._suite, name, *pair) for name, pair in predicted.items()}
        harness = self._harness.scores(candidate, split) if self._harness else {}
        metrics = own.metrics | {name: one.value for name, one in harness.items()}
        return _Measured(Scores({name: metrics[name] for name in self._recipe.tasks}, own.losses), harness, rests)

    def _reference(self, split: str) -> _Measured:
        if split not in self._references:
            alone = merge(self._suite.model, self._suite.adapters, method="finetuned")
            self._references[split] = self._scores(alone, split)
        return self._references[split]

    def _averages_of_rests(self, found: _Measured) -> list[float]:
        """The normalised average without each group of samples, of row and fine-tuned models alike; empty where some
        task has no such figures.
        """
        theirs, tasks = self._reference("test").rests, self._recipe.tasks
        if not all(found.rests.get(name) and theirs.get(name) for name in tasks):
            return []
        lower = {name: task.lower_is_better for name, task in self._suite.tasks.items()}
        rests = [
            average({name: normalised(found.rests[name][group], theirs[name][group], lower[name]) for name in tasks})
            for group in range(GROUPS)
        ]
        return rests if all(map(math.isfinite, rests)) else []

    def _normalised(self, found: _Measured, split: str) -> dict[str, float]:
        lower = {name: task.lower_is_better for name, task in self._suite.tasks.items()}
        lower |= {name: one.lower_is_better for name, one in found.harness.items()}
        return found.scores.normalised(self._reference(split).scores, lower)

    def _tuned(self, unscaled: MergeResult, row: Row) -> tuple[MergeResult, dict[str, Any]]:
        assert row.tune is not None
        by = row.tune.by
        if by == "metric" and not all(value > 0 for value in self._reference("val").scores.metrics.values()):
            raise ValueError(
                "tune: a fine-tuned model scores 0 or less on its validation data, so that no average exists"
            )

        def quality(result: MergeResult) -> float:
            found = self._scores(result, "val")
            if by == "loss":
                return -sum(found.scores.losses.values())
            return average(self._normalised(found, "val"))

        found = tune_scale(
            unscaled,
            quality,
            coarse=row.tune.coarse,
            fine_step=row.tune.fine_step,
            fine_steps=row.tune.fine_steps,
        )
        if math.isnan(found.score):
            raise ValueError(f"tune: at no scale does a {'loss' if by == 'loss' else 'score'} exist on validation data")
        trail = [[scale, value] for scale, value in sorted(found.trail)]
        return found.result, {"by": by, "option": "scale", "value": found.scale, "trail": trail}

    def _hits(self, candidate: Candidate) -> dict[str, dict[str, float]] | None:
        if self._recipe.joint is None:
            return None
        tasks = {name: task for name, task in self._recipe.labelled.items() if task.classifies}
        names = {name: task.classes for name, task in tasks.items() if task.classes}
        found = joint_hits(self._suite, candidate, list(tasks), self._recipe.joint, names)
        if found is None:
            return None
        return {task: {str(count): share for count, share in hits.items()} for task, hits in found.items()}

    def _drawn(self, row: Row, candidate: Candidate) -> bool | None:
        """Whether pictures of the coefficients are wanted, and there then; None where there is nothing to be seen."""
        if not isinstance(candidate, MergeResult) or not candidate.coefficients:
            return None
        if len({value for values in candidate.coefficients.values() for value in values.values()}) < 3:
            return None
        if self._recipe.plots:
            name = file_names(row.name for row in self._recipe.rows)[row.name]
            folder = self._recipe.out / COEFFICIENTS_FOLDER / f"{name}-seed{self._seed}"
            folder.mkdir(parents=True, exist_ok=True)
            draw_merge(candidate.coefficients, candidate.dead, candidate.history, folder)
        return self._recipe.plots


def _document(recipe: EvalRecipe, records: list[dict[str, Any]]) -> dict[str, Any]:
    names = [row.name for row in recipe.rows]
    # The fine-tuned models' row is always there, and says what the harness calls its figures.
    by_harness: dict[str, Any] = next((record["lm_eval"] for record in records if "lm_eval" in record), {})
    return {
        "format": FORMAT,
        "version": 1,
        "model": recipe.model,
        "tasks": {
            name: {"metric": task.metric.label, "lower_is_better": task.metric.lower_is_better}
            if isinstance(task, TaskRecipe)
            else {
                "metric": by_harness[name]["metric"],
                "lower_is_better": by_harness[name]["lower_is_better"],
                "lm_eval": task.lm_eval,
            }
            for name, task in recipe.tasks.items()
        },
        "seeds": list(recipe.seeds or (0,)),
        "joint": recipe.joint,
        "rows": [
            {"row": name, "runs": runs}
            for name in names
            if (runs := [record for record in records if record["row"] == name])
        ],
        "versions": versions() | measuring_versions(recipe),
    }


def _known(file: Path) -> dict[str, dict[str, Any]]:
    """Fingerprint -> record; a line that an interruption cut short is passed over."""
    known = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            record = from_json(line, str(file), not_finite=True)
        except ValueError:
            continue
        if isinstance(record, dict) and "fingerprint" in record:
            known[record["fingerprint"]] = record
    return known


def _append(file: Path, record: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # A line cut short by an interruption is ended first.
    torn = file.is_file() and not file.read_bytes().endswith(b"\n") and file.stat().st_size > 0
    with file.open("a", encoding="utf-8") as lines:
        lines.write(("\n" if torn else "") + json.dumps(record) + "\n")

