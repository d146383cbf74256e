"""Lists of words as transformers' run_ner.py and PEFT's example of token classification encode them, to the bit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_cases import text_base, write_rows
from tokenizers import Tokenizer, models, normalizers
from word_cases import KINDS, ROWS, bert_words, roberta_words, run_ner, word_base

import nsc_merge
from nsc_merge.calibration.raw import encoding
from nsc_merge.calibration.raw.columns import Columns, choose
from nsc_merge.calibration.raw.reading import batches_of
from nsc_merge.calibration.raw.settings import DataSettings

TEXT = [{"text": " ".join(row["tokens"])} for row in ROWS]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {kind: word_base(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


def made(source: Any, base: Path, batch_size: int = 2, **settings: Any) -> Any:
    return batches_of(source, str(base), DataSettings(**settings), batch_size, "calibration.a")


def samples_in(batches: Any) -> list[dict[str, list[int]]]:
    """The inputs of every sample without padding, in an order of their own."""
    found = []
    for batch in batches:
        for number, mask in enumerate(batch["attention_mask"]):
            found.append({name: value[number][mask == 1].tolist() for name, value in batch.items()})
    return sorted(found, key=lambda one: one["input_ids"])


def expected(folder: Path, kind: str, rows: Any = ROWS, **given: Any) -> list[dict[str, list[int]]]:
    wanted = [{name: one[name] for name in one if name != "labels"} for one in run_ner(folder, kind, rows, **given)]
    return sorted(wanted, key=lambda one: one["input_ids"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"text": "tokens"}, {"padding_side": "left"}])
def test_words_are_encoded_as_in_training(bases, kind, settings, tmp_path):
    batches = made(write_rows(tmp_path / "rows.jsonl", ROWS), bases[kind], **settings)
    assert samples_in(batches) == expected(bases[kind], kind)
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2]
    model = KINDS[kind][0]()
    assert torch.isfinite(model(**next(iter(batches))).logits).all()


WORDS = st.lists(st.text("abtoErsB.-1 é", min_size=1).filter(str.strip), min_size=1, max_size=6)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(lists=st.lists(WORDS, min_size=1, max_size=4), most=st.integers(4, 30), side=st.sampled_from(["right", "left"]))
def test_words_of_any_kind_and_length(bases, kind, lists, most, side):
    rows = [{"tokens": words, "ner_tags": [0] * len(words)} for words in lists]
    batches = made(rows, bases[kind], max_length=most, truncation_side=side)
    wanted = expected(bases[kind], kind, rows, max_length=most, truncation_side=side)
    assert samples_in(batches) == wanted


def test_a_base_in_memory_and_data_in_memory(bases):
    model = KINDS["bert"][0]()
    model.config._name_or_path = str(bases["bert"])
    listed = {"tokens": [row["tokens"] for row in ROWS], "id": list(range(len(ROWS)))}
    arrays = pd.DataFrame({"tokens": [np.array(words) for words in listed["tokens"]]})
    sources = [ROWS, datasets.Dataset.from_dict(listed), arrays]
    wanted = expected(bases["bert"], "bert")
    for source in sources:
        assert samples_in(nsc_merge.calibration_data(source, model)) == wanted


@pytest.mark.parametrize("form", ["json", "parquet"])
def test_files_of_tables(bases, form, tmp_path):
    if form == "json":
        (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    else:
        pd.DataFrame(ROWS).to_parquet(tmp_path / "rows.parquet")
    assert samples_in(made(tmp_path / f"rows.{form}", bases["bert"])) == expected(bases["bert"], "bert")


def test_plain_texts_go_on_working(bases):
    for kind, (_, words, _) in KINDS.items():
        wanted = sorted(words()(row["text"])["input_ids"] for row in TEXT)
        assert [one["input_ids"] for one in samples_in(made(TEXT, bases[kind]))] == wanted


def test_long_lists_are_cut_and_that_is_said(bases, caplog):
    batches = made(ROWS, bases["bert"], max_length=12)
    assert max(batch["input_ids"].shape[1] for batch in batches) == 12
    (said,) = caplog.messages
    lengths = [len(one["input_ids"]) for one in run_ner(bases["bert"], "bert", ROWS)]
    longer = sum(length > 12 for length in lengths)
    assert re.search(rf"row \d: longer than 12 tokens, as are {longer} of the 4 samples; cut at the end", said)
    with pytest.raises(ValueError, match=r"row \d: expected at most 12 tokens, found \d+; give a larger max_length"):
        made(ROWS, bases["bert"], max_length=12, truncation=False)


def chosen(row: dict[str, Any], **settings: Any) -> Columns:
    return choose([row], DataSettings(**settings), "data", text=True, images=False, words=True)


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"id": "1", "tokens": ["a"], "ner_tags": [0], "langs": ["en"]}, "tokens"),
        ({"text": "a b", "tokens": ["a", "b"]}, "tokens"),
        ({"words": ["a"], "messages": [{"role": "user", "content": "a"}]}, "words"),
        ({"id": "1", "sentence": ["a"], "ner_tags": ["O"], "pos": ["NN"], "fine_tags": ["x"]}, "sentence"),
        ({"parts": [], "pieces": ["a"], "numbers": [1]}, "pieces"),
        ({"tokens": np.array(["a", "b"])}, "tokens"),
    ],
)
def test_the_words_where_none_are_named(row, column):
    assert chosen(row) == Columns(text=column, words=True)


def test_texts_where_there_are_no_words():
    assert chosen({"text": "a b", "langs": ["en"]}) == Columns(text="text")
    assert chosen({"text": "a b", "langs": ["en"], "spans": ["PER: a"]}) == Columns(text="text")
    assert chosen({"text": "a b", "tokens": [1, 2]}) == Columns(text="text")
    assert chosen({"tokens": "a b"}) == Columns(text="tokens")
    assert chosen({"text": "a b", "tokens": ["a"]}, text="text") == Columns(text="text")
    assert chosen({"text": "a b", "langs": ["en"]}, text="langs") == Columns(text="langs", words=True)
    assert Columns(text="tokens", words=True).said() == "the words in column 'tokens'"


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"a": ["x"], "b": ["y"]}, {}, r"calibration.a: row list: several columns of lists of words .*\['a', 'b'\]"),
        ({"tokens": ["x"], "q": "y"}, {"text": "tokens", "text_pair": "q"}, "text_pair: stands behind texts, and 'tok"),
        ({"tokens": ["x", 3]}, {}, "row 1: column 'tokens': expected words as text, found 3 among them"),
        ({"tokens": ["x", None]}, {}, "row 1: column 'tokens': expected words as text, found None among them"),
        ({"tokens": ["\ud800"]}, {}, "row 1: holds '.ud800', half of a character"),
        ({"tokens": ["a"]}, {"text": "{tokens}"}, "row 1: column 'tokens': expected text, found .*; lists of words"),
    ],
)
def test_words_that_cannot_be_are_refused(bases, row, settings, message):
    with pytest.raises(ValueError, match=message):
        made([row], bases["bert"], **settings)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": "a b"}, "row 2: column 'tokens': expected a list of words, found 'a b'"),
        ({"other": 1}, "row 2: holds nothing in column 'tokens'; expected a list of words"),
    ],
)
def test_a_row_unlike_the_others_is_refused(bases, row, message):
    with pytest.raises(ValueError, match=message):
        made([ROWS[0], row], bases["bert"])


def test_rows_without_words_are_left_out(bases, caplog):
    rows = [*ROWS, {"tokens": []}, {"tokens": None}, {"tokens": [" ", ""]}]
    assert samples_in(made(rows, bases["bert"])) == expected(bases["bert"], "bert")
    assert "3 rows of row list are left out: their text is blank" in caplog.text
    with pytest.raises(ValueError, match="row list holds no text in the words in column 'tokens'"):
        made([{"tokens": [" "]}], bases["bert"], text="tokens")


def test_other_models_read_no_lists_of_words(tmp_path):
    base = text_base(tmp_path / "base")
    message = "row 1: column 'tokens': expected text, found .*; lists of words are read for a base that classifies tok"
    with pytest.raises(ValueError, match=message):
        made([{"tokens": ["a", "b"]}], base, text="tokens")
    with pytest.raises(ValueError, match="no column of text: tokens .*; write a column of texts; lists of words are"):
        made([{"tokens": ["a", "b"]}], base)


def test_several_texts_are_no_lists_of_words(tmp_path):
    with pytest.raises(ValueError, match=r"several columns of text and none is named: .*such as text: .\{a\}.*\{b\}.$"):
        made([{"a": "x", "b": "y", "tokens": ["z"]}], text_base(tmp_path / "base"))


def test_inputs_are_those_that_the_model_takes(tmp_path, bases):
    """No types of tokens for DistilBERT; a mask, also where the tokenizer says that it makes none."""
    config = tf.DistilBertConfig(architectures=["DistilBertForTokenClassification"], vocab_size=len(bert_words()))
    config.save_pretrained(tmp_path)
    bert_words().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_input_names": ["input_ids", "token_type_ids"]}))
    batches = made(ROWS, tmp_path)
    assert batches.names == ["attention_mask", "input_ids"]
    assert [one["input_ids"] for one in samples_in(batches)] == [
        one["input_ids"] for one in expected(bases["bert"], "bert")
    ]


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    base = word_base(tmp_path, "bert", vocab_size=20)
    with pytest.raises(ValueError, match=r"row \d: the tokenizer gives token \d+, the base has 20; expected the tok"):
        made(ROWS, base)


def test_a_class_of_ones_own_classifies_tokens_as_its_parent_does(bases):
    class Mine(tf.BertForTokenClassification):
        pass

    model = Mine(KINDS["bert"][0]().config)
    found = nsc_merge.calibration_data(ROWS, model, tokenizer=str(bases["bert"]))
    assert samples_in(found) == expected(bases["bert"], "bert")


def test_boxes_and_images_are_in_no_list_of_words(tmp_path):
    tf.LayoutLMConfig(architectures=["LayoutLMForTokenClassification"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no column of text: tokens"):
        made([{"tokens": ["a", "b"]}], tmp_path)


def bytes_of(folder: Path) -> Path:
    """A tokenizer of bytes of no class of its own, as ModernBERT has it, which keeps what a setting says to itself."""
    made = roberta_words()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tf.PreTrainedTokenizerFast(tokenizer_object=made.backend_tokenizer, **names).save_pretrained(folder)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    config = tf.ModernBertConfig(
        vocab_size=len(made), **sizes, architectures=["ModernBertForTokenClassification"], pad_token_id=1,
        bos_token_id=0, eos_token_id=2, cls_token_id=0, sep_token_id=2,
    )  # fmt: skip
    config.save_pretrained(folder)
    return folder


def test_words_are_what_they_are_within_a_text_whatever_the_tokenizer(tmp_path, bases, caplog):
    batches = made(ROWS, bytes_of(tmp_path))
    spaced = expected(bases["roberta"], "roberta")
    assert [one["input_ids"] for one in samples_in(batches)] == [one["input_ids"] for one in spaced]
    (said,) = caplog.messages
    assert said.startswith("calibration.a: every word begins with a space, as in a text, where ")
    caplog.clear()
    made(ROWS, bases["roberta"])
    assert not caplog.messages


def test_what_splits_at_no_space_is_refused(tmp_path, bases):
    tool = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "aa": 2}, unk_token="[UNK]"))
    tool.normalizer = normalizers.Replace(" ", "")
    bert_words().save_pretrained(tmp_path)
    tf.PreTrainedTokenizerFast(tokenizer_object=tool, unk_token="[UNK]").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="^calibration.a: .* makes other tokens of a list of words than of a text of"):
        made(ROWS, bases["bert"], tokenizer=str(tmp_path))


def test_a_tokenizer_that_knows_no_words_is_refused(bases, monkeypatch):
    monkeypatch.setattr(encoding, "tokenizer_of", lambda *given: SimpleNamespace(is_fast=False))
    with pytest.raises(ValueError, match="^calibration.a: SimpleNamespace does not say of which word a token is; "):
        made(ROWS, bases["bert"])
