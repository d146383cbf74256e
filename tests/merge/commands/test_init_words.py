"""First recipes of models that classify tokens: of named entities, parts of speech."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from init_cases import write_lines
from word_cases import ROWS, TAGS, word_adapter, word_base

from nsc_merge.commands.main import main
from nsc_merge.utils.yaml_text import from_yaml

pytestmark = pytest.mark.usefixtures("offline")

ADAPTERS = ["adapters/ner", "adapters/pos"]
INIT = ["init", *ADAPTERS, "--base", "base"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    word_base(tmp_path / "base", "roberta", id2label=dict(enumerate(TAGS)))
    for seed, task in enumerate(("ner", "pos")):
        word_adapter(tmp_path / "adapters" / task, "roberta", seed)
    write_lines(tmp_path / "rows.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(name: str) -> dict:
    return from_yaml(Path(name).read_text(encoding="utf-8"))


def test_words_are_found_and_merged(place, capsys):
    assert main([*INIT, "--data", "rows.jsonl", "--method", "regmean"]) == 0
    assert "4 rows of tokens, ner_tags; the words in column 'tokens', about 2" in capsys.readouterr().out
    assert written("recipe.yaml")["data"]["text"] == "tokens"
    assert main(["run", "recipe.yaml"]) == 0
    assert Path("merged/model/tokenizer.json").is_file()


TWO = [{**row, "pos_tags": [f"P{len(word)}" for word in row["tokens"]]} for row in ROWS]


def test_tags_are_measured_by_what_they_are(place, capsys):
    write_lines(Path("rows.jsonl"), TWO)
    config = {"id2label": {str(n): f"P{n + 1}" for n in range(10)}}
    word_adapter(place / "adapters" / "pos", "roberta", 1, num_labels=10)
    (place / "adapters" / "pos" / "config.json").write_text(json.dumps(config))
    assert main([*INIT, "--test", "rows.jsonl", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["tests"]
    assert told["ner"]["found"] == "4 rows, labels in column 'ner_tags'"
    test = {"source": "rows.jsonl", "text": "tokens"}
    tasks = {
        "ner": {"adapter": "adapters/ner", "test": test, "labels": "ner_tags", "metric": "entity_f1"},
        "pos": {"adapter": "adapters/pos", "test": test, "labels": "pos_tags", "metric": "accuracy"},
    }
    assert written("evaluation.yaml")["tasks"] == tasks
    assert main(["eval", "evaluation.yaml", "methods=[zero_shot]", "output.plots=false"]) == 0


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"ner_tags": [0], "pos_tags": [4], "chunk_tags": [9]}, ("ner_tags", "pos_tags")),
        ({"upos": [0], "xpos": ["X"]}, "upos"),
        ({"upos": [7], "xpos": ["I-PER"]}, "xpos"),
        ({"tags": ["O"]}, "tags"),
        ({"upos": [0], "xpos": []}, "upos"),
        ({"upos": [7], "xpos": [8]}, "found ['upos', 'xpos']"),
        ({"upos": [0], "xpos": [1]}, "found ['upos', 'xpos']"),
        ({"kinds": [0]}, "found ['tokens', 'kinds']"),
    ],
)
def test_the_column_of_tags_is_the_one_of_the_task_or_the_one_that_may_be(place, capsys, columns, found):
    write_lines(Path("rows.jsonl"), [{"tokens": ["a"], **columns}, {"tokens": [], **{name: [] for name in columns}}])
    code = main([*INIT, "--test", "rows.jsonl"])
    if isinstance(found, str) and found.startswith("found"):
        message = f"--test ner: expected one column of tags that are classes of 'ner', {found}; a task called ner is "
        assert code == 2
        assert message in capsys.readouterr().err
        return
    assert code == 0
    labels = [task["labels"] for task in written("evaluation.yaml")["tasks"].values()]
    assert labels == ([found, found] if isinstance(found, str) else list(found))


def test_what_is_wrong_with_the_only_tags_is_said_of_their_row(place, capsys):
    write_lines(Path("rows.jsonl"), [{"tokens": ["a"], "tags": ["X"]}])
    assert main([*INIT, "--test", "rows.jsonl"]) == 1
    assert "row 1, word 1: expected a class of ['O', 'B-PER', " in capsys.readouterr().err


def test_tags_that_nobody_names_are_measured_by_their_accuracy(place):
    """Neither the base, nor, of a head of another size, its names."""
    word_adapter(place / "adapters" / "pos", "roberta", 1, num_labels=6)
    write_lines(Path("rows.jsonl"), [{"tokens": ["a", "b"], "upos": [0, 5], "xpos": [6, 0], "ner_tags": [0, 8]}])
    assert main([*INIT[:1], *INIT[2:], "--test", "rows.jsonl"]) == 0
    task = written("evaluation.yaml")["tasks"]["pos"]
    assert (task["labels"], task["metric"]) == ("upos", "accuracy")
    word_base(place / "base", "roberta")
    write_lines(Path("rows.jsonl"), [{"tokens": ["a", "b"], "upos": [0, 4], "xpos": [5, 0]}])
    assert main([*INIT[:2], *INIT[3:], "--test", "rows.jsonl", "--force"]) == 0
    task = written("evaluation.yaml")["tasks"]["ner"]
    assert (task["labels"], task["metric"]) == ("upos", "accuracy")
