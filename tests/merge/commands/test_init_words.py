"""First recipes of models that classify tokens: of named entities, parts of speech."""

from __future__ import annotations

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
