"""Two texts that a model compares: what the tokenizer makes of both, in calibration, recipes and evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from raw_cases import WORDS, tokenizer, write_rows
from tokenizers import processors
from zoo import write_adapter

import nsc_merge
from nsc_merge.calibration.raw.reading import batches_of
from nsc_merge.calibration.raw.settings import DataSettings
from nsc_merge.commands.main import main
from nsc_merge.utils.yaml_text import from_yaml

ROWS = [
    {"premise": "a b c", "hypothesis": "d", "label": "yes"},
    {"premise": "e", "hypothesis": "f g h a", "label": "no"},
    {"premise": "b", "hypothesis": "c", "label": "yes"},
]


def words() -> Any:
    made = tokenizer(chat=None)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    taken = ["input_ids", "token_type_ids", "attention_mask"]
    return tf.PreTrainedTokenizerFast(tokenizer_object=made.backend_tokenizer, model_input_names=taken, **names)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=16, num_labels=2, id2label={0: "no", 1: "yes"},
    )  # fmt: skip
    model = tf.BertForSequenceClassification(config)
    model.save_pretrained(tmp_path / "base")
    words().save_pretrained(tmp_path / "base")
    for n, task in enumerate(("one", "two")):
        write_adapter(model, tmp_path / "adapters" / task, n, r=2, target_modules=["query", "value"])
    write_rows(tmp_path / "rows.jsonl", ROWS)
    return tmp_path


def made(source: Any, place: Path, **settings: Any) -> list[dict[str, torch.Tensor]]:
    return list(batches_of(source, str(place / "base"), DataSettings(**settings), 1, "calibration.a"))


def test_both_texts_are_what_the_tokenizer_makes_of_them(place):
    batches = made(place / "rows.jsonl", place, text="premise", text_pair="hypothesis")
    expected = [words()(row["premise"], row["hypothesis"], return_tensors="pt") for row in ROWS]
    for batch in batches:
        (same,) = [one for one in expected if torch.equal(one["input_ids"], batch["input_ids"])]
        assert set(batch) == {"input_ids", "token_type_ids", "attention_mask"}
        assert torch.equal(batch["token_type_ids"], same["token_type_ids"])
        assert batch["token_type_ids"].max() == 1
    templates = made(place / "rows.jsonl", place, text="{premise}", text_pair="{hypothesis}")
    for batch, one in zip(batches, templates, strict=True):
        assert torch.equal(batch["input_ids"], one["input_ids"])


def test_long_pairs_are_cut_as_the_tokenizer_does(place, caplog):
    pair = ("a b c d e f g h", "c d")
    (batch,) = made([dict(zip("ab", pair, strict=True))], place, text="a", text_pair="b", max_length=8)
    expected = words()(*pair, truncation=True, max_length=8, return_tensors="pt")
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert "longer than 8 tokens, as are 1 of the 1 samples" in caplog.text


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"a": "a", "b": None}, {"text": "a", "text_pair": "b"}, "holds a text and none in column 'b' behind it"),
        ({"a": "a", "b": "b"}, {"text_pair": "b"}, "text_pair: 'b' stands behind a text; expected text: COLUMN, too"),
        ({"a": "a", "b": "b"}, {"text": "a", "text_pair": "c"}, "text_pair: column 'c' is not there"),
        ({"a": "a", "b": "\ud800"}, {"text": "a", "text_pair": "b"}, "half of a character"),
    ],
)
def test_pairs_that_cannot_be_are_refused(place, row, settings, message):
    with pytest.raises(ValueError, match=message):
        made([row], place, **settings)


def test_a_first_recipe_and_an_evaluation_know_pairs(place, monkeypatch):
    monkeypatch.chdir(place)
    assert main(["init", "adapters/one", "adapters/two", "--base", "base", "--data", "rows.jsonl"]) == 0
    document = from_yaml(Path("recipe.yaml").read_text(encoding="utf-8"))
    assert (document["data"]["text"], document["data"]["text_pair"]) == ("premise", "hypothesis")
    assert main(["run", "recipe.yaml", "options.steps=2", "output.dir=merged"]) == 0
    task = {
        "adapter": "adapters/one", "metric": "accuracy",
        "test": {"source": "rows.jsonl", "text": "premise", "text_pair": "hypothesis"},
    }  # fmt: skip
    recipe = {"model": "base", "tasks": {"one": task}, "methods": [{"folder": "merged"}], "output": {"dir": "out"}}
    Path("evaluation.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    assert main(["eval", "evaluation.yaml", "output.plots=false"]) == 0
    rows = {row["row"]: row["runs"][0] for row in json.loads(Path("out/results.json").read_text())["rows"]}
    model = tf.BertForSequenceClassification.from_pretrained("base").eval()
    asked = [words()(row["premise"], row["hypothesis"], return_tensors="pt") for row in ROWS]
    said = [("no", "yes")[int(model(**one).logits.argmax())] for one in asked]
    right = sum(one == row["label"] for one, row in zip(said, ROWS, strict=True))
    assert rows["zero_shot"]["metrics"]["one"] == pytest.approx(right / 3)


def test_a_question_is_read_with_the_context_that_its_answer_is_marked_in(place, monkeypatch):
    monkeypatch.chdir(place)
    model = tf.BertForQuestionAnswering(tf.BertConfig.from_pretrained("base"))
    model.save_pretrained("base")
    write_rows(Path("asked.jsonl"), [{"question": "a", "context": "b c d", "answers": {"text": ["c"]}}] * 3)
    assert main(["init", "adapters/one", "adapters/two", "--base", "base", "--data", "asked.jsonl"]) == 0
    document = from_yaml(Path("recipe.yaml").read_text(encoding="utf-8"))
    assert (document["data"]["text"], document["data"]["text_pair"]) == ("question", "context")


def test_a_second_text_is_part_of_what_samples_are(place):
    data = {
        pair: nsc_merge.calibration_data(place / "rows.jsonl", str(place / "base"), text="premise", text_pair=pair)
        for pair in ("hypothesis", "premise", None)
    }
    assert len({one.sha256["samples"] for one in data.values()}) == 3
