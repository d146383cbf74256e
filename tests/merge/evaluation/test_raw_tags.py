"""Tags of words as labels of raw data: those of transformers' run_ner.py, and the figures of an independent loop."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import save_file
from word_cases import KINDS, ROWS, TAGS, run_ner, word_adapter, word_base

from nsc_merge.calibration.raw.labels import Labelling
from nsc_merge.calibration.raw.reading import batches_of
from nsc_merge.calibration.raw.settings import DataSettings
from nsc_merge.commands.main import main
from nsc_merge.evaluation.eval_recipe_reader import load_eval_recipe
from nsc_merge.evaluation.metrics import entity_f1
from nsc_merge.evaluation.suite import RecipeSuite

NUMBERED = [{**row, "ner_tags": [TAGS.index(tag) for tag in row["ner_tags"]]} for row in ROWS]
NAMED = {"classes": TAGS}
CLASSES = datasets.List(datasets.ClassLabel(names=TAGS))
FEATURES = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "ner_tags": CLASSES})


@pytest.fixture(scope="module", params=KINDS)
def place(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    word_base(folder / "base", request.param)
    word_adapter(folder / "adapter", request.param, 1)
    return folder


def kind_of(place: Path) -> str:
    return next(kind for kind in KINDS if place.name.startswith(kind))


def lines(file: Path, rows: Iterable[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def suite_of(place: Path, rows: Any = ROWS, batch_size: int = 2, **task: Any) -> RecipeSuite:
    if not isinstance(rows, Path):
        rows = lines(place / "rows.jsonl", rows)
    test = {"source": str(rows), **task.pop("test", {})}
    tasks = {"t": {"adapter": "adapter", "test": test, "metric": "accuracy", **task}}
    recipe = {"model": "base", "tasks": tasks, "methods": ["zero_shot"], "output": {"dir": "out"}}
    (place / "evaluation.yaml").write_text(yaml.safe_dump({**recipe, "batch_size": batch_size}))
    return RecipeSuite(load_eval_recipe(place / "evaluation.yaml").at(0))


def rows_of(batches: Iterable[tuple[Any, torch.Tensor]]) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of every sample without padding, where labels are unknown."""
    found = []
    for inputs, labels in batches:
        assert bool((labels[inputs["attention_mask"] == 0] == -100).all())
        for ids, mask, label in zip(inputs["input_ids"], inputs["attention_mask"], labels, strict=True):
            found.append((ids[mask == 1].tolist(), label[mask == 1].tolist()))
    return sorted(found)


def by_hand(place: Path, rows: Any = ROWS, **given: Any) -> list[tuple[list[int], list[int]]]:
    return sorted((one["input_ids"], one["labels"]) for one in run_ner(place / "base", kind_of(place), rows, **given))


@pytest.mark.parametrize("rows", [ROWS, NUMBERED], ids=["names", "numbers"])
@pytest.mark.parametrize("task", [{"labels": "ner_tags"}, {}, {"test": {"text": "tokens", "padding_side": "left"}}])
def test_tags_are_at_the_first_token_of_their_word(place, rows, task):
    suite = suite_of(place, rows, **NAMED, **task)
    assert rows_of(suite.labelled("t", "test")) == by_hand(place)


def test_numbers_need_no_names(place):
    assert rows_of(suite_of(place, NUMBERED).labelled("t", "test")) == by_hand(place)


WORDS = st.lists(st.text("abtoErsB.-1é", min_size=1), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(lists=st.lists(WORDS, min_size=1, max_size=4), most=st.integers(4, 30), data=st.data())
def test_tags_of_words_of_any_kind_and_length(place, lists, most, data):
    tags = st.integers(0, len(TAGS) - 1)
    rows = [
        {"tokens": words, "ner_tags": data.draw(st.lists(tags, min_size=len(words), max_size=len(words)))}
        for words in lists
    ]
    side = data.draw(st.sampled_from(["right", "left"]))
    settings = DataSettings(max_length=most, truncation_side=side)
    batches = batches_of(rows, str(place / "base"), settings, 2, "a", labelling=Labelling("tags", "ner_tags"))
    expected = by_hand(place, rows, max_length=most, truncation_side=side)
    assert rows_of((batch, batch["labels"]) for batch in batches) == expected


@pytest.mark.parametrize("form", ["numbers", "stream", "parquet", "saved"])
def test_classes_of_datasets_are_their_names(place, form, tmp_path):
    """Whatever their numbers are there."""
    reordered = datasets.Features({**FEATURES, "ner_tags": datasets.List(datasets.ClassLabel(names=TAGS[::-1]))})
    made = datasets.Dataset.from_list([{key: row[key] for key in FEATURES} for row in ROWS], features=reordered)
    assert made[0]["ner_tags"] == [3, 2]
    if form == "parquet":
        made.to_parquet(tmp_path / "rows.parquet")
    elif form == "saved":
        made.save_to_disk(tmp_path / "saved")
    places = {"parquet": tmp_path / "rows.parquet", "saved": tmp_path / "saved"}
    source = {"numbers": made, "stream": made.to_iterable_dataset(), **places}[form]
    labelling = Labelling("tags", "ner_tags", TAGS)
    batches = batches_of(source, str(place / "base"), DataSettings(), 2, "a", labelling=labelling)
    assert rows_of((batch, batch["labels"]) for batch in batches) == by_hand(place)


OTHERS = TAGS[::-1]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ({"feature": {"names": OTHERS, "_type": "ClassLabel"}, "_type": "Sequence"}, OTHERS),
        ([{"names": OTHERS, "_type": "ClassLabel"}], OTHERS),
        ({"feature": {"names": 3, "_type": "ClassLabel"}, "_type": "Sequence"}, TAGS),
        ([], TAGS),
        ({"feature": {"dtype": "int64", "_type": "Value"}, "_type": "List"}, TAGS),
    ],
)
def test_what_earlier_releases_wrote_of_classes(place, kind, names, tmp_path):
    """Names, or numbers as they are where it says none; a number of none is unknown."""
    rows = [{"tokens": row["tokens"], "ner_tags": [names.index(tag) for tag in row["ner_tags"]]} for row in ROWS]
    unknown = [None, -1, len(TAGS)] if names is OTHERS else [None] * 3
    rows.append({"tokens": ["a", "b", "to"], "ner_tags": unknown})
    table = pa.Table.from_pylist(rows)
    said = json.dumps({"info": {"features": {"ner_tags": kind}}})
    pq.write_table(table.replace_schema_metadata({"huggingface": said}), tmp_path / "rows.parquet")
    labelling = Labelling("tags", "ner_tags", TAGS)
    batches = batches_of(tmp_path / "rows.parquet", str(place / "base"), DataSettings(), 2, "a", labelling=labelling)
    expected = by_hand(place, [*ROWS, {"tokens": ["a", "b", "to"], "ner_tags": [-100] * 3}])
    assert rows_of((batch, batch["labels"]) for batch in batches) == expected


def test_arrays_of_pandas(place):
    frame = pd.DataFrame({name: [np.array(row[name]) for row in NUMBERED] for name in ("tokens", "ner_tags")})
    batches = batches_of(frame, str(place / "base"), DataSettings(), 2, "a", labelling=Labelling("tags"))
    assert rows_of((batch, batch["labels"]) for batch in batches) == by_hand(place)


def test_other_texts_beside_words_are_left_alone(place):
    rows = [{**row, "sentence": " ".join(row["tokens"])} for row in ROWS]
    assert rows_of(suite_of(place, rows, **NAMED).labelled("t", "test")) == by_hand(place)


def test_heads_of_other_sizes_have_their_own_tags(place):
    """Of the model, whatever the adapter brought, or of a file; pooled, a sample has one class."""
    rows = [{"tokens": ["a", "b"], "ner_tags": [0, 4], "label": 1}]
    word_adapter(place / "adapter3", kind_of(place), 1, num_labels=3)
    task = {"adapter": "adapter3", "labels": "ner_tags"}
    with pytest.raises(ValueError, match="word 2: expected the number of a class from 0 to 2, as the head has 3, foun"):
        suite_of(place, rows, **task)
    suite_of(place, rows, **task, head="model")
    save_file({"weight": torch.zeros(9, 8), "bias": torch.zeros(9)}, place / "head.safetensors")
    head = {"head": "head.safetensors"}
    suite_of(place, [{**rows[0], "ner_tags": [0, 8]}], **head, pool="tokens", labels="ner_tags")
    suite = suite_of(place, rows, **head, pool="first")
    ((inputs, labels),) = suite.labelled("t", "test")
    assert labels.tolist() == [1]
    assert suite.output("t", suite.model, inputs).shape == (1, 9)


def test_what_is_unknown_counts_nowhere(place):
    rows = [{"tokens": ["He", "said", "so"], "ner_tags": ["O", None, "B-PER"]}]
    ((_, labels),) = suite_of(place, rows, **NAMED).labelled("t", "test")
    assert sorted(labels[labels != -100].tolist()) == [0, 1]


@pytest.mark.parametrize(
    ("row", "task", "message"),
    [
        ({"ner_tags": ["O"]}, NAMED, "row 1: expected a list of tags, one for each of its 2 words, found 1"),
        ({"ner_tags": ["O"] * 3}, NAMED, "row 1: expected a list of tags, one for each of its 2 words, found 3"),
        ({"ner_tags": "O O"}, NAMED, "row 1: expected a list of tags, one for each of its 2 words, found 'O O'"),
        ({"ner_tags": None}, NAMED, "row 1: expected a list of tags, one for each of its 2 words, found None"),
        ({"ner_tags": ["O", "B-ORG"]}, NAMED, r"row 1, word 2: expected a class of \['O', .*found 'B-ORG'"),
        ({"ner_tags": [0, 5]}, NAMED, r"row 1, word 2: expected a class of \['O', .*found 5"),
        ({"ner_tags": [0, -100]}, NAMED, r"row 1, word 2: expected a class of \['O', .*found -100"),
        ({"ner_tags": [0, 5]}, {}, "row 1, word 2: expected the number of a class from 0 to 4, as the head has 5, fo"),
        ({"ner_tags": ["O", "O"]}, {}, r"row 1, word 1: expected the number of a class, found 'O'; classes: \[FIRST"),
        ({}, NAMED, "row 1: no column of labels, such as ner_tags, in tokens; expected labels: COLUMN"),
        ({"kind": [0, 0]}, {"labels": "kinds"}, "labels: column 'kinds' is not there"),
        ({"pos_tags": [0, 0], "ner_tags": [0, 0]}, NAMED, r"several columns of tags .*\['pos_tags', 'ner_tags'\]; ex"),
        ({"text": "a b", "ner_tags": [0, 0]}, {"test": {"text": "text"}}, "tags are of words, .*row 1 holds a text"),
        ({"ner_tags": [0, 0]}, {"test": {"text": "ner_tags"}, "labels": "ner_tags"}, "which the model would read"),
        ({"ner_tags": [0, 0]}, {"metric": "rmse", "labels": "ner_tags"}, "expected a number as its label"),
    ],
)
def test_tags_that_cannot_be_are_refused(place, row, task, message):
    with pytest.raises(ValueError, match=message):
        suite_of(place, [{"tokens": ["a", "b"], **row}], **task)


@pytest.mark.parametrize("words", [[], None, ["", " "]])
def test_rows_without_words_have_no_tags(place, words, caplog):
    suite = suite_of(place, [*ROWS, {"tokens": words, "ner_tags": []}], **NAMED)
    assert rows_of(suite.labelled("t", "test")) == by_hand(place)
    assert "1 rows of " in caplog.text
    with pytest.raises(ValueError, match="row 5: expected a word for each of its 2 tags, found none"):
        suite_of(place, [*ROWS, {"tokens": words, "ner_tags": ["O", "O"]}], **NAMED)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({}, r"tasks.t.classes: metric entity_f1 needs the tags in order, \[O, B-PER, ...\], found none"),
        ({"classes": ["O", "U-PER", "B-PER", "L-PER", "I-PER"]}, "tasks.t.classes: expected tags O, .*found 'U-PER'"),
    ],
)
def test_entities_need_tags_of_entities(place, task, message):
    with pytest.raises(ValueError, match=message):
        suite_of(place, NUMBERED, metric="entity_f1", **task)


def test_tags_that_are_cut_or_of_no_token_are_counted(place, caplog):
    rows = [*ROWS, {"tokens": ["a", "", "b"], "ner_tags": ["O", "O", "O"]}]
    whole = suite_of(place, ROWS, **NAMED, test={"max_length": 64})
    assert not caplog.messages
    total = sum(len(labels[labels != -100]) for _, labels in whole.labelled("t", "test"))
    cut = suite_of(place, rows, **NAMED, test={"max_length": 9})
    left = sum(len(labels[labels != -100]) for _, labels in cut.labelled("t", "test"))
    said = next(one for one in caplog.messages if "count nowhere" in one)
    lost = f"{total + 3 - left} of {total + 3}"
    assert said.startswith(f"tasks.t.test: {lost} tags count nowhere, as their words are cut (max_length), or of no")


@pytest.mark.parametrize("metric", ["accuracy", "entity_f1"])
def test_figures_are_those_of_a_loop_over_samples(place, metric):
    """PEFT's own model, one sample after the other, whatever the batches."""
    task = {"adapter": "adapter", "test": "rows.jsonl", "labels": "ner_tags", "metric": metric, **NAMED}
    rows = [*ROWS, *({**row, "tokens": row["tokens"][::-1]} for row in ROWS)]
    lines(place / "rows.jsonl", rows)
    recipe = {"model": "base", "tasks": {"t": task}, "methods": ["zero_shot"], "output": {"dir": "out", "plots": False}}
    (place / "evaluation.yaml").write_text(yaml.safe_dump({**recipe, "batch_size": 3}))
    assert main(["eval", str(place / "evaluation.yaml"), "--redo"]) == 0
    results = json.loads((place / "out" / "results.json").read_text())["rows"]
    (found,) = (row["runs"][0]["metrics"]["t"] for row in results if row["row"] == "finetuned")
    base = type(KINDS[kind_of(place)][0]()).from_pretrained(place / "base")
    model = PeftModel.from_pretrained(base, place / "adapter").eval()
    logits, labels = [], []
    for one in run_ner(place / "base", kind_of(place), rows):
        known = torch.tensor(one.pop("labels"))
        with torch.no_grad():
            logits.append(model(**{name: torch.tensor([value]) for name, value in one.items()}).logits[0][known >= 0])
        labels.append(known[known >= 0])
    if metric == "accuracy":
        assert found == pytest.approx(float((torch.cat(logits).argmax(-1) == torch.cat(labels)).double().mean()))
        return
    padded = torch.nn.utils.rnn.pad_sequence
    expected = entity_f1(padded(logits, True), padded(labels, True, -100), classes=TAGS)
    assert found == pytest.approx(expected)


def test_words_of_two_tasks_are_scored_together(place):
    lines(place / "rows.jsonl", ROWS)
    task = {"adapter": "adapter", "test": "rows.jsonl", "metric": "accuracy", **NAMED}
    recipe = {"model": "base", "tasks": {"a": task, "b": task}, "methods": ["zero_shot"], "joint": "logits",
              "output": {"dir": "joint", "plots": False}, "batch_size": 3}  # fmt: skip
    (place / "joint.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["eval", str(place / "joint.yaml")]) == 0
    results = json.loads((place / "joint" / "results.json").read_text())["rows"]
    (row,) = (row["runs"][0] for row in results if row["row"] == "zero_shot")
    assert row["hits"]["all"]["1"] == pytest.approx(row["metrics"]["a"])
