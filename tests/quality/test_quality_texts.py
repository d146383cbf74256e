"""The text that the language suite is made of: files, docstrings, passages and their labels."""

from __future__ import annotations

import json

import pytest
import torch
from quality_cases import TEXT, part_of

from bench.quality.suites import corpus, llama
from bench.quality.suites.language import pooled
from bench.quality.suites.passages import TASKS, make_examples


def test_files_are_split_by_their_path(texts):
    assert [corpus.split_of(f"numpy/{number}.py") for number in range(200)].count("train") > 110
    assert {corpus.split_of("python/ast.py") for _ in range(3)} == {corpus.split_of("python/ast.py")}
    files, sections = texts
    for kind in (files, sections):
        for split in corpus.SPLITS:
            assert kind[split].ends[-1] == len(kind[split].tokens)
            assert kind[split].tokens.max() < corpus.VOCABULARY
            assert kind[split].tokens.min() >= 0
    assert set(files["train"].labels.tolist()) == set(range(len(corpus.SOURCES)))


def test_tokens_are_the_text_of_the_installation(language_work, texts):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(language_work / "llama" / "corpus" / "tokenizer.json"))
    for split in corpus.SPLITS:
        source = corpus.SOURCES[int(texts[0][split].labels[0])]
        text = tokenizer.decode(texts[0][split].text(0).tolist())
        assert len(text) >= 60
        originals = {
            f"{source}/{file.relative_to(part_of(source)).as_posix()}": file.read_text(encoding="utf-8")
            for file in part_of(source).rglob("*.py")
        }
        found = [name for name, original in originals.items() if text in original]
        assert found
        assert split in {corpus.split_of(name) for name in found}
    versions = json.loads((language_work / "llama" / "corpus" / "versions.json").read_text())
    assert set(versions) == {"python", *corpus.PACKAGES}


def test_docstring_sections():
    source = '''
def add(a):
    """Add one.

    Parameters
    ----------
    a : int

    Returns
    -------
    int
        One more.
    """


class Plain:
    """Has no sections."""
'''
    assert list(corpus.sections(source)) == [
        ("Summary", "Add one."),
        ("Parameters", "a : int"),
        ("Returns", "int\n    One more."),
    ]


def examples(texts, task: str, split="val", count=60):
    files, sections = texts
    found = make_examples(task, files[split], sections[split], count, 2)
    ids, mask = found.inputs["input_ids"], found.inputs["attention_mask"].bool()
    return [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)], found


def passages(row: list[int]) -> tuple[list[int], list[int]]:
    middle = row.index(corpus.BREAK)
    assert row[-1] == corpus.BREAK
    return row[1:middle], row[middle + 1 : -1]


def test_texts_are_padded_on_the_right(texts):
    for task in TASKS:
        rows, found = examples(texts, task)
        ids, mask = found.inputs["input_ids"], found.inputs["attention_mask"]
        assert (mask.diff(dim=1) <= 0).all()
        assert (ids[mask == 0] == corpus.PAD).all()
        assert len({len(row) for row in rows}) > 5
        assert all(row[0] == corpus.START for row in rows)


def test_padding_changes_no_output(language_work):
    suite = llama.load(language_work, 0, log=lambda line: None, progress=False, settings=TEXT)
    for task in suite.tasks:
        inputs, _ = suite.labelled(task, "val")[0]
        one = {key: value[:1, : int(inputs["attention_mask"][0].sum())] for key, value in inputs.items()}
        with torch.no_grad():
            together = suite.output(task, suite.model, inputs)[:1]
            torch.testing.assert_close(suite.output(task, suite.model, one), together, rtol=1e-4, atol=1e-5)


def test_pooling_leaves_padding_out():
    hidden = torch.tensor([[[1.0], [3.0], [100.0]], [[2.0], [4.0], [9.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert pooled(hidden, mask).tolist() == [[3.0, 2.0], [9.0, 5.0]]


def test_labels_of_texts(texts):
    rows, found = examples(texts, "varied")
    for row, label in zip(rows, found.labels.tolist(), strict=True):
        assert label == pytest.approx((len(set(row[1:])) / len(row[1:]) - 0.6) / 0.1, abs=1e-4)
    rows, found = examples(texts, "shared")
    for row, label in zip(rows, found.labels.tolist(), strict=True):
        first, second = passages(row)
        share = sum(token in first for token in second) / len(second)
        assert label == pytest.approx((share - 0.45) / 0.3, abs=1e-4)
    rows, found = examples(texts, "relation")
    stream = texts[0]["val"].tokens.tolist()
    for row, label in zip(rows, found.labels.tolist(), strict=True):
        first, second = passages(row)
        if label == 1:
            assert any(second == first[turn:] + first[:turn] for turn in range(1, len(first)))
        else:
            assert any(stream[at : at + len(second)] == second for at in range(len(stream)))
        if label == 0:
            both = first + second
            assert any(stream[at : at + len(both)] == both for at in range(len(stream)))
    assert found.labels.bincount().tolist() == [20, 20, 20]
