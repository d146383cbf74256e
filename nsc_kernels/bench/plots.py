"""Pictures of reports, as PNG and SVG.

    python -m nsc_kernels.bench plot report.jsonl --out pictures

roofline        every contender's rate over operations per byte, under what the machine can do (one per device, dtype)
speedups        time over the first contender's, a bar per contender, grouped by layer, forward and backward
growth-T, -R, -K   time over tokens, ranks, adapters, where the report has at least three of them with all else equal

All figures are medians; whiskers are the 20th and 80th percentile of the samples.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .ceilings import of_rows
from .report import add_reports, asked_for
from .tables import Row, heading, is_timed, of_several, without_statistics

# Okabe and Ito's colours, which the colour-blind tell apart; the first contender is always the first.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8B6914", "#555555", "#000000")
MARKERS = "osD^vPX*hp"  # one more than colours: a pair of both is met again after 90
HATCHES = ("", "///", "...", "xxx")
LEAST_POINTS = 3
STYLE: Any = {"svg.hashsalt": "nsc_kernels", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def configurations(rows: Sequence[Row]) -> Iterator[tuple[tuple[Any, ...], list[Row]]]:
    """Timed rows of one set, dtype, number of threads and way of measuring, and of one backend of ours where the report
    has several; a picture each.
    """
    fields = ("set", *(("backend",) if of_several(rows) else ()), "dtype", "threads", "how", "cache")
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if is_timed(row):
            groups.setdefault(tuple(row.get(name) for name in fields), []).append(row)
    yield from groups.items()


def directions(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["direction"] for row in rows))


def panels(rows: Sequence[Row], size: tuple[float, float] = (6.4, 3.4)) -> tuple[Figure, list[tuple[Axes, str]]]:
    """A panel for each direction that there is, side by side; together narrow enough to be read on a phone."""
    found = directions(rows)
    figure, axes = plt.subplots(1, len(found), figsize=size, sharey=True, layout="constrained", squeeze=False)
    return figure, list(zip(axes.flat, found, strict=True))


def contenders(rows: Iterable[Row]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each."""
    names = dict.fromkeys(row["contender"] for row in rows)
    return {name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}


def logarithmic(axis: Axes, what: str) -> None:
    """Both axes, once all is drawn on them, with plain numbers: so many that some are there, and none over another."""
    axis.set(xscale="log", yscale="log", xlabel=what)
    for one in (axis.xaxis, axis.yaxis):
        low, high = one.get_view_interval()
        decades = math.log10(high / low)
        steps = (1.0,) if decades > 3 else (1.0, 2.0, 5.0) if decades > 0.8 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
        one.set_major_locator(LogLocator(10, steps, numticks=100))
        one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        one.set_minor_formatter(NullFormatter())


def roofline(rows: Sequence[Row], here: Sequence[Row]) -> Figure | None:
    found = of_rows(rows, here[0]["dtype"], here[0]["threads"])
    if found is None or "operations" not in here[0]:
        return None
    figure, axes = panels(here)
    intensities = [row["operations"] / row["least_bytes"] for row in here]
    ridge = found.products / found.memory
    unit, size = ("TFLOP/s", 1e12) if found.products >= 1e12 else ("GFLOP/s", 1e9)
    ends = min([*intensities, ridge]) / 1.6, max([*intensities, ridge]) * 1.6
    for axis, direction in axes:
        at = [ends[0], ridge, ends[1]]
        axis.plot(at, [min(found.memory * x, found.products) / size for x in at], color="#999999", lw=1.2, zorder=1)
        for name, (colour, marker) in contenders(here).items():
            mine = [row for row in here if (row["contender"], row["direction"]) == (name, direction)]
            x = [row["operations"] / row["least_bytes"] for row in mine]
            y = [row["operations"] / row["us_p50"] * 1e6 / size for row in mine]
            said = without_statistics(name, here)
            axis.scatter(x, y, s=20, color=colour, marker=marker, label=said, alpha=0.85, lw=0, zorder=2)
        logarithmic(axis, "operations per byte, at least moved")
        axis.set_title(direction)
    axes[0][0].set_ylabel(unit)
    axes[-1][0].legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def whiskers(row: Row, first: Row) -> tuple[float, float, float]:
    """Median, and down and up to the 20th and 80th percentile, of the ratio in a round."""
    ratios = sorted(a / b for a, b in zip(row["us"], first["us"], strict=True))
    middle, fifth = statistics.median(ratios), len(ratios) // 5
    return middle, middle - ratios[fifth], ratios[len(ratios) - 1 - fifth] - middle


def label(row: Row) -> str:
    return f"{row['name']}\n{row['K']}x{row['r']}, T={row['T']}"


def speedups(rows: Sequence[Row], here: Sequence[Row]) -> Figure | None:
    first = here[0]["over"]
    # Of the same trial: only there are rounds the same.
    firsts = {(row["trial"], row["direction"]): row for row in here if row["contender"] == first}
    others = [name for name in contenders(here) if name != first]
    shapes = list(dict.fromkeys(label(row) for row in here))
    if not firsts or not others:
        return None
    # Bars lie, one shape below the other: their names would be wider than they are.
    figure, axes = panels(here, size=(5.6, 1.3 + len(shapes) * max(0.36, 0.14 * len(others))))
    colours = contenders(here)
    hatches = {name: HATCHES[i // len(COLOURS) % len(HATCHES)] for i, name in enumerate(colours)}
    for axis, direction in axes:
        for i, name in enumerate(others):
            mine = {label(row): row for row in here if (row["contender"], row["direction"]) == (name, direction)}
            at, lengths, errors = [], [], []
            for j, shape in enumerate(shapes):
                one = firsts.get((mine[shape]["trial"], direction)) if shape in mine else None
                if one is not None and mine[shape]["over"] == first:
                    middle, down, up = whiskers(mine[shape], one)
                    at.append(j + (i - (len(others) - 1) / 2) * 0.8 / len(others))
                    lengths.append(middle)
                    errors.append((down, up))
            if at:
                bounds = [[error[k] for error in errors] for k in (0, 1)]
                look: Any = {"color": colours[name][0], "hatch": hatches[name], "edgecolor": "white", "lw": 0}
                said = without_statistics(name, here)
                axis.barh(at, lengths, 0.8 / len(others), xerr=bounds, error_kw={"lw": 0.7}, label=said, **look)
        axis.axvline(1, color="#333333", lw=0.9)
        axis.set(title=direction, xlabel=f"time over {first}'s")
    # Of axes that are shared: for all panels.
    axes[0][0].set_yticks(range(len(shapes)), shapes, fontsize=8)
    axes[0][0].invert_yaxis()
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, loc="outside lower center", ncols=min(len(others), 4))
    return figure


AXES: dict[str, tuple[Callable[[Row], Any], Callable[[Row], Any], str]] = {
    "T": (lambda r: r["T"], lambda r: (r["name"], r["K"], r["r"]), "tokens"),
    "R": (lambda r: r["K"] * r["r"], lambda r: (r["name"], r["T"], r["K"]), "rank of all adapters"),
    "K": (lambda r: r["K"], lambda r: (r["name"], r["T"], r["K"] * r["r"]), "adapters of one rank in all"),
}


def growth(axis_name: str) -> Callable[[Sequence[Row], Sequence[Row]], Figure | None]:
    value, fixed, what = AXES[axis_name]

    def draw_growth(rows: Sequence[Row], here: Sequence[Row]) -> Figure | None:
        series: dict[tuple[Any, ...], set[Any]] = {}
        for row in here:
            series.setdefault(fixed(row), set()).add(value(row))
        longest = max(series, key=lambda key: len(series[key]))
        if len(series[longest]) < LEAST_POINTS:
            return None
        figure, axes = panels(here)
        for axis, direction in axes:
            for name, (colour, marker) in contenders(here).items():
                of_one = [r for r in here if (r["contender"], r["direction"], fixed(r)) == (name, direction, longest)]
                mine = sorted({value(row): row for row in of_one}.values(), key=value)  # what was measured twice once
                x, y = [value(row) for row in mine], [row["us_p50"] / 1e3 for row in mine]
                low, high = ([row[name] / 1e3 for row in mine] for name in ("us_p20", "us_p80"))
                axis.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
                axis.plot(x, y, color=colour, marker=marker, ms=4, lw=1.2, label=without_statistics(name, here))
            logarithmic(axis, what)
            axis.set_title(direction)
        axes[0][0].set_ylabel("milliseconds")
        axes[0][0].legend(frameon=False, fontsize=8)
        rest = " ".join(f"{key}={part}" if i else str(part) for i, (key, part) in enumerate(_rest(axis_name, longest)))
        figure.supxlabel(rest, fontsize=8)
        return figure

    return draw_growth


def _rest(axis_name: str, key: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    names = {"T": ("layer", "K", "rank"), "R": ("layer", "T", "K"), "K": ("layer", "T", "R")}[axis_name]
    yield from zip(names, key, strict=True)


PICTURES: dict[str, Callable[[Sequence[Row], Sequence[Row]], Figure | None]] = {
    "roofline": roofline,
    "speedups": speedups,
    **{f"growth-{name}": growth(name) for name in AXES},
}


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Every picture that the rows are enough for, as PNG and SVG in ``folder``; where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with plt.rc_context(STYLE):
        for configuration, here in configurations(rows):
            for name, picture in PICTURES.items():
                figure = picture(rows, here)
                if figure is None:
                    continue
                figure.suptitle(heading(here[0], rows).partition(";")[0], fontsize=9)
                stem = "-".join([name, *(str(part) for part in configuration if part)])
                for ending in ("png", "svg"):
                    path = folder / f"{stem}.{ending}"
                    metadata = {"Date": None} if ending == "svg" else {}
                    figure.savefig(folder / f".{stem}.tmp", format=ending, dpi=140, metadata=metadata)
                    (folder / f".{stem}.tmp").replace(path)
                    written.append(path)
                plt.close(figure)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m nsc_kernels.bench plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_reports(parser)
    parser.add_argument("--out", type=Path, default=Path("bench-plots"), metavar="FOLDER", help="(default %(default)s)")
    arguments = parser.parse_args(argv)
    for path in draw(asked_for(parser, arguments), arguments.out):
        print(path)
    return 0
