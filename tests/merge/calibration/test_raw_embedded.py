"""Texts that a base embeds are calibration each alone, and first recipes know them by what lies beside the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import embedding_cases as cases
import pytest
import torch
import transformers as tf

from nsc_merge.calibration.raw.reading import batches_of
from nsc_merge.calibration.raw.settings import DataSettings
from nsc_merge.commands.main import main
from nsc_merge.utils.yaml_text import from_yaml

ROWS = [
    {"query": "w1 w2", "positive": "w3 w4 w5"},
    {"query": "w6", "positive": " "},
    {"query": None, "positive": "w7 w8"},
    {"query": "", "positive": None},
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cases.write_base(tmp_path / "base")
    for seed, name in enumerate(("one", "two"), 1):
        cases.write_adapter(tmp_path / "base", tmp_path / name, seed)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(name: str = "recipe.yaml") -> Any:
    return from_yaml(Path(name).read_text(encoding="utf-8"))


def test_every_text_is_a_sample_of_its_own(place, caplog):
    settings = DataSettings(texts=[f"{cases.PROMPT}{{query}}", "positive"])
    batches = batches_of(ROWS[:2] + ROWS[3:], str(place / "base"), settings, 1, "calibration.a")
    wanted = [f"{cases.PROMPT}w1 w2", "w3 w4 w5", f"{cases.PROMPT}w6"]
    expected = {tuple(cases.words()(text)["input_ids"]) for text in wanted}
    assert {tuple(batch["input_ids"][0].tolist()) for batch in batches} == expected
    assert len(batches) == 3
    assert "1 rows of row list are left out: their text is blank" in caplog.text
    # Of a column that is null the other text is taken.
    batches = batches_of(ROWS[2:], str(place / "base"), DataSettings(texts=["query", "positive"]), 1, "calibration.a")
    (batch,) = batches
    assert batch["input_ids"].tolist() == cases.words()(["w7 w8"])["input_ids"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"texts": "query"}, "texts: expected a list of columns or templates, found 'query'"),
        ({"texts": []}, "texts: expected a list of columns or templates"),
        ({"texts": ["query", 3]}, "texts: expected a list of columns or templates"),
        ({"texts": ["query"], "text": "query"}, "texts, text: expected one of them, as each of texts is read alone"),
        ({"texts": ["query"], "messages": "query"}, "texts, messages: expected one of them"),
        ({"texts": ["query", "documents"]}, "calibration.a: row list: texts: column 'documents' is not there"),
        ({"texts": ["query", "{positive"]}, "texts: a '{' alone in the template"),
    ],
)
def test_texts_that_cannot_be_taken_are_refused(place, settings, message):
    with pytest.raises(ValueError, match=message):
        batches_of(ROWS, str(place / "base"), DataSettings(**settings), 1, "calibration.a")


def test_a_base_of_images_takes_none_alone(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    tf.ViTModel(tf.ViTConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="texts: is named, and the base takes images alone"):
        batches_of([{"query": "a", "image": "x.png"}], str(tmp_path / "base"), DataSettings(texts=["query"]), 1, "a")


@pytest.mark.parametrize(
    ("columns", "texts"),
    [
        (("query", "positive"), [f"{cases.PROMPT}{{query}}", "positive"]),
        (("query", "positive", "negative"), [f"{cases.PROMPT}{{query}}", "positive", "negative"]),
        (("question", "answer"), [f"{cases.PROMPT}{{question}}", "answer"]),
        (("sentence1", "sentence2"), ["sentence1", "sentence2"]),
        (("anchor", "positive", "negative"), ["anchor", "positive", "negative"]),
    ],
)
def test_a_first_recipe_has_the_prompts_and_the_length_of_the_base(place, columns, texts):
    rows = [{name: f"w{n} w{number}" for number, name in enumerate(columns)} for n in range(5)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["init", "one", "two", "--base", "base", "--data", "rows.jsonl"]) == 0
    assert written()["data"]["texts"] == texts
    assert written()["data"]["max_length"] == 32
    assert main(["run", "recipe.yaml", "options.steps=2", "batch_size=2"]) == 0
    kept = written("merged/recipe.yaml")["calibration"]["one"]
    assert (kept["texts"], kept["text"]) == (texts, None)
    # What was merged is merged again by what it kept.
    assert main(["run", "merged/recipe.yaml", "output.dir=again"]) == 0
    first, again = (Path(name, "lora", "adapter_model.safetensors").read_bytes() for name in ("merged", "again"))
    assert first == again


@pytest.mark.parametrize(
    ("prompts", "default", "texts"),
    [
        ({"query": "", "passage": "w1 {x} "}, None, ["query", "w1 {{x}} {positive}"]),
        ({"sts": "w2 "}, "sts", ["w2 {query}", "w2 {positive}"]),
        ({"sts": "w2 "}, None, ["query", "positive"]),
    ],
)
def test_prompts_are_those_of_documents_or_of_all_texts(place, prompts, default, texts):
    settings = {"prompts": prompts, "default_prompt_name": default}
    Path("base/config_sentence_transformers.json").write_text(json.dumps(settings))
    Path("rows.jsonl").write_text(json.dumps({"query": "w1", "positive": "w2"}) + "\n")
    assert main(["init", "one", "--base", "base", "--data", "rows.jsonl"]) == 0
    assert written()["data"]["texts"] == texts


@pytest.mark.parametrize(
    ("name", "metric"), [("similar", "spearman"), ("found", "ndcg"), ("nearest", "accuracy")]
)
def test_a_first_evaluation_compares_them(place, name, metric):
    file = cases.write_rows(place, name, 1)
    arguments = ["one", "two", "--base", "base", "--data", file.name, "--test", file.name]
    assert main(["init", *arguments]) == 0
    task = written("evaluation.yaml")["tasks"]["one"]
    assert task["metric"] == metric
    assert task["test"]["max_length"] == 32
    assert task["test"]["texts"][-1] in ("sentence2", "positive", "negative")
    assert main(["run", "recipe.yaml", "options.steps=2", "batch_size=2"]) == 0
    assert main(["eval", "evaluation.yaml", "output.plots=false"]) == 0
    rows = json.loads(Path("evaluation/results.json").read_text())["rows"]
    assert [row["row"] for row in rows] == ["zero_shot", "finetuned", "task_arithmetic", "merged"]
    assert all(-1 <= run["metrics"]["one"] <= 1 for row in rows for run in row["runs"])


def test_labels_of_inferences_are_no_similarity(place, capsys):
    Path("rows.jsonl").write_text(json.dumps({"premise": "w1", "hypothesis": "w2", "label": 2}) + "\n")
    assert main(["init", "one", "--base", "base", "--data", "rows.jsonl"]) == 0
    assert written()["data"]["texts"] == ["premise", "hypothesis"]
    assert main(["init", "one", "--base", "base", "--test", "rows.jsonl", "--out", "other.yaml"]) == 2
    assert "--test one: labels of a premise and a hypothesis do not say how alike" in capsys.readouterr().err


def test_columns_of_other_names_are_named_in_a_recipe(place, capsys):
    Path("rows.jsonl").write_text(json.dumps({"left": "w1", "right": "w2"}) + "\n")
    assert main(["init", "one", "--base", "base", "--data", "rows.jsonl"]) == 1
    error = capsys.readouterr().err
    assert "several columns of text and none is named: left ('w1'), right ('w2'); expected columns called" in error
    assert "data: {texts: [FIRST, SECOND]}, each is embedded alone" in error
    # A plain base reads its texts as before.
    for file in ("modules.json", "config_sentence_transformers.json"):
        (place / "base" / file).unlink()
    assert main(["init", "one", "--base", "base", "--data", "rows.jsonl"]) == 1
    assert "nsc-merge init has --text for it" in capsys.readouterr().err


def test_modules_beside_the_adapters_of_a_plain_base_count(place):
    for folder in ("base", "one"):
        cases.write_modules(place / folder)
    for file in ("modules.json", "config_sentence_transformers.json"):
        (place / "base" / file).unlink()
    Path("rows.jsonl").write_text(json.dumps({"query": "w1", "document": "w2"}) + "\n")
    assert main(["init", "one", "two", "--base", "base", "--data", "rows.jsonl"]) == 0
    assert written()["data"]["texts"] == [f"{cases.PROMPT}{{query}}", "document"]


def test_a_blank_text_is_refused_where_texts_are_compared(place, capsys):
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:2]))
    recipe = {
        "model": "base", "methods": ["zero_shot"], "output": {"dir": "out", "plots": False},
        "tasks": {"a": {
            "adapter": "one", "metric": "ndcg", "test": {"source": "rows.jsonl", "texts": ["query", "positive"]},
        }},
    }  # fmt: skip
    Path("eval.yaml").write_text(json.dumps(recipe))
    assert main(["eval", "eval.yaml"]) == 1
    assert "row 2: expected every one of texts, which are compared, found number 2 blank" in capsys.readouterr().err


def test_a_base_without_a_mask_compares_no_texts(place):
    from nsc_merge.calibration.raw.drawing import Filling, batched_rows

    one = {"input_ids": torch.ones(3, dtype=torch.long)}
    with pytest.raises(ValueError, match="tasks.a.test: texts: the base takes no attention_mask"):
        batched_rows([one, one], {"labels": torch.ones(1)}, 1, 0, {"input_ids": Filling(0, "right")}, "tasks.a.test")
