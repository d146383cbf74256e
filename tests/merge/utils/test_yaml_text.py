"""Any YAML is read, or refused within a second or so; what is written reads back the same."""

from __future__ import annotations

import itertools
import time

import pytest
import yaml

from nsc_merge.utils.yaml_text import MOST_CHARACTERS, MOST_VALUES, from_yaml, read_yaml, to_yaml


def chain(first, link):
    """Nine aliases of nine aliases and so on, eight deep."""
    names = "abcdefghi"
    links = [link(before, name) for before, name in itertools.pairwise(names)]
    return "\n".join([first, *links])


BOMBS = {
    "lists": chain("a: &a [x]", lambda before, name: f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]"),
    "mappings": chain(
        "a: &a {x: 1}",
        lambda before, name: f"{name}: &{name} {{{', '.join(f'k{i}: *{before}' for i in range(9))}}}",
    ),
    "merges": chain(
        "a: &a {x: 1}", lambda before, name: f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 9)}]}}"
    ),
    "of itself": "a: &a [*a]",
    "merge of a mapping around it": "a: &a {b: {<<: *a}}",
    "a long chain": "a0: &a0 [x]\n" + "\n".join(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 500)),
    "deep lists": "[" * 10_000,
    "deep mappings": "{a: " * 100_000,
    "deep blocks": "- " * 100_000,
    "many values": "[" + "1," * 25_000 + "]",
    "text without end": "a: " + "x" * (MOST_CHARACTERS + 1),
    "a number of many digits": "a: " + "1" * 5000,
    "a number of many sixties": "a: 1" + ":1" * 10_000,
    "a date that there is not": "a: 2024-99-99",
    "a zone that there is not": "a: 2001-12-14t21:59:43.10-99:99",
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_would_take_all_time_or_memory_is_refused(name):
    started = time.process_time()
    with pytest.raises(yaml.YAMLError):
        from_yaml(BOMBS[name])
    assert time.process_time() - started < 5


def test_a_huge_file_is_not_read_at_all(tmp_path):
    file = tmp_path / "recipe.yaml"
    with file.open("wb") as hole:
        hole.truncate(1 << 40)
    with pytest.raises(yaml.YAMLError, match=f"expected at most {MOST_CHARACTERS} characters, found {1 << 40} bytes"):
        read_yaml(file)


def test_aliases_and_merges_that_a_recipe_may_have_are_read():
    text = "a: &a {x: 1}\nb: &b {<<: *a, y: 2}\nc: [*a, *b, {<<: [*b, *a], x: 3}]\n"
    assert from_yaml(text)["c"] == [{"x": 1}, {"x": 1, "y": 2}, {"x": 3, "y": 2}]


def test_a_large_record_is_read_again():
    document = {"files": {f"tasks/{task}/model-{task:05}.safetensors": "0" * 64 for task in range(MOST_VALUES // 8)}}
    assert from_yaml(to_yaml(document)) == document


@pytest.mark.parametrize(
    "text",
    ["a\x85b", "a\u2028b", "\u2029", "\ufeff", "a\r\nb", "\x00\x07\x7f", "<<", "=", "yes", "1e3", "1:3", "~", "", " #"],
)
def test_any_text_is_written_so_that_it_reads_the_same(text):
    shared = [text]
    document = {text: text, "list": shared, "again": shared, "deep": {text: [text, {text: 1}]}}
    written = to_yaml(document)
    assert from_yaml(written) == document
    assert "*" not in written
