"""Pictures of a merge: its coefficients, and the ratios over the steps."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COEFFICIENTS_PLOT = "coefficients.png"
RATIOS_PLOT = "ratios.png"
LOSSES_PLOT = "losses.png"

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#7B3294")
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.bbox": "tight",
    "savefig.dpi": 130,
}


def draw(
    coefficients: Mapping[str, Mapping[str, float]],
    dead: Mapping[str, Sequence[str]],
    history: Sequence[Mapping[str, Any]],
    folder: Path,
) -> list[Path]:
    """Draw ``coefficients.png`` and, if there is a history, ``ratios.png``, or ``losses.png`` of methods that minimise
    something else; returns what was written.

    Raises:
        RuntimeError: if matplotlib is not installed.
    """
    written = [folder / COEFFICIENTS_PLOT]
    with pyplot_in_style() as pyplot:
        _draw_coefficients(pyplot, coefficients, dead, written[0])
        if history:
            measured = "omega" in history[0]
            written.append(folder / (RATIOS_PLOT if measured else LOSSES_PLOT))
            _draw_history(pyplot, history, "omega" if measured else "loss", written[1])
    return written


@contextmanager
def pyplot_in_style() -> Iterator[Any]:
    """``matplotlib.pyplot`` without a display, in the style of all pictures here.

    Raises:
        RuntimeError: if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise RuntimeError("plots need matplotlib: pip install matplotlib") from None

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(_STYLE):
        yield pyplot


def place(path: str) -> tuple[int, str]:
    """Block number and name within the block of a module; block -1 outside the blocks."""
    match = re.search(r"(?:^|\.)layers?\.(\d+)\.(.+)$", path)
    return (int(match[1]), match[2].rsplit(".", 1)[-1]) if match else (-1, path.rsplit(".", 1)[-1])


def _draw_coefficients(
    pyplot: Any,
    coefficients: Mapping[str, Mapping[str, float]],
    dead: Mapping[str, Sequence[str]],
    out: Path,
) -> None:
    places = {path: place(path) for path in coefficients}
    blocks = sorted({block for block, _ in places.values()})
    names = list(dict.fromkeys(name for _, name in places.values()))
    tasks = list(next(iter(coefficients.values())))
    values = [value for row in coefficients.values() for value in row.values()]
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.01, high + 0.01
    figure, axes = pyplot.subplots(
        1,
        len(tasks),
        figsize=(1 + (0.5 + 0.32 * len(names)) * len(tasks), 1.6 + 0.24 * len(blocks)),
        sharey=True,
        squeeze=False,
    )
    for axis, task in zip(axes[0], tasks, strict=True):
        grid = [[math.nan] * len(names) for _ in blocks]
        for path, (block, name) in places.items():
            row, column = blocks.index(block), names.index(name)
            grid[row][column] = coefficients[path][task]
            if task in dead.get(path, ()):
                axis.plot(column, row, marker="x", color="white", markersize=6)
        image = axis.imshow(grid, cmap="viridis", vmin=low, vmax=high, aspect="auto")
        axis.set_title(task)
        axis.set_xticks(range(len(names)), names, rotation=90)
        axis.tick_params(length=0)
    axes[0][0].set_yticks(range(len(blocks)), ["other" if block < 0 else str(block) for block in blocks])
    axes[0][0].set_ylabel("block")
    bar = figure.colorbar(image, ax=axes[0].tolist(), fraction=0.05, pad=0.02)
    bar.set_label("coefficient λ (x: received no gradient)" if dead else "coefficient λ")
    figure.savefig(out)
    pyplot.close(figure)


def _draw_history(pyplot: Any, history: Sequence[Mapping[str, Any]], quantity: str, out: Path) -> None:
    figure, axis = pyplot.subplots(figsize=(7, 4))
    steps = [entry["step"] for entry in history]
    for index, task in enumerate(history[0][quantity]):
        colour = COLOURS[index % len(COLOURS)]
        dashes = "-" if index < len(COLOURS) else "--"
        axis.plot(
            steps, [entry[quantity][task] for entry in history], dashes, color=colour, lw=1.4, label=task
        )
    axis.plot(steps, [entry["objective"] for entry in history], color="black", lw=2.4, label="mean")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("step")
    axis.set_ylabel("null-space ratio ω" if quantity == "omega" else quantity)
    axis.grid(axis="y", color="0.9")
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(out)
    pyplot.close(figure)
