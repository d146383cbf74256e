"""The ``methods`` command."""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import Any


def add(commands: Any) -> None:
    """Add the command to a parser's."""
    methods = commands.add_parser("methods", help="list the merge methods and their options")
    methods.add_argument("--json", action="store_true", help="print JSON")
    methods.set_defaults(run=_methods)


def _methods(arguments: argparse.Namespace) -> int:
    from importlib.resources import files

    # As nsc_merge.methods.listing writes it; the methods themselves would bring torch along.
    methods = json.loads((files("nsc_merge") / "methods" / "listing.json").read_text(encoding="utf-8"))
    if arguments.json:
        print(json.dumps(methods))
        return 0
    for name, method in methods.items():
        by_family = {option for recipe in method["recipes"].values() for option in recipe["options"]}
        options = ", ".join(
            f"{option}={'by recipe' if option in by_family else repr(value)}"
            for option, value in method["options"].items()
        )
        lines = [f"  {method['summary']}", f"  {method['paper']}"]
        if method["needs"]:
            lines.append(f"  needs: {', '.join(method['needs'])}")
        if method["tuned"]:
            lines.append(f"  tuned on validation data: {method['tuned']}")
        if options:
            lines += textwrap.wrap(f"options: {options}", 100, initial_indent="  ", subsequent_indent="    ")
        for recipe, its in method["recipes"].items():
            settings = ", ".join(f"{option}={value!r}" for option, value in its["options"].items())
            lines.append(f"  recipe {recipe} ({', '.join(its['families']) or 'on demand'}): {settings}")
        print("\n".join([name, *lines]))
    return 0
