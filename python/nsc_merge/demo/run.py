"""``nsc-merge demo``: merge six real adapters by what learns without labels, measure it and write everything down."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from nsc_merge.api import merge
from nsc_merge.demo import evaluate as ev
from nsc_merge.demo import plots
from nsc_merge.demo.data import Scene, SceneSet
from nsc_merge.demo.report import (
    ALONE,
    DISTILL,
    LEARNT,
    MATCH,
    NSC,
    START,
    TUNED,
    TUNED_BY_LOSS,
    UNIFORM,
    ZERO_SHOT,
    advice,
    verdict,
)
from nsc_merge.demo.tasks import TASKS
from nsc_merge.evaluation.normalise import average
from nsc_merge.results.result import MergeResult
from nsc_merge.utils.atomic_file import write_text
from nsc_merge.utils.option_checks import check_count

BATCH = 32
_PICTURED_SCENE = 3

# Matching takes fewer steps than NSC: on these tasks three times as many change an average by less than two points.
MATCHING_STEPS = 30
MATCHING_BATCH = 16


def shipped_assets() -> Path:
    """The trained base, adapters and heads that come with the package."""
    return Path(str(files("nsc_merge") / "assets" / "demo"))


def run_demo(
    out: Path,
    *,
    assets: Path | None = None,
    tasks: Sequence[str] = tuple(TASKS),
    steps: int = 100,
    seed: int = 0,
    progress: bool | None = None,
    log: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> dict[str, Any]:
    """Merge, measure, and write coefficients, adapter, history, plots and summary into ``out``.

    Args:
        out: folder for the results.
        assets: trained parts; those of the package when None.
        tasks: which tasks to merge, at least two.
        steps: optimisation steps of NSC; ``match`` and ``distill`` take at most :data:`MATCHING_STEPS`.
        seed: order of the calibration batches.
        progress: as in :class:`nsc_merge.utils.progress.Progress`.
        log: receives one line per stage.

    Returns:
        The content of ``summary.json``; its ``verdict`` and ``advice`` are for people,
        :func:`nsc_merge.demo.report.render` makes the table.

    Raises:
        ValueError: for unknown or too few tasks, and for ``steps`` or a ``seed`` that are no such numbers.
        NotADirectoryError: if ``out`` is, or lies in, a file.
        OSError: if ``out`` cannot be written to.
        FileNotFoundError: if ``assets`` is incomplete.
    """
    unknown = [name for name in tasks if name not in TASKS]
    if unknown or len(set(tasks)) < 2 or len(set(tasks)) != len(tasks):
        raise ValueError(f"tasks: expected two or more different ones of {list(TASKS)}, found {list(tasks)}")
    check_count("steps", steps)
    check_count("seed", seed, 0)
    there = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"out: expected a folder, found the file {there}")
    started = time.perf_counter()
    bundle = ev.load_bundle(assets or shipped_assets(), tasks)
    try:
        # Before the work, and with a file in it: a folder that is there may be read-only.
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise type(error)(f"out: {out} cannot be written to: {error.strerror}; expected a place that can be") from None
    parameters = sum(parameter.numel() for parameter in bundle.backbone.parameters())
    log(f"base: ViT, {parameters / 1e6:.2f} M parameters; {len(tasks)} adapters: {', '.join(tasks)}")
    validation = ev.scene_sets(bundle.tasks, "val", ev.VALIDATION_SCENES)
    test = ev.scene_sets(bundle.tasks, "test", ev.TEST_SCENES)
    log(
        f"scenes from scikit-learn's digits and photographs: {ev.VALIDATION_SCENES} for validation, "
        f"{ev.TEST_SCENES} for test, of each kind ({', '.join(test)})"
    )

    learnt = _learn(bundle, validation, steps, seed, progress, log)
    result = learnt[NSC]

    log("task arithmetic: tuning its scale on the labelled validation scenes")
    tuned = ev.tune_task_arithmetic(bundle, validation)
    start = float(result.options["init"])
    scales = {START: start, TUNED: tuned.by_average, TUNED_BY_LOSS: tuned.by_loss, UNIFORM: 1 / len(tasks)}
    merges = {**{method: ev.task_arithmetic(bundle, scale) for method, scale in scales.items()}, **learnt}
    labels = {
        ZERO_SHOT: "zero-shot",
        ALONE: "each adapter alone",
        START: f"TA {start:g} (NSC's start)",
        TUNED: f"TA {tuned.by_average:g} (tuned)",
        TUNED_BY_LOSS: f"TA {tuned.by_loss:g} (tuned, loss)",
        UNIFORM: f"TA 1/{len(tasks)}",
        NSC: "NSC",
        MATCH: MATCH,
        DISTILL: DISTILL,
    }
    log("measuring every method on the test scenes")
    outputs = {
        ZERO_SHOT: ev.predict(bundle.backbone, bundle.heads, test),
        ALONE: ev.predict_alone(bundle, test),
        **ev.predict_each(bundle, merges, test),
    }
    scores = {method: ev.score(output, bundle.heads, test) for method, output in outputs.items()}
    reference = scores[ALONE]
    percents = {method: ev.percents(score, reference) for method, score in scores.items()}
    averages = {method: average(percent) for method, percent in percents.items()}

    result.save(out, format="coefficients")
    result.save(out / "merged-adapter", format="lora")
    pictures = [out / "coefficients.png", out / "ratios.png"]
    plots.plot_coefficients(result, pictures[0])
    plots.plot_ratios(result, pictures[1])
    columns = {
        "alone": ALONE,
        f"TA {start:g} (start)": START,
        f"TA {tuned.by_average:g} (tuned)": TUNED,
        **{labels[method]: method for method in LEARNT},
    }
    shown = {title: outputs[method] for title, method in columns.items()}
    if any(task.dense for task in bundle.tasks):
        pictures.append(out / "predictions.png")
        plots.plot_predictions(bundle.tasks, test, shown, _PICTURED_SCENE, pictures[-1])

    def gap(ours: str, theirs: str) -> tuple[float, float]:
        points = averages[ours] - averages[theirs]
        return points, ev.standard_error(outputs[ours], outputs[theirs], bundle.heads, test, reference)

    gaps = {method: gap(NSC, method) for method in (START, TUNED, UNIFORM)}
    against_tuned = {method: gaps[TUNED] if method == NSC else gap(method, TUNED) for method in LEARNT}
    summary = {
        "seconds": round(time.perf_counter() - started, 1),
        "steps": steps,
        "matching_steps": min(steps, MATCHING_STEPS),
        "seed": seed,
        "tasks": {
            task.name: {"metric": task.metric, "lower_is_better": task.lower_is_better}
            for task in bundle.tasks
        },
        "methods": {
            method: {
                "label": labels[method],
                "scale": scales.get(method),
                "metrics": score.metrics,
                "normalised": percents[method],
                "average": averages[method],
            }
            for method, score in scores.items()
        },
        "nsc_minus": _named(gaps),
        "minus_tuned": _named(against_tuned),
        "verdict": verdict(averages[NSC], gaps),
        "advice": advice(against_tuned),
        "objective": result.objective,
        "dead": result.dead,
        "files": {
            "coefficients": str(out / "coefficients.json"),
            "history": str(out / "history.jsonl"),
            "merged adapter": str(out / "merged-adapter"),
            "plots": [str(path) for path in pictures],
            "summary": str(out / "summary.json"),
        },
    }
    write_text(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def _learn(
    bundle: ev.Bundle,
    scenes: Mapping[Scene, SceneSet],
    steps: int,
    seed: int,
    progress: bool | None,
    log: Callable[[str], None],
) -> dict[str, MergeResult]:
    """Each of :data:`nsc_merge.demo.report.LEARNT` -> its merge, learnt on ``scenes`` without their labels.

    The models that ``match`` and ``distill`` match run once for every distinct batch, so these come again.
    """
    own = ev.calibration_batches(bundle.tasks, scenes, BATCH, steps, seed)
    again = ev.calibration_batches(bundle.tasks, scenes, MATCHING_BATCH, ev.VALIDATION_SCENES // MATCHING_BATCH, seed)
    few = min(steps, MATCHING_STEPS)
    found = {}
    for method, batches, count, options in (
        (NSC, own, steps, {}),
        (MATCH, again, few, {}),
        (DISTILL, again, few, ev.distilled_outputs(bundle)),
    ):
        result = merge(
            bundle.backbone,
            bundle.adapters,
            batches,
            method=method,
            steps=count,
            seed=seed,
            progress=progress,
            **options,
        )
        seconds = sum(entry["seconds"] for entry in result.history)
        name = "NSC" if method == NSC else method
        log(f"{name}, {seconds:.1f} s: {result.course} (started at {result.options['init']:g})")
        found[method] = result
    return found


def _named(gaps: Mapping[str, tuple[float, float]]) -> dict[str, dict[str, float]]:
    return {method: {"points": points, "error": error} for method, (points, error) in gaps.items()}
