"""The site's pages, before Sphinx makes HTML of them: `make docs`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from nsc_merge.methods import METHODS

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / "tools" / "docs"

pytestmark = pytest.mark.skipif(not TOOLS.exists(), reason="needs the source tree")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    into = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        import pages

        pages.lay_out(into)
        before = {path: path.stat().st_mtime_ns for path in into.rglob("*") if path.is_file()}
        (into / "old.md").write_text("# gone\n")
        pages.lay_out(into)
    assert before == {path: path.stat().st_mtime_ns for path in into.rglob("*") if path.is_file()}
    return into


def test_links_lead_to_pages_of_the_site(pages):
    seen = 0
    for page in pages.rglob("*.md"):
        if page.is_relative_to(pages / "source"):
            continue
        for link in re.findall(r"\]\(([^)\s#]+)[^)\s]*\)", page.read_text(encoding="utf-8")):
            seen += 1
            assert ":" in link or (page.parent / link).is_file(), f"{page.relative_to(pages)}: {link}"
    assert seen > 100
    # The last of the chain: a file of the source has a page of its own.
    source = (ROOT / "nsc_kernels" / "reference.py").read_text(encoding="utf-8")
    assert source in (pages / "source" / "nsc_kernels" / "reference.py.md").read_text(encoding="utf-8")


def test_a_link_that_leads_nowhere_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import pages

    page = ROOT / "docs" / "results.md"
    monkeypatch.setattr(Path, "read_text", lambda self, **_: "[here](nowhere.md#there)")
    with pytest.raises(FileNotFoundError, match=r"docs/results.md: link to nowhere.md#there, which is not there"):
        pages._linked("results.md", page)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_a_page_that_explains_every_option(pages, name):
    page = (pages / "methods" / f"{name}.md").read_text(encoding="utf-8")
    assert f"[`{name}`]({name}.md)" in (pages / "methods" / "index.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `(\w+)` \| (?:`.*?`)? \| (.*) \|$", page, re.M))
    assert set(told) >= set(METHODS[name].option_names)
    for option in METHODS[name].option_names:
        assert len(told[option]) > 10, f"{option} is explained by {told[option]!r}"
        referred = re.search(r"see there|as all that follow|of TIES\.$|of DARE\.$|as in `", told[option])
        assert not referred, f"{option} is explained by {told[option]!r}"


def test_the_errors_that_are_explained_are_raised():
    sources = [path for folder in ("nsc_kernels", "python/nsc_merge") for path in (ROOT / folder).rglob("*.py")]
    # Messages stand in several literals, one after the other.
    raised = re.sub(r'"\s*f?"', "", "\n".join(path.read_text(encoding="utf-8") for path in sources))
    explained = re.findall(r"^\*\*(.*?)\*\*", (ROOT / "docs" / "errors.md").read_text(encoding="utf-8"), re.M)
    assert len(explained) > 15
    for code in (one for bold in explained for one in re.findall(r"`([^`]+)`", bold)):
        for words in re.split(r"\.\.\.|'x'", code):
            assert words.strip(" :[]'") in raised, words


def test_measured_rows_are_on_the_page_of_their_method(pages):
    lines = (ROOT / "bench" / "results" / "quality" / "vit.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    mean = {row["row"]: row["average"] for row in rows if row["method"] == "match" and len(row["tasks"]) == 8}
    page = (pages / "methods" / "match.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| ([^|`]+) \| (\d+\.\d)\u00a0\((\d)\) \|", page, re.M)
    assert {row for row, _, _ in shown} >= set(mean)
    values = [row["average"] for row in rows if row["row"] == "match" and len(row["tasks"]) == 8]
    assert ("match", f"{sum(values) / len(values):.1f}", str(len(values))) in shown
