"""The command line's page: what ``--help`` says of every command."""

from __future__ import annotations

import argparse
import os

from nsc_merge.commands.main import build_parser

PLACE = "reference/command_line.md"


def text() -> str:
    """The page."""
    # The width that argparse breaks lines at.
    os.environ["COLUMNS"] = "110"
    parser = build_parser()
    parts = ["# Command line", "", *_help(parser)]
    commands = next(one for one in parser._actions if isinstance(one, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        parts += [f"## nsc-merge {name}", "", *_help(command)]
    return "\n".join(parts)


def _help(parser: argparse.ArgumentParser) -> list[str]:
    return ["```text", parser.format_help().rstrip(), "```", ""]
