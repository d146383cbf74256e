"""Pictures of an evaluation: how much of every task each method keeps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nsc_merge.evaluation.tables import named
from nsc_merge.utils.plot_style import pyplot_in_style, write_picture

HEAT_MAP = "normalised.png"


def draw(document: Mapping[str, Any], out: Path) -> list[Path]:
    """Draw ``normalised.png``, methods by tasks; returns what was written.

    Raises:
        RuntimeError: if matplotlib is not installed.
    """
    rows = [row for row in document["rows"] if all(run["method"] != "finetuned" for run in row["runs"])]
    if not rows:
        return []
    tasks = list(document["tasks"])
    grid = [
        [
            *(_mean([run["normalised"][task] for run in row["runs"]]) for task in tasks),
            _mean([run["average"] for run in row["runs"]]),
        ]
        for row in rows
    ]
    path = out / HEAT_MAP
    with pyplot_in_style() as pyplot:
        figure, axis = pyplot.subplots(figsize=(1.8 + 0.78 * (len(tasks) + 1), 1.2 + 0.34 * len(rows)))
        reach = _reach(grid)
        # White is the fine-tuned model.
        image = axis.imshow(grid, cmap="RdBu", vmin=100 - 1.2 * reach, vmax=100 + 1.2 * reach, aspect="auto")
        for y, values in enumerate(grid):
            for x, value in enumerate(values):
                dark = not math.isnan(value) and abs(value - 100) > 0.72 * reach
                axis.text(
                    x,
                    y,
                    "–" if math.isnan(value) else f"{value:.1f}",
                    ha="center",
                    va="center",
                    fontsize=8.5,
                    color="white" if dark else "black",
                    weight="bold" if x == len(tasks) else "normal",
                )
        for x in range(len(tasks) + 1):
            # The average stands apart, behind a wider gap.
            axis.axvline(x - 0.5, color="white", linewidth=5 if x == len(tasks) else 1)
        for y in range(len(rows)):
            axis.axhline(y - 0.5, color="white", linewidth=1)
        axis.set_xticks(
            range(len(tasks) + 1), [*tasks, "average"], rotation=30, ha="left", rotation_mode="anchor"
        )
        axis.set_yticks(range(len(rows)), [named(row, document) for row in rows])
        axis.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
        for spine in axis.spines.values():
            spine.set_visible(False)
        bar = figure.colorbar(image, ax=axis, fraction=0.04, pad=0.02, extend=_beyond(grid, 1.2 * reach))
        bar.set_label("% of the fine-tuned model")
        bar.outline.set_visible(False)
        write_picture(figure, path)
    return [path]


def _reach(grid: list[list[float]]) -> float:
    """Distance from 100 at which colours end: that of all but the most extreme values, at least 5."""
    distances = sorted(abs(value - 100) for row in grid for value in row if not math.isnan(value))
    return max(5.0, distances[int(0.95 * (len(distances) - 1))]) if distances else 5.0


def _beyond(grid: list[list[float]], reach: float) -> str:
    """At which ends of the colours values lie further out, for the colour bar's arrows."""
    values = [value for row in grid for value in row if not math.isnan(value)]
    low, high = min(values, default=100) < 100 - reach, max(values, default=100) > 100 + reach
    return "both" if low and high else "min" if low else "max" if high else "neither"


def _mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else math.nan
