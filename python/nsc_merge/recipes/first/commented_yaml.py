"""YAML with comments, as a person would write it."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nsc_merge.utils.yaml_text import to_yaml

WIDTH = 100


class Yaml:
    """YAML text that grows line by line, with a remark beside or above each entry."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def __str__(self) -> str:
        return "\n".join(self._lines) + "\n"

    def remark(self, text: str, indent: int = 0) -> None:
        """A comment of its own, over as many lines as it takes."""
        start = f"{'':{indent}}# "
        self._lines += textwrap.wrap(shown(text), WIDTH, initial_indent=start, subsequent_indent=start)

    def verbatim(self, *lines: str) -> None:
        self._lines += lines

    def section(self, title: str = "") -> None:
        self._lines.append("")
        if title:
            self.remark(title)

    def entries(self, values: Mapping[str, tuple[Any, str]], indent: int = 0) -> None:
        """Keys with a value and a remark each, the remarks beside them where there is room."""
        written = [(_entry(key, value), note) for key, (value, note) in values.items()]
        column = max((len(line) for (line, *more), _ in written if not more and len(line) <= 48), default=0)
        for (line, *more), note in written:
            start = f"{'':{indent}}{line:{column}}  # "
            beside = not more and len(line) <= column and len(start) + len(shown(note)) <= WIDTH + 20
            if note and not beside:
                self.remark(note, indent)
            self._lines.append(f"{start}{shown(note)}" if note and beside else f"{'':{indent}}{line}")
            self._lines += [f"{'':{indent}}{one}" for one in more]


def _entry(key: str, value: Any) -> list[str]:
    """A key and its value in YAML, in one line wherever that can be."""
    if isinstance(value, list):
        return [f"{key_of(key)}: {_listed(value)}"]
    if isinstance(value, dict):
        inner = ", ".join(f"{name}: {_inner(one)}" for name, one in value.items())
        return [f"{key_of(key)}: {{{inner}}}"]
    if isinstance(value, str) and "\n" in value:
        return [f"{key_of(key)}: {quoted(value)}"]
    return to_yaml({key: value}).splitlines()


def _inner(value: Any) -> str:
    if isinstance(value, list):
        return _listed(value)
    return quoted(value) if isinstance(value, str) else str(value)


def _listed(value: Sequence[str]) -> str:
    # A module may be called 0, as in nn.Sequential, which is a name in quotes alone.
    return f"[{', '.join(one if one.isidentifier() and key_of(one) == one else quoted(one) for one in value)}]"


def key_of(key: str) -> str:
    """A key in one line, in quotes only where it has to be."""
    line = to_yaml({key: 0}).removesuffix(": 0\n")
    return quoted(key) if line.startswith("? ") else line


def quoted(text: str) -> str:
    """Text in quotes, in one line."""
    import yaml

    return yaml.dump(text, default_style='"', allow_unicode=True, width=math.inf).rstrip("\n")


def relative(source: str, folder: Path) -> str:
    """A path as seen from a folder, where it is below the folder or beside it; ids of the hub as they are."""
    place = Path(source)
    return os.path.relpath(place, folder) if place.is_relative_to(folder.parent) else source


def shown(text: str) -> str:
    """Text in one line, of characters that a comment may hold."""
    return " ".join("".join(one if one.isprintable() else " " for one in text).split())
