"""The tables of reports, as they were printed when they were measured, or in Markdown.

    python -m nsc_kernels.bench table report.jsonl
    python -m nsc_kernels.bench table report.jsonl --contenders fused,concat,peft --markdown
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from .ceilings import of_rows
from .report import add_reports, asked_for
from .tables import Row, closing, configurations, duration, heading, is_noisy, share, table, without_statistics

DIRECTIONS = ("forward", "backward")


def each(found: dict[str, Row], text: str) -> str:
    """What a format says of the forward and of the backward, or of a merge's step, which is both."""
    directions = tuple(found) if found.keys() - set(DIRECTIONS) else DIRECTIONS
    return " / ".join(text.format(**found[direction]) if direction in found else "-" for direction in directions)


def percent(part: float | None) -> str:
    """``-`` where no ceilings were measured."""
    return "-" if part is None else f"{part:.0%}"


def marked(row: Row) -> str:
    return f"{row['over_ours']:.2f}×{'~' if is_noisy(row) else ''}" if row["over_ours"] else "-"


def markdown(rows: Sequence[Row]) -> Iterator[str]:
    """A table for each way of measuring: the first contender's time and share, then ratios, forward / backward."""
    for here in configurations(rows):
        ceilings, first = of_rows(rows, here[0]["dtype"], here[0]["threads"]), here[0]["over"]
        others = [name for name in dict.fromkeys(row["contender"] for row in here) if name != first]
        headed = [without_statistics(name, here) for name in others]
        yield f"{heading(here[0], rows)}."
        yield ""
        yield f"| layer | K × r | T | {first} | of the roofline | " + " | ".join(headed) + " |"
        yield "|" + "---|" * (5 + len(others))
        cells: dict[tuple[str, str, str], dict[str, dict[str, Row]]] = {}
        for row in here:
            key = f"{row['name']} {row['d_in']} → {row['d_out']}", f"{row['K']} × {row['r']}", str(row["T"])
            cells.setdefault(key, {}).setdefault(row["contender"], {})[row["direction"]] = row
        for key, found in cells.items():
            said = {
                name: {
                    direction: {
                        "time": duration(row["us_p50"]),
                        "ratio": marked(row),
                        "share": percent(share(row, ceilings)),
                    }
                    for direction, row in mine.items()
                }
                for name, mine in found.items()
            }
            ours = said.get(first, {})
            ratios = [each(said.get(name, {}), "{ratio}") for name in others]
            yield "| " + " | ".join([*key, each(ours, "{time}"), each(ours, "{share}"), *ratios]) + " |"
        yield ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m nsc_kernels.bench table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_reports(parser)
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args(argv)
    rows = asked_for(parser, arguments)
    print("\n".join(markdown(rows) if arguments.markdown else [*table(rows, ()), *closing(rows)]))
    return 0
