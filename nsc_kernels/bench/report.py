"""A report: one JSONL file with the machine, its ceilings, and every figure with all its samples."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
from pathlib import Path
from typing import Any

from .measuring import read_rows
from .tables import is_timed, key_of
from .trials import results

# Of a report's environment: figures under other ones are of another report.
ONE_MACHINE = ("device", "torch", "cuda", "triton", "cpu_isa", "float32_products")

APART = "show them one by one, or what changed, by python -m nsc_kernels.bench compare"


def add_reports(parser: argparse.ArgumentParser) -> None:
    """Which reports to read, and which contenders of them; :func:`asked_for` reads them."""
    parser.add_argument("reports", type=Path, nargs="+")
    parser.add_argument("--contenders", type=lambda text: text.split(","), metavar="NAMES", help="only these")


def asked_for(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the reports; ends the program where one cannot be read, where they are of several machines or have
    the same figures, or where there is no figure.
    """
    try:
        reports = {path: read(path) for path in arguments.reports}
    except (OSError, ValueError) as error:
        parser.exit(2, f"{error}\n")
    rows = [row for held in reports.values() for row in held]
    for name in ONE_MACHINE:
        found = dict.fromkeys(str(row[name]) for row in rows if row.get("what") == "environment" and name in row)
        if len(found) > 1:
            parser.exit(2, f"{parser.prog}: the reports differ in {name}, {' and '.join(found)}: {APART}\n")
    of = {path: {(row.get("backend"), key_of(row)) for row in held if is_timed(row)} for path, held in reports.items()}
    for one, other in itertools.combinations(of, 2):
        if of[one] & of[other]:
            parser.exit(2, f"{parser.prog}: {one} and {other} have figures of the same: {APART}\n")
    if arguments.contenders:
        there = dict.fromkeys(row["contender"] for row in rows if "contender" in row)
        if unknown := [name for name in arguments.contenders if name not in there]:
            parser.exit(2, f"{parser.prog}: contenders: no {unknown[0]!r} in these reports, only {', '.join(there)}\n")
        rows = [row for row in rows if not is_timed(row) or row["contender"] in arguments.contenders]
    if not any(map(is_timed, rows)):
        parser.exit(2, f"{parser.prog}: there are no figures in what was asked for\n")
    return rows


def check_places(out: Path | None, pictures: Path | None) -> None:
    """What could not be written at the end is not measured in the first place.

    Raises:
        ValueError: for a place that cannot be written to, and for pictures without matplotlib.
    """
    if pictures is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("plot: pictures need matplotlib, which is not installed: pip install matplotlib")
    try:
        if pictures is not None:
            pictures.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"plot: expected a folder, found {pictures}: {error.strerror}") from None
    try:
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.open("a").close()
    except OSError as error:
        raise ValueError(f"out: expected a file that can be written, found {out}: {error.strerror}") from None


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a report: of every trial its last run, in order.

    Raises:
        OSError: if there is no such file.
        ValueError: if it is not a report.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; a report is what --out FILE.jsonl wrote")
    try:
        # What the GPU stages measure of the machine is of no trial.
        return [row for row in read_rows(path) if "what" in row and "trial" not in row] + results(path)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a report of python -m nsc_kernels.bench: {error}") from error
