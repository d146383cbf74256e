"""What the demo says: its table, what came out in words, and which method when."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from nsc_merge.demo.tasks import TASKS, Task

ZERO_SHOT, ALONE, START, TUNED, TUNED_BY_LOSS, UNIFORM, NSC, MATCH, DISTILL = (
    "zero_shot",
    "alone",
    "task_arithmetic_start",
    "task_arithmetic_tuned",
    "task_arithmetic_tuned_by_loss",
    "task_arithmetic_uniform",
    "nsc",
    "match",
    "distill",
)
LEARNT = (NSC, MATCH, DISTILL)
Gap = tuple[float, float]

# What a method takes, and how it does against tuned task arithmetic in the table of docs/results.md.
_WHEN = {
    DISTILL: (
        "unlabelled inputs and the tasks' heads",
        "in docs/results.md above it for vision and a LLaVA, not in every seed for other language models",
    ),
    MATCH: (
        "unlabelled inputs alone",
        "there above it for eight vision tasks, mostly not for fewer or for language",
    ),
    NSC: ("unlabelled inputs alone, as published", "there mostly below it, too"),
}


def verdict(average: float, gaps: Mapping[str, Gap]) -> str:
    """What came out, in plain words and in the direction that the numbers have.

    Args:
        average: normalised average of NSC.
        gaps: method -> NSC minus that method in points, and the standard error.
    """
    outcomes = {method: points if _differs(points, error) else 0.0 for method, (points, error) in gaps.items()}
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
        f"Without labels NSC keeps {average:.1f} % of the separate models. It is {_against(*gaps[START])} task "
        f"arithmetic at its own start, {_against(*gaps[UNIFORM])} task arithmetic at 1/K and "
        f"{_against(*gaps[TUNED])} task arithmetic tuned with labels (±: standard error over test scenes). {meaning}"
    )


def advice(gaps: Mapping[str, Gap]) -> dict[str, str]:
    """Method -> when to use it: what has to be at hand, and how it does against tuned task arithmetic.

    Args:
        gaps: each of :data:`LEARNT` -> that method minus tuned task arithmetic in points, and the standard error.
    """
    lines = {
        method: f"{takes}: {_against(*gaps[method])} tuned TA here; {elsewhere}."
        for method, (takes, elsewhere) in _WHEN.items()
    }
    return {**lines, TUNED: "labelled data: one coefficient, nothing learnt, and what the others have to beat."}


def _differs(points: float, error: float) -> bool:
    return abs(points) > 2 * error


def _against(points: float, error: float) -> str:
    if not _differs(points, error):
        return f"level with ({points:+.1f} ± {error:.1f})"
    return f"{abs(points):.1f} ± {error:.1f} points {'above' if points > 0 else 'below'}"


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
    lines += ["", *textwrap.wrap(_LEGEND.format(**summary), 79)]
    lines += ["", *textwrap.wrap(summary["verdict"], 79), "", "Which to use, by what you have:"]
    for method, words in summary["advice"].items():
        label = "tuned TA" if method == TUNED else summary["methods"][method]["label"]
        lines += textwrap.wrap(f"{label:<10}{words}", 79, subsequent_indent=" " * 10)
    lines.append("")
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
    "summed loss. NSC, match and distill used the same validation scenes without their labels: {steps} steps of "
    "NSC, {matching_steps} of match and distill."
)


def _digits(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}"


def _unit(task: Task) -> str:
    return f"{task.metric} {'↓' if task.lower_is_better else '↑'}"
