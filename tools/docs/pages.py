"""Lays out the site's pages: those of ``docs``, of other folders, and what is made of the code and of measurements.

The README is the home page, so that neither is written twice. A link of a page to a file outside of ``docs`` leads to
that file as a page of its own, so that the site is whole without a network and without a place where the source lies.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import command_page
import method_pages

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# Pages that lie elsewhere, by their place in the site.
ELSEWHERE = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "conduct.md": "CODE_OF_CONDUCT.md",
    "quality/suites.md": "bench/quality/README.md",
    "quality/tables.md": "bench/results/quality/report.md",
}
# What the home page ends with, for the column at the side of every page.
CONTENTS = Path(__file__).with_name("contents.md")
_LINK = re.compile(r"(?<!\\)\]\(([^)\s]+)\)")
_LANGUAGES = {".py": "python", ".cu": "cuda", ".cuh": "cuda"} | dict.fromkeys((".h", ".cpp", ".inl"), "cpp")
_BY_ITSELF = "---\norphan: true\n---\n\n"
_IGNORED = {"__pycache__", "lib"}


def lay_out(into: Path) -> None:
    """Write all pages into a folder; those that are there and have not changed are left alone."""
    wanted = {into / place: content for place, content in _contents()}
    for path in sorted(into.rglob("*")) if into.exists() else []:
        if path.is_file() and path not in wanted:
            path.unlink()
    for path, content in wanted.items():
        new = content.read_bytes() if isinstance(content, Path) else content.encode()
        if not path.is_file() or path.read_bytes() != new:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(new)


def _contents() -> Iterator[tuple[str, str | Path]]:
    """Place in the site -> a page's text, or the file that is put there."""
    outside: set[Path] = set()
    pages = {path.relative_to(DOCS).as_posix(): path for path in sorted(DOCS.rglob("*")) if path.is_file()}
    pages |= {place: ROOT / path for place, path in ELSEWHERE.items()}
    for place, path in pages.items():
        if path.suffix != ".md":
            yield place, path
            continue
        text, led_to = _linked(place, path)
        outside |= led_to - set(pages.values())
        yield place, f"{text}\n{CONTENTS.read_text(encoding='utf-8')}" if place == "index.md" else text
    yield from method_pages.pages()
    yield command_page.PLACE, command_page.text()
    for target in sorted(outside):
        if target.is_dir():
            yield _place(target), _folder_page(target)
        elif target.suffix in _LANGUAGES:
            yield _place(target), _source_page(target)
        else:
            yield _place(target), target


def _linked(place: str, path: Path) -> tuple[str, set[Path]]:
    """A page's text with links of the site, and what they lead to.

    Raises:
        FileNotFoundError: naming the page and the link that leads nowhere.
    """
    led_to = set()

    def link(match: re.Match[str]) -> str:
        target, sign, anchor = match[1].partition("#")
        if not target or ":" in target:
            return match[0]
        found = (path.parent / target).resolve()
        if not found.exists():
            raise FileNotFoundError(f"{path.relative_to(ROOT)}: link to {match[1]}, which is not there")
        led_to.add(found)
        return f"]({'../' * place.count('/')}{_place(found)}{sign}{anchor})"

    # Figures stay in one line with their spread.
    text = path.read_text(encoding="utf-8").replace(" ± ", "\u00a0±\u00a0")
    return _LINK.sub(link, text), led_to


def _place(target: Path) -> str:
    """Where a file or folder of the repository is in the site."""
    path = target.relative_to(ROOT).as_posix()
    if target.is_relative_to(DOCS):
        return target.relative_to(DOCS).as_posix()
    elsewhere = {there: place for place, there in ELSEWHERE.items()}
    if path in elsewhere:
        return elsewhere[path]
    if target.is_dir():
        return f"source/{path}/index.md"
    return f"source/{path}.md" if target.suffix in _LANGUAGES else f"source/{path}"


def _source_page(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    # Longer than any fence in it.
    fence = "`" * 6
    return f"{_BY_ITSELF}# {path.relative_to(ROOT).as_posix()}\n\n{fence}{_LANGUAGES[path.suffix]}\n{text}{fence}\n"


def _folder_page(path: Path) -> str:
    inside = sorted(one for one in path.rglob("*") if one.is_file() and not _IGNORED & set(one.parts))
    lines = [f"* `{one.relative_to(path).as_posix()}`" for one in inside]
    return "\n".join([f"{_BY_ITSELF}# {path.relative_to(ROOT).as_posix()}/", "", "In the source:", "", *lines, ""])
