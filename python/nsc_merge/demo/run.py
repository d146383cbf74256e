"""``nsc-merge demo``: merge six real adapters with NSC, measure the result and write everything down."""

from __future__ import annotations

import json
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from nsc_merge.api import merge
from nsc_merge.demo import evaluate as ev
from nsc_merge.demo import plots
from nsc_merge.demo.tasks import TASKS, Task
from nsc_merge.utils.atomic_file import write_text
from nsc_merge.utils.option_checks import check_count, check_seed

BATCH = 32
_PICTURED_SCENE = 3

ZERO_SHOT, ALONE, START, TUNED, TUNED_BY_LOSS, UNIFORM, NSC = (
    "zero_shot",
    "alone",
    "task_arithmetic_start",
    "task_arithmetic_tuned",
    "task_arithmetic_tuned_by_loss",
    "task_arithmetic_uniform",
    "nsc",
)


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
        steps: optimisation steps of NSC.
        seed: order of the calibration batches.
        progress: as in :class:`nsc_merge.utils.progress.Progress`.
        log: receives one line per stage.

    Returns:
        The content of ``summary.json``; its ``verdict`` is for people, :func:`render` makes the table.

    Raises:
        ValueError: for unknown or too few tasks, and for ``steps`` or a ``seed`` that are no such numbers.
        NotADirectoryError: if ``out`` is, or lies in, a file.
        FileNotFoundError: if ``assets`` is incomplete.
    """
    unknown = [name for name in tasks if name not in TASKS]
    if unknown or len(set(tasks)) < 2 or len(set(tasks)) != len(tasks):
        raise ValueError(f"tasks: expected two or more different ones of {list(TASKS)}, found {list(tasks)}")
    check_count("steps", steps)
    check_seed(seed)
    there = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"out: expected a folder, found the file {there}")
    started = time.perf_counter()
    bundle = ev.load_bundle(assets or shipped_assets(), tasks)
    parameters = sum(parameter.numel() for parameter in bundle.backbone.parameters())
    log(f"base: ViT, {parameters / 1e6:.2f} M parameters; {len(tasks)} adapters: {', '.join(tasks)}")
    validation = ev.scene_sets(bundle.tasks, "val", ev.VALIDATION_SCENES)
    test = ev.scene_sets(bundle.tasks, "test", ev.TEST_SCENES)
    log(
        f"scenes from scikit-learn's digits and photographs: {ev.VALIDATION_SCENES} for validation, "
        f"{ev.TEST_SCENES} for test, of each kind ({', '.join(test)})"
    )

    result = merge(
        bundle.backbone,
        bundle.adapters,
        ev.calibration_batches(bundle.tasks, validation, BATCH, steps, seed),
        steps=steps,
        seed=seed,
        progress=progress,
    )
    seconds = sum(entry["seconds"] for entry in result.history)
    log(f"NSC, {seconds:.1f} s: {result.course} (started at {result.options['init']:g})")

    log("task arithmetic: tuning its scale on the labelled validation scenes")
    tuned = ev.tune_task_arithmetic(bundle, validation)
    start = float(result.options["init"])
    scales = {START: start, TUNED: tuned.by_average, TUNED_BY_LOSS: tuned.by_loss, UNIFORM: 1 / len(tasks)}
    merges = {**{method: ev.task_arithmetic(bundle, scale) for method, scale in scales.items()}, NSC: result}
    labels = {
        ZERO_SHOT: "zero-shot",
        ALONE: "each adapter alone",
        START: f"TA {start:g} (NSC's start)",
        TUNED: f"TA {tuned.by_average:g} (tuned)",
        TUNED_BY_LOSS: f"TA {tuned.by_loss:g} (tuned, loss)",
        UNIFORM: f"TA 1/{len(tasks)}",
        NSC: "NSC",
    }
    log("measuring every method on the test scenes")
    outputs = {
        ZERO_SHOT: ev.predict(bundle.backbone, bundle.heads, test),
        ALONE: ev.predict_alone(bundle, test),
        **{
            method: ev.predict(ev.merged_model(bundle, merged), bundle.heads, test)
            for method, merged in merges.items()
        },
    }
    scores = {method: ev.score(output, bundle.heads, test) for method, output in outputs.items()}
    reference = scores[ALONE]

    result.save(out, format="coefficients")
    result.save(out / "merged-adapter", format="lora")
    plots.plot_coefficients(result, out / "coefficients.png")
    plots.plot_ratios(result, out / "ratios.png")
    columns = {
        "alone": ALONE,
        f"TA {start:g} (start)": START,
        f"TA {tuned.by_average:g} (tuned)": TUNED,
        "NSC": NSC,
    }
    shown = {title: outputs[method] for title, method in columns.items()}
    plots.plot_predictions(bundle.tasks, test, shown, _PICTURED_SCENE, out / "predictions.png")
    gaps = {
        method: (
            scores[NSC].average(reference) - scores[method].average(reference),
            ev.standard_error(outputs[NSC], outputs[method], bundle.heads, test, reference),
        )
        for method in (START, TUNED, UNIFORM)
    }
    summary = {
        "seconds": round(time.perf_counter() - started, 1),
        "steps": steps,
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
                "normalised": score.normalised(reference),
                "average": score.average(reference),
            }
            for method, score in scores.items()
        },
        "nsc_minus": {method: {"points": points, "error": error} for method, (points, error) in gaps.items()},
        "verdict": verdict(scores[NSC].average(reference), gaps),
        "objective": result.objective,
        "dead": result.dead,
        "files": {
            "coefficients": str(out / "coefficients.json"),
            "history": str(out / "history.jsonl"),
            "merged adapter": str(out / "merged-adapter"),
            "plots": [str(out / f"{name}.png") for name in ("coefficients", "ratios", "predictions")],
            "summary": str(out / "summary.json"),
        },
    }
    write_text(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def verdict(average: float, gaps: dict[str, tuple[float, float]]) -> str:
    """What came out, in plain words and in the direction that the numbers have.

    Args:
        average: normalised average of NSC.
        gaps: method -> NSC minus that method in points, and the standard error.
    """

    def against(method: str) -> str:
        points, error = gaps[method]
        if abs(points) <= 2 * error:
            return f"level with ({points:+.1f} ± {error:.1f})"
        return f"{abs(points):.1f} ± {error:.1f} points {'above' if points > 0 else 'below'}"

    outcomes = {
        method: points if abs(points) > 2 * error else 0.0 for method, (points, error) in gaps.items()
    }
    if outcomes[TUNED] > 0:
        meaning = "On this mix NSC beats a single coefficient tuned with labels."
    elif outcomes[TUNED] == 0:
        meaning = "On this mix NSC matches a single coefficient tuned with labels, without needing any."
    elif outcomes[START] > 0:
        meaning = (
            "On this mix NSC improves on its start, but a single coefficient tuned with labels is better."
        )
    else:
        meaning = (
            "On this mix NSC does not help: leaving the coefficients at one well chosen value is better."
        )
    return (
        f"Without labels NSC keeps {average:.1f} % of the separate models. It is {against(START)} task "
        f"arithmetic at its own start, {against(UNIFORM)} task arithmetic at 1/K and {against(TUNED)} task "
        f"arithmetic tuned with labels (±: standard error over test scenes). {meaning}"
    )


def render(summary: dict[str, Any]) -> str:
    """The table, the verdict and the list of files, for a terminal of 80 columns."""
    names = list(summary["tasks"])
    first, wide, last = 22, 8, 9
    lines = [
        " " * first + "".join(f"{name:>{wide}}" for name in names) + f"{'average':>{last}}",
        " " * first + "".join(f"{_unit(TASKS[name]):>{wide}}" for name in names) + f"{'%':>{last}}",
    ]
    lines.append("-" * len(lines[0]))
    for method in summary["methods"].values():
        cells = "".join(f"{_digits(method['metrics'][name]):>{wide}}" for name in names)
        lines.append(f"{method['label']:<{first}}{cells}{method['average']:>{last}.1f}")
    lines += ["", *textwrap.wrap(_LEGEND, 79), "", *textwrap.wrap(summary["verdict"], 79), ""]
    dead = sum(len(tasks) for tasks in summary["dead"].values())
    if dead:
        note = (
            f"{dead} coefficients come after the last measured input, receive no gradient and kept their "
            f"start: {', '.join(summary['dead'])}."
        )
        lines += [*textwrap.wrap(note, 79), ""]
    for label, where in summary["files"].items():
        for index, path in enumerate(where if isinstance(where, list) else [where]):
            lines.append(f"{'' if index else label:<16}{path}")
    lines.append(f"{'total time':<16}{summary['seconds']:.0f} s")
    return "\n".join(lines)


_LEGEND = (
    "average: mean over tasks of the performance relative to each adapter alone. TA: task arithmetic, one "
    "coefficient for everything. tuned: on labelled validation scenes, by that average; tuned, loss: by the "
    "summed loss. NSC used the same validation scenes without their labels."
)


def _digits(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}"


def _unit(task: Task) -> str:
    return f"{task.metric} {'↓' if task.lower_is_better else '↑'}"
