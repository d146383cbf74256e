"""Pictures of a merge: its coefficients, and the ratios over the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nsc_merge.utils.plot_style import COLOURS, place, pyplot_in_style, running_mean, write_picture

COEFFICIENTS_PLOT = "coefficients.png"
RATIOS_PLOT = "ratios.png"
LOSSES_PLOT = "losses.png"


def draw(
    coefficients: Mapping[str, Mapping[str, float]],
    dead: Mapping[str, Sequence[str]],
    history: Sequence[Mapping[str, Any]],
    folder: Path,
    window: int = 1,
) -> list[Path]:
    """Draw ``coefficients.png`` and, if there is a history, ``ratios.png``, or ``losses.png`` of methods that minimise
    something else; returns what was written.

    Args:
        window: steps that the curves are means over. Each step has batches of its own, which differ by more than the
            coefficients change: only means over the same batches show how far they have come.

    Raises:
        RuntimeError: if matplotlib is not installed.
    """
    written = [folder / COEFFICIENTS_PLOT]
    with pyplot_in_style() as pyplot:
        _draw_coefficients(pyplot, coefficients, dead, written[0])
        if history:
            measured = "omega" in history[0]
            written.append(folder / (RATIOS_PLOT if measured else LOSSES_PLOT))
            _draw_history(pyplot, history, "omega" if measured else "loss", min(window, len(history)), written[1])
    return written


def _draw_coefficients(
    pyplot: Any,
    coefficients: Mapping[str, Mapping[str, float]],
    dead: Mapping[str, Sequence[str]],
    out: Path,
) -> None:
    cells: dict[tuple[int, str], list[str]] = {}
    for path in coefficients:
        cells.setdefault(place(path), []).append(path)
    blocks = sorted({block for block, _ in cells})
    names = list(dict.fromkeys(name for _, name in cells))
    most = {name: max(len(paths) for (_, own), paths in cells.items() if own == name) for name in names}
    tasks = list(next(iter(coefficients.values())))
    values = [value for row in coefficients.values() for value in row.values()]
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.01, high + 0.01
    width = 0.5 + 0.32 * len(names)
    # In inches; longer names would run into each other.
    slanted = {"rotation": 30, "ha": "left", "rotation_mode": "anchor"} if max(map(len, tasks)) * 0.1 > width else {}
    figure, axes = pyplot.subplots(
        1,
        len(tasks),
        figsize=(1 + width * len(tasks), 1.6 + 0.24 * len(blocks)),
        sharey=True,
        squeeze=False,
    )
    for axis, task in zip(axes[0], tasks, strict=True):
        grid = [[math.nan] * len(names) for _ in blocks]
        for (block, name), paths in cells.items():
            row, column = blocks.index(block), names.index(name)
            grid[row][column] = sum(coefficients[path][task] for path in paths) / len(paths)
            if any(task in dead.get(path, ()) for path in paths):
                light = grid[row][column] > (low + 3 * high) / 4
                axis.plot(column, row, marker="x", color="black" if light else "white", markersize=6)
        image = axis.imshow(grid, cmap="viridis", vmin=low, vmax=high, aspect="auto")
        axis.set_title(task, **slanted)
        labels = [name if most[name] == 1 else f"{name} (mean of {most[name]})" for name in names]
        axis.set_xticks(range(len(names)), labels, rotation=90)
        axis.tick_params(length=0)
    axes[0][0].set_yticks(range(len(blocks)), ["other" if block < 0 else str(block) for block in blocks])
    axes[0][0].set_ylabel("block")
    bar = figure.colorbar(image, ax=axes[0].tolist(), fraction=0.05, pad=0.02)
    bar.set_label("coefficient λ (x: received no gradient)" if dead else "coefficient λ")
    write_picture(figure, out)


def _draw_history(
    pyplot: Any, history: Sequence[Mapping[str, Any]], quantity: str, window: int, out: Path
) -> None:
    figure, axis = pyplot.subplots(figsize=(7, 4))
    steps = [entry["step"] for entry in history]

    def curve(values: Sequence[float], label: str, dashes: str = "-", **style: Any) -> None:
        if window > 1:
            axis.plot(steps, values, dashes, **{**style, "lw": 0.8, "alpha": 0.3})
        # The mean over all steps there are is a single point.
        marker = "o" if window == len(steps) else None
        axis.plot(steps[window - 1 :], running_mean(values, window), dashes, label=label, marker=marker, **style)

    for index, task in enumerate(history[0][quantity]):
        colour = COLOURS[index % len(COLOURS)]
        dashes = "-" if index < len(COLOURS) else "--"
        curve([entry[quantity][task] for entry in history], task, dashes, color=colour, lw=1.4)
    curve([entry["objective"] for entry in history], "mean", color="black", lw=2.4)
    if window > 1:
        axis.set_title(f"mean over {window} steps; faint: each step, on its own batches", loc="left", fontsize=9)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("step")
    axis.set_ylabel("null-space ratio ω" if quantity == "omega" else quantity)
    axis.grid(axis="y", color="0.9")
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    write_picture(figure, out)
