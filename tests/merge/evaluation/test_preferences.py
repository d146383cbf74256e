"""Reward models: which of two texts, or chats, has the higher score."""

from __future__ import annotations

import json
import re

import pytest
import served_cases
import torch
import torch.nn.functional as F
import transformers as tf
import yaml
import zoo
from peft import PeftModel

from nsc_merge.commands.main import main
from nsc_merge.evaluation.metrics import METRICS, scores_of_rows
from nsc_merge.recipes.first.looking import preferred_in
from nsc_merge.utils.yaml_text import from_yaml

OUT = {"dir": "out", "plots": False}
TURNS = ("chosen", "rejected")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base that scores texts, two adapters with heads of their own, and what was preferred as texts and as chats."""
    place = tmp_path_factory.mktemp("rewards")
    torch.manual_seed(0)
    words = served_cases.tokenizer()
    config = tf.LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_labels=1, pad_token_id=words.pad_token_id, initializer_range=0.2,
    )  # fmt: skip
    model = tf.LlamaForSequenceClassification(config)
    model.save_pretrained(place / "base")
    words.save_pretrained(place / "base")
    for seed, name in enumerate(("one", "two"), 1):
        targets = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["score"], "task_type": "SEQ_CLS"}
        zoo.write_adapter(model, place / name, seed, r=4, **targets)
    generator = torch.Generator().manual_seed(0)

    def text():
        return " ".join(f"w{n}" for n in torch.randint(0, 50, (5,), generator=generator).tolist()) + " "

    texts, chats, prompted = [], [], []
    for _ in range(20):
        asked, *said = text(), text(), text()
        texts.append({"prompt": asked, **dict(zip(TURNS, said, strict=True))})
        user, turns = {"role": "user", "content": asked}, [{"role": "assistant", "content": one} for one in said]
        chats.append({name: [user, turn] for name, turn in zip(TURNS, turns, strict=True)})
        prompted.append({"prompt": [user], **{name: [turn] for name, turn in zip(TURNS, turns, strict=True)}})
    for name, rows in (("texts", texts), ("chats", chats), ("prompted", prompted)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for one in made.iterdir():
        (tmp_path / one.name).symlink_to(one)
    return tmp_path


def scores(place, name, kind):
    """``[N, 2]`` of PEFT, one text at a time, as TRL puts prompt and answer together."""
    words = tf.AutoTokenizer.from_pretrained(place / "base")
    base = tf.LlamaForSequenceClassification.from_pretrained(place / "base")
    model = PeftModel.from_pretrained(base, place / name).eval()
    found = []
    for line in (place / f"{kind}.jsonl").read_text().splitlines():
        row = json.loads(line)
        both = [row["prompt"] + row[turn] if "prompt" in row else row[turn] for turn in TURNS]
        if kind != "texts":
            both = [words.apply_chat_template(one, tokenize=False) for one in both]
        given = [words(one, add_special_tokens=kind == "texts", return_tensors="pt") for one in both]
        with torch.no_grad():
            found.append([model(one["input_ids"]).logits.item() for one in given])
    return torch.tensor(found)


TEXTS = {"texts": ["{prompt}{chosen}", "{prompt}{rejected}"], "chats": list(TURNS)}
TEXTS["prompted"] = TEXTS["texts"]


@pytest.mark.parametrize("kind", TEXTS)
def test_figures_are_those_of_texts_scored_one_by_one(place, kind):
    """From the data to the table, by what ``init`` writes."""
    data = f"{kind}.jsonl"
    assert main(["init", "one", "two", "--base", "base", "--data", data, "--test", data]) == 0
    recipe = from_yaml((place / "recipe.yaml").read_text())
    assert recipe["data"]["texts"] == TEXTS[kind]
    evaluation = from_yaml((place / "evaluation.yaml").read_text())
    for task in evaluation["tasks"].values():
        assert (task["test"]["texts"], task["metric"]) == (TEXTS[kind], "pairwise_accuracy")
    evaluation |= {"batch_size": 3, "output": OUT, "methods": ["zero_shot"]}
    if kind == "chats":
        for task in evaluation["tasks"].values():
            task["validation"] = task["test"]
        evaluation["methods"] = [{"method": "distill", "options": {"steps": 2}}, "ensemble"]
    (place / "evaluation.yaml").write_text(yaml.safe_dump(evaluation))
    assert main(["eval", "evaluation.yaml"]) == 0
    rows = {row["row"]: row["runs"][0] for row in json.loads((place / "out/results.json").read_text())["rows"]}
    assert len(rows) >= 1 + len(evaluation["methods"])
    for name in ("one", "two"):
        wanted = scores(place, name, kind)
        assert rows["finetuned"]["metrics"][name] == (wanted[:, 0] > wanted[:, 1]).double().mean().item()
        loss = -F.logsigmoid(wanted[:, 0] - wanted[:, 1]).mean().item()
        assert rows["finetuned"]["losses"][name] == pytest.approx(loss, rel=1e-5)


def test_a_language_model_is_the_base_of_reward_models(place):
    """Which has no place for their heads: these are for its last token."""
    tf.LlamaForCausalLM.from_pretrained(place / "base").save_pretrained(place / "lm")
    served_cases.tokenizer().save_pretrained(place / "lm")
    assert main(["init", "one", "two", "--base", "lm", "--data", "chats.jsonl", "--test", "chats.jsonl"]) == 0
    assert from_yaml((place / "recipe.yaml").read_text())["data"]["texts"] == TEXTS["chats"]
    evaluation = from_yaml((place / "evaluation.yaml").read_text())
    for task in evaluation["tasks"].values():
        assert (task["metric"], task["pool"]) == ("pairwise_accuracy", "last")
    evaluation |= {"batch_size": 3, "output": OUT, "methods": ["task_arithmetic"]}
    (place / "evaluation.yaml").write_text(yaml.safe_dump(evaluation))
    assert main(["eval", "evaluation.yaml"]) == 0
    rows = {row["row"]: row["runs"][0] for row in json.loads((place / "out/results.json").read_text())["rows"]}
    for name in ("one", "two"):
        wanted = scores(place, name, "chats")
        assert rows["finetuned"]["metrics"][name] == (wanted[:, 0] > wanted[:, 1]).double().mean().item()
        loss = -F.logsigmoid(wanted[:, 0] - wanted[:, 1]).mean().item()
        assert rows["finetuned"]["losses"][name] == pytest.approx(loss, rel=1e-5)


def test_a_head_of_two_layers_scores_by_its_last(place):
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    words = served_cases.tokenizer()
    config = tf.RobertaConfig(vocab_size=len(words), max_position_embeddings=80, num_labels=1, **sizes)
    model = tf.RobertaForSequenceClassification(config)
    model.save_pretrained(place / "roberta")
    words.save_pretrained(place / "roberta")
    zoo.write_adapter(model, place / "three", 3, r=2, target_modules=["query"], modules_to_save=["classifier"])
    assert main(["init", "three", "--base", "roberta", "--data", "texts.jsonl", "--test", "texts.jsonl"]) == 0
    assert from_yaml((place / "recipe.yaml").read_text())["data"]["texts"] == TEXTS["texts"]
    (task,) = from_yaml((place / "evaluation.yaml").read_text())["tasks"].values()
    assert (task["metric"], task["test"]["texts"]) == ("pairwise_accuracy", TEXTS["texts"])


USER, SAID = {"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ({"chosen": "w1 w2", "rejected": "w1 w3"}, list(TURNS)),
        ({"prompt": "w1", "chosen": "w1 w2", "rejected": "w1 w3"}, list(TURNS)),
        ({"prompt": "w1", "chosen": " w2", "rejected": " w3"}, TEXTS["texts"]),
        ({"prompt": "w1", "chosen": [USER, SAID], "rejected": [USER, SAID]}, list(TURNS)),
        ({"prompt": [USER], "chosen": [USER, SAID], "rejected": [USER, SAID]}, list(TURNS)),
        ({"prompt": json.dumps([USER]), "chosen": json.dumps([SAID]), "rejected": json.dumps([SAID])}, TEXTS["texts"]),
        ({"prompt": "w1", "chosen": [SAID], "rejected": [SAID]}, None),
        ({"question": "w1", "chosen": "w2", "rejected": "w3"}, None),
        ({"chosen": "w1", "rejected": None}, None),
        ({"chosen": "w1"}, None),
    ],
)
def test_what_was_preferred_is_read_behind_what_it_answers(row, texts):
    assert preferred_in([row, row]) == texts


def test_what_stands_in_front_is_not_guessed(place, capsys):
    (place / "asked.jsonl").write_text(json.dumps({"question": "w1", "chosen": "w2", "rejected": "w3"}))
    given = ["one", "two", "--base", "base", "--data", "texts.jsonl", "--test", "asked.jsonl"]
    assert main(["init", *given]) == 2
    assert "nobody says how what chosen and rejected answer stands in front of them" in capsys.readouterr().err


def test_a_tie_and_what_is_no_number_are_not_preferred():
    nan = float("nan")
    outputs = torch.tensor([[2.0, 1.0], [1.0, 1.0], [nan, 0.0], [1.0, nan], [0.0, 3.0]])
    labels = torch.tensor([0, 0, 0, 0, 1])
    assert METRICS["pairwise_accuracy"].quality(outputs, labels).tolist() == [1, 0, 0, 0, 1]
    assert METRICS["pairwise_accuracy"].measure(outputs, labels) == pytest.approx(0.4)


def test_more_than_a_score_of_a_text_is_refused():
    assert scores_of_rows(torch.arange(6.0)[:, None], 3).tolist() == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ValueError, match=r"one score of every text, found \[6, 2\]; .* num_labels 1"):
        scores_of_rows(torch.zeros(6, 2), 3)


@pytest.mark.parametrize(
    ("test", "keys", "said"),
    [
        ("texts.jsonl", {}, r"test.texts: metric pairwise_accuracy is of scores of texts, .* \[CHOSEN, REJECTED\]"),
        ({"source": "texts.jsonl", "texts": ["chosen"]}, {}, "texts: metric pairwise_accuracy compares at least 2"),
        ({"source": "texts.jsonl", "texts": list(TURNS)}, {"labels": "prompt"}, "labels: expected none, as texts of a"),
        ({"source": "texts.jsonl", "texts": list(TURNS)}, {"classes": ["a"]}, "classes: expected none, as texts are"),
    ],
)
def test_what_does_not_go_together_is_refused(place, capsys, test, keys, said):
    task = {"adapter": "one", "test": test, "metric": "pairwise_accuracy", **keys}
    (place / "eval.yaml").write_text(yaml.safe_dump({"model": "base", "tasks": {"one": task}, "output": OUT}))
    assert main(["eval", "eval.yaml"]) == 2
    assert re.search(said, capsys.readouterr().err)
