"""Draws what methods gain over task arithmetic whose scale was tuned with labels, a panel for each suite and K.

    python -m bench.quality.picture                     bench/results/quality/gains.png

A dot is a seed. Methods that see no labels are filled, others are not. Rows that were measured on adapters trained anew
(the folder `bounded` of the results) stand in the same panels, over the task arithmetic of those.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from nsc_merge.utils.atomic_file import replacing
from nsc_merge.utils.plot_style import COLOURS, pyplot_in_style

from .records import RESULTS
from .summary import Averages, columns

REFERENCE = "TA"
# Label -> rows, of which a suite has one.
SHOWN = {
    "oracle": ("oracle",),
    "distill, RegMean's terms": ("distill answers regmean", "distill regmean"),
    "distill along answers": ("distill answers",),
    "distill, bounded": ("distill bounded",),
    "distill, divergence": ("distill",),
    "match": ("match",),
    "RegMean": ("RegMean",),
    "anti-NSC": ("anti-NSC",),
    "NSC": ("NSC",),
    "TA@0.4": ("TA@0.4",),
    "TSV": ("TSV",),
    "TIES": ("TIES",),
}
LABELLED = ("oracle", "TSV", "TIES")
_ACROSS = 5


def gains(rows: Sequence[str], *measured: Averages) -> list[float]:
    """Of the first of ``measured`` that has one of some rows, over task arithmetic of the same seed and measurement."""
    for averages in measured:
        reference = averages.get(REFERENCE, {})
        found = [value - reference[seed] for row in rows for seed, value in averages.get(row, {}).items()
                 if seed in reference]  # fmt: skip
        if found:
            return found
    return []


def draw(found: dict[str, Averages], path: Path, anew: Mapping[str, Averages] | None = None) -> None:
    """Write the picture of the columns of :func:`summary.columns` that have a tuned row; rows that one lacks are taken
    from ``anew``.
    """
    panels = {title: (averages, (anew or {}).get(title, {})) for title, averages in found.items()
              if REFERENCE in averages}  # fmt: skip
    names = [name for name, rows in SHOWN.items() if any(gains(rows, *panel) for panel in panels.values())]
    rows = math.ceil(len(panels) / _ACROSS)
    across = min(len(panels), _ACROSS)
    with pyplot_in_style() as pyplot, replacing(path) as temporary:
        size = (2.4 * across + 1.2, (0.26 * len(names) + 0.8) * rows)
        figure, axes = pyplot.subplots(rows, across, sharey=True, squeeze=False, figsize=size)
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis, (title, panel) in zip(axes.flat, panels.items(), strict=False):
            axis.axvline(0, color="#999999", linewidth=1)
            axis.set_title(title)
            for place, name in enumerate(names):
                values = gains(SHOWN[name], *panel)
                colour = COLOURS[place % len(COLOURS)]
                face = "none" if name in LABELLED else colour
                axis.scatter(values, [place] * len(values), s=26, edgecolors=colour, facecolors=face, zorder=3)
            axis.set_yticks(range(len(names)), names)
            axis.grid(axis="y", color="#eeeeee")
        axes[0, 0].invert_yaxis()
        figure.supxlabel("points over task arithmetic tuned with labels")
        figure.tight_layout()
        figure.savefig(temporary)
        pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, help="the picture (default: gains.png next to the results)")
    given = parser.parse_args(arguments)
    found = columns(given.results)
    if not any(REFERENCE in averages for averages in found.values()):
        print(f"{given.results} holds no row {REFERENCE!r}; run.py makes it", file=sys.stderr)
        return 1
    path = given.out or given.results / "gains.png"
    draw(found, path, columns(given.results / "bounded"))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
