"""Which columns a first recipe takes for question and answer, for two texts that are compared, and for chats."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import zoo
from served_cases import WORDS, write_base

from nsc_merge.recipes.first.looking import _rows, _templates, asked_in, chats_in, compared_in, look


def rows_of(*names: str) -> list[dict[str, Any]]:
    return [{name: f"{name} {number}" for name in names} for number in range(3)]


@pytest.mark.parametrize(
    ("columns", "asked", "answer"),
    [
        (["instruction", "input", "output"], "{instruction}\n{input}", "output"),
        (["instruction", "context", "response", "category"], "{instruction}\n{context}", "response"),
        (["answer", "question", "context"], "{context}\n{question}", "answer"),
        (["question", "answer", "id"], "{question}", "answer"),
        (["prompt", "completion"], "{prompt}", "completion"),
        (["prompt", "response"], "{prompt}", "response"),
        (["instruction", "output"], "{instruction}", "output"),
        (["instruction", "response"], "{instruction}", "response"),
    ],
)
def test_question_and_answer(columns, asked, answer):
    """An answer stands behind its question, or where a model has one in its decoder; a test asks the question with the
    line's end of training.
    """
    rows = rows_of(*columns)
    assert _templates(rows, columns, writes=False) == (f"{asked}\n{{{answer}}}", None)
    alone = asked.strip("{}") if "\n" not in asked else asked
    assert _templates(rows, columns, writes=True) == (alone, answer)
    assert asked_in(rows, answer, writes=False) == f"{asked}\n"
    assert asked_in(rows, answer, writes=True) == alone
    assert asked_in(rows, None, writes=False) is None
    # Where a row has no question, none is asked; nor where the text stands in a column of its own.
    if alone in columns:
        some = [*rows, {**rows[0], alone: None}]
        assert _templates(some, columns, writes=False) == (None, None)
        assert asked_in(some, answer, writes=False) is None
    assert _templates(rows, [*columns, "text"], writes=False) == (None, None)
    assert _templates(rows, [*columns, "messages"], writes=True) == (None, None)
    assert _templates([], columns, writes=False) == (None, None)


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ("inputs", "targets"),
        ("input", "target"),
        ("source", "target"),
        ("document", "summary"),
        ("article", "highlights"),
        ("dialogue", "summary"),
    ],
)
def test_what_an_encoder_reads(asked, answer):
    rows = rows_of(asked, answer)
    assert _templates(rows, [asked, answer], writes=True) == (asked, answer)
    assert _templates(rows, [asked, answer], writes=False) == (None, None)
    assert asked_in(rows, answer, writes=True) == asked


@pytest.mark.parametrize(
    ("columns", "head"),
    [
        (("premise", "hypothesis"), "ForSequenceClassification"),
        (("sentence1", "sentence2"), "ForSequenceClassification"),
        (("question1", "question2"), "ForSequenceClassification"),
        (("question", "sentence"), "ForSequenceClassification"),
        (("query", "document"), "ForSequenceClassification"),
        (("query", "passage"), "ForSequenceClassification"),
        (("query", "text"), "ForSequenceClassification"),
        (("anchor", "positive"), "ForSequenceClassification"),
        (("text", "text_pair"), "ForSequenceClassification"),
        (("question", "passage"), "ForSequenceClassification"),
        (("question", "context"), "ForQuestionAnswering"),
    ],
)
def test_two_texts_that_are_compared(columns, head):
    rows = rows_of(*columns, "label")
    assert compared_in(rows, f"Bert{head}") == columns
    assert compared_in(rows, "LlamaForCausalLM") is None
    if head == "ForSequenceClassification":
        assert compared_in(rows, "BertForQuestionAnswering") is None
    assert compared_in([*rows, {columns[0]: "alone"}], f"Bert{head}") is None
    assert compared_in([], f"Bert{head}") is None


CHAT = [{"role": "user", "content": "a"}]


def test_chats_of_any_name():
    rows = [{"prompt": CHAT, "chosen": CHAT, "score": 1}] * 2
    columns = ["score", "prompt", "chosen"]
    assert chats_in(rows, columns, None) == "prompt"
    assert chats_in(rows, columns, "chosen") == "chosen"
    assert chats_in(rows, columns, "score") is None
    # A column of texts may be meant, and one of the usual name is found without a word.
    assert chats_in([{**row, "question": "a"} for row in rows], [*columns, "question"], None) is None
    assert chats_in([{**row, "question": "a"} for row in rows], [*columns, "question"], "prompt") == "prompt"
    assert chats_in([{**row, "messages": CHAT} for row in rows], [*columns, "messages"], None) is None
    assert chats_in([*rows, {"prompt": None, "chosen": CHAT}], columns, None) == "chosen"
    assert chats_in([], columns, None) is None


def test_a_batch_is_as_many_of_its_longest_sample():
    tokens = torch.tensor([[1, 2, 3]])
    assert _rows(tokens, 4).tolist() == [[1, 2, 3]] * 4
    images = _rows(torch.zeros(2, 3, 8, 8, dtype=torch.float16), 5)
    assert (images.shape, images.dtype, images.device.type) == ((5, 3, 8, 8), torch.float16, "meta")


def test_a_step_is_as_long_as_the_longest_sample(tmp_path):
    base = write_base("llama", tmp_path / "base")
    counts = (3, 7, 1)
    rows = [{"text": " ".join(WORDS[:count])} for count in counts]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = str(tmp_path / "rows.jsonl")
    found = look({"a": place, "b": place}, str(base), zoo.build("llama"), 2, None, None)
    assert found["a"] is found["b"]
    assert found["a"].batch["input_ids"].shape == (2, max(counts))
    assert (found["a"].raw, found["a"].words, found["a"].text) == (True, True, None)
    assert found["a"].said.startswith("3 rows of text; column 'text', about 4 tokens each, such as 'w")
    # No more samples than there are.
    assert look({"a": place}, str(base), zoo.build("llama"), 9, None, None)["a"].batch["input_ids"].shape[0] == 3
    named = look({"a": place}, str(base), zoo.build("llama"), 2, "{text} w9", None)["a"]
    assert named.text == "{text} w9"
    assert named.batch["input_ids"].shape == (2, max(counts) + 1)
    hub = look({"a": "owner/data"}, str(base), zoo.build("llama"), 2, "question", None)["a"]
    assert (hub.source, hub.batch, hub.text, hub.raw) == ("owner/data", None, "question", True)


@pytest.mark.parametrize(("count", "shown"), [(20, 60), (21, 60), (3, 8)])
def test_long_texts_are_shown_in_part(tmp_path, count, shown):
    base, text = write_base("llama", tmp_path / "base"), " ".join(["w9"] * count)
    (tmp_path / "rows.txt").write_text(text)
    found = look({"a": str(tmp_path / "rows.txt")}, str(base), zoo.build("llama"), 2, None, None)["a"].said
    assert found.endswith(f"such as {text[:shown] + ('...' if len(text) > shown else '')!r}")
