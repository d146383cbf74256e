"""Carries out a guide: its commands and its Python, in order, in a folder; and compares what they print with the page.

In a guide, ``sh`` and ``python`` blocks are carried out, ``yaml`` blocks are files, called by their first line. A
``text`` block after one is what it prints on standard output, where three dots stand for anything, a line of them for
any lines. ``console`` blocks need something that is not here, such as a GPU server or an account; their ``nsc-merge``
commands are parsed.

    python tests/guide_player.py docs/guides/text.md      # writes the page's text blocks anew, if they have no dots
"""

from __future__ import annotations

import contextlib
import glob
import io
import math
import os
import re
import runpy
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Where the pages say that the reader's folder is.
HOME = "/home/you"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
# Times, rates, and what depends on the machine's memory or on the bytes that a release of a library writes.
_MASKED = re.compile(r"\d[\d.e+-]* ?(?:s a step|s|ms|step/s|[KMG]?B)\b")
_DECIMAL = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")


@dataclass
class Block:
    """A block that was carried out: what the page says that it prints, if it says so, and what it printed."""

    code: str
    expected: str | None
    printed: str


def blocks(page: str) -> Iterator[tuple[str, str, str | None]]:
    """Kind and content of each block that is carried out or parsed, and the text block right behind it."""
    found = list(_BLOCK.finditer(page))
    for at, block in enumerate(found):
        if block[1] != "text":
            after = found[at + 1] if at + 1 < len(found) and found[at + 1][1] == "text" else None
            yield block[1], block[2], after and after[2]


def play(page: Path, folder: Path) -> list[Block]:
    """Carry out a page's blocks in a folder, in this process."""
    names: dict = {"__name__": "__main__"}
    played = []
    before = Path.cwd()
    os.chdir(folder)
    try:
        for kind, code, expected in blocks(page.read_text(encoding="utf-8")):
            if kind == "yaml":
                Path(code.splitlines()[0].removeprefix("# ")).write_text(code, encoding="utf-8")
            if kind not in ("sh", "python"):
                continue
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                if kind == "python":
                    exec(compile(code, str(page), "exec"), names)
                else:
                    for line in code.replace("\\\n", "").splitlines():
                        _command(shlex.split(line, comments=True))
            played.append(Block(code, expected, said.getvalue().replace(str(folder.resolve()), HOME)))
    finally:
        os.chdir(before)
    return played


def _command(words: list[str]) -> None:
    words = [found for word in words for found in (sorted(glob.glob(word)) or [word])]
    match words:
        case []:
            pass
        case ["cd", folder]:
            os.chdir(folder)
        case ["nsc-merge", *rest]:
            from nsc_merge.commands.main import main

            status = main(rest)
            assert status == 0, f"{shlex.join(words)}: exit status {status}"
        case ["python", script, *rest]:
            argv, sys.argv = sys.argv, [script, *rest]
            try:
                runpy.run_path(str(ROOT / script), run_name="__main__")
            finally:
                sys.argv = argv
        case _:
            raise AssertionError(f"no command of a guide: {shlex.join(words)}")


def agrees(expected: str, printed: str) -> bool:
    """Whether a page says what was printed.

    Times and sizes may differ, decimal numbers by 5 percent or 0.03: adapters that are trained on another processor are
    not the same to the last digit.
    """
    wanted, found = (
        [line.rstrip() for line in _MASKED.sub("#", text.strip()).splitlines()] for text in (expected, printed)
    )
    parts = [
        "(?:.*\n)*?" if line == "..." else re.escape(_DECIMAL.sub("\0", line)).replace(r"\.\.\.", ".*") + "\n"
        for line in wanted
    ]
    shape = re.compile("".join(re.sub("\0", lambda _: f"({_DECIMAL.pattern})", part) for part in parts))
    matched = shape.fullmatch("".join(f"{line}\n" for line in found))
    if matched is None:
        return False
    numbers = [float(number) for line in wanted for number in _DECIMAL.findall(line)]
    return all(
        math.isclose(number, float(other), rel_tol=0.05, abs_tol=0.03)
        for number, other in zip(numbers, matched.groups(), strict=True)
    )


def rewritten(page: str, played: list[Block]) -> str:
    """The page with what its blocks printed in place of text blocks without dots."""
    for block in played:
        if block.expected is not None and "..." not in block.expected:
            place = page.index(block.code)
            behind = page[place:].replace(f"```text\n{block.expected}```", f"```text\n{block.printed.strip()}\n```", 1)
            page = page[:place] + behind
    return page


if __name__ == "__main__":
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as place:
            carried_out = play(Path(name).resolve(), Path(place))
        Path(name).write_text(rewritten(Path(name).read_text(encoding="utf-8"), carried_out), encoding="utf-8")
