"""Pictures of the phenomena."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nsc_merge.analysis.tracking import Tracking
from nsc_merge.utils.plot_style import COLOURS, place, pyplot_in_style, write_picture


def draw_tracking(tracking: Tracking, column: str | None, out: Path) -> Path:
    """Ratio of every block over training, the mean in black; the logged ``column`` in a panel above.

    Raises:
        RuntimeError: if matplotlib is not installed.
    """
    with pyplot_in_style() as pyplot:
        panels = 1 if column is None else 2
        figure, axes = pyplot.subplots(
            panels,
            1,
            figsize=(6.6, 3.8 if column is None else 5.4),
            sharex=True,
            squeeze=False,
            height_ratios=[1] if column is None else [1, 2.4],
            layout="constrained",
        )
        if column is not None:
            logged = tracking.columns[column]
            steps = sorted(logged)
            axes[0][0].plot(steps, [logged[step] for step in steps], color="black", lw=1.6)
            axes[0][0].set_ylabel(column)
            axes[0][0].grid(axis="y", color="0.92")
        axis = axes[-1][0]
        blocks = tracking.by_block()
        colours = pyplot.get_cmap("viridis")
        numbered = [name for name in blocks if name.isdigit()]
        for name, values in blocks.items():
            shade = numbered.index(name) / max(len(numbered) - 1, 1) if name in numbered else None
            colour = "0.6" if shade is None else colours(0.92 * shade)
            axis.plot(
                tracking.steps, values, color=colour, lw=1.3, label=f"block {name}" if shade is None else name
            )
        axis.plot(tracking.steps, tracking.mean(), color="black", lw=2.6, label="mean")
        if not math.isnan(tracking.random):
            axis.axhline(tracking.random, color="0.45", lw=1, ls=":", label="random A")
        axis.set_xlabel("training step")
        axis.set_ylabel("null-space ratio ω")
        axis.grid(axis="y", color="0.92")
        axis.legend(
            title="block",
            loc="center left",
            bbox_to_anchor=(1.01, 0.5),
            frameon=False,
            fontsize=9,
            ncols=1 + len(blocks) // 14,
        )
        write_picture(figure, out)
    return out


def draw_quartiles(
    studies: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str], title: str, out: Path
) -> Path:
    """Quality by shares of the ratio, a panel for every task, with standard errors.

    Args:
        studies: task -> what :func:`nsc_merge.analysis.sample_study` returns.
        labels: task -> what its quality is, for the axis.
        title: of the whole.

    Raises:
        RuntimeError: if matplotlib is not installed.
    """
    columns = min(4, len(studies))
    lines = math.ceil(len(studies) / columns)
    with pyplot_in_style() as pyplot:
        figure, axes = pyplot.subplots(
            lines,
            columns,
            figsize=(2.5 * columns + 0.4, 2.3 * lines + 0.6),
            squeeze=False,
            layout="constrained",
        )
        for axis in axes.flat[len(studies) :]:
            axis.set_visible(False)
        for axis, (task, study) in zip(axes.flat, studies.items(), strict=False):
            places = range(1, len(study["mean"]) + 1)
            axis.errorbar(
                places,
                study["mean"],
                yerr=study["error"],
                color=COLOURS[0],
                marker="o",
                ms=5,
                lw=1.6,
                capsize=3,
            )
            axis.set_title(f"{task}   ρ = {study['rho']:+.2f}")
            axis.set_ylabel(labels[task])
            axis.set_xticks(list(places), [f"{ratio:.3f}" for ratio in study["ratio"]])
            axis.set_xlim(0.6, len(study["mean"]) + 0.4)
            axis.grid(axis="y", color="0.92")
        figure.supxlabel("mean null-space ratio ω of the share of samples", fontsize=10)
        figure.suptitle(title, fontsize=11)
        write_picture(figure, out)
    return out


def draw_bound(checks: Sequence[Mapping[str, Any]], out: Path) -> Path:
    """How far above its bound the effect lies, by module; a logarithmic axis that starts at the bound.

    Raises:
        RuntimeError: if matplotlib is not installed.
    """
    shown = [check for check in checks if check["tightness"] is not None]
    with pyplot_in_style() as pyplot:
        figure, axis = pyplot.subplots(figsize=(6.6, 3.6), layout="constrained")
        names = list(dict.fromkeys(check["path"].rpartition(".")[2] for check in shown))
        for number, name in enumerate(names):
            own = [check for check in shown if check["path"].rpartition(".")[2] == name]
            places = [_place(check["path"], index) for index, check in enumerate(own)]
            colour = COLOURS[number % len(COLOURS)]
            axis.vlines(
                [place + 0.12 * (number - (len(names) - 1) / 2) for place in places],
                [check["least"] for check in own],
                [check["tightness"] for check in own],
                color=colour,
                lw=1.2,
            )
            axis.plot(
                [place + 0.12 * (number - (len(names) - 1) / 2) for place in places],
                [check["tightness"] for check in own],
                "o",
                color=colour,
                ms=5,
                label=name,
            )
        axis.axhline(1, color="black", lw=1.4)
        axis.text(
            0.995, 1, "bound", transform=axis.get_yaxis_transform(), ha="right", va="bottom", fontsize=9
        )
        axis.set_yscale("log")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_xlabel("block")
        axis.set_ylabel("‖sBAz‖ / bound: median, and least")
        axis.grid(axis="y", color="0.92")
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        write_picture(figure, out)
    return out


def _place(path: str, index: int) -> int:
    block = place(path)[0]
    return block if block >= 0 else index
