"""A report: one JSONL file with the machine, its ceilings, and every figure with all its samples."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .measuring import read_rows
from .tables import is_timed
from .trials import results


def add_reports(parser: argparse.ArgumentParser) -> None:
    """Which reports to read, and which contenders of them; :func:`asked_for` reads them."""
    parser.add_argument("reports", type=Path, nargs="+")
    parser.add_argument("--contenders", type=lambda text: text.split(","), metavar="NAMES", help="only these")


def asked_for(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the reports; ends the program where one cannot be read, or there is no figure."""
    try:
        rows = [row for path in arguments.reports for row in read(path)]
    except (OSError, ValueError) as error:
        parser.exit(2, f"{error}\n")
    if arguments.contenders:
        rows = [row for row in rows if not is_timed(row) or row["contender"] in arguments.contenders]
    if not any(map(is_timed, rows)):
        parser.exit(2, f"{parser.prog}: there are no figures in what was asked for\n")
    return rows


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
