"""A first evaluation recipe, and what it measures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
import zoo
from audio_cases import audio_base, model_of, noise, write_wave
from init_cases import ADAPTERS, go, make_places, write_lines
from init_cases import written as recipe_written
from peft import PeftModel
from served_cases import WORDS, picture, tokenizer

from nsc_merge.commands.main import main
from nsc_merge.utils.yaml_text import from_yaml

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return make_places(tmp_path_factory)


@pytest.fixture
def at(places, monkeypatch):
    def there(kind):
        Path(places[kind] / "evaluation.yaml").unlink(missing_ok=True)
        return go(places, monkeypatch, kind)

    return there


def written() -> dict:
    return from_yaml(Path("evaluation.yaml").read_text(encoding="utf-8"))


def test_chats_and_questions_of_a_language_model(at, capsys):
    at("llama")
    assert main(["init", *ADAPTERS, "--data", "chats", "--test", "chats"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "and then  nsc-merge eval evaluation.yaml"
    task = {"test": "chats/one.jsonl", "metric": "exact_match", "generate": True, "adapter": "adapters/one"}
    assert written()["tasks"]["one"] == task
    assert written()["methods"][1] == {"folder": "merged"}
    assert main(["run", "recipe.yaml", "options.steps=1"]) == 0
    assert main(["eval", "evaluation.yaml", "output.plots=false"]) == 0
    rows = {row["row"] for row in json.loads(Path("evaluation/results.json").read_text())["rows"]}
    assert rows == {"zero_shot", "finetuned", "task_arithmetic", "merged"}
    # Of question and answer the question is read, with the line's end that stands between them in training.
    assert main(["init", *ADAPTERS, "--test", "one=prompts.jsonl", "--test", "two=chats/two.jsonl", "--force"]) == 0
    assert written()["tasks"]["one"]["test"] == {"source": "prompts.jsonl", "text": "{question}\n"}


def test_a_classifier_by_folders_of_its_classes(at, capsys):
    place = at("vit")
    for number in range(4):
        folder = place / "test" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / f"{number}.png")
    (place / "adapters" / "two" / "config.json").write_text((place / "adapters" / "one" / "config.json").read_text())
    assert main(["init", *ADAPTERS, "--test", "test", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["evaluation"] == "evaluation.yaml"
    assert told["tests"]["one"]["found"] == "4 rows, labels by folder"
    assert written()["tasks"]["two"] == {"adapter": "adapters/two", "test": "test", "metric": "accuracy"}
    # Nothing of it is lost.
    assert main(["init", *ADAPTERS, "--test", "test"]) == 2
    assert "recipe.yaml is there already" in capsys.readouterr().err
    Path("recipe.yaml").unlink()
    assert main(["init", *ADAPTERS, "--test", "test"]) == 2
    assert "evaluation.yaml is there already; --force replaces it" in capsys.readouterr().err
    Path("evaluation.yaml").write_text("mine: 1\n")
    assert main(["init", *ADAPTERS, "--test", "test", "--force"]) == 2
    assert "reads as no recipe (keys model and tasks)" in capsys.readouterr().err
    Path("evaluation.yaml").unlink()
    assert main(["init", *ADAPTERS, "--test", "test", "--out", "evaluation.yaml"]) == 2
    assert "is where --test writes the evaluation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--test", "nowhere"], "--test: nowhere is missing; expected a file or a folder"),
        (["--test", "one=chats"], "--test: nothing is given for task 'two'; expected --test two=FILE, too"),
        (["--test", "inputs"], "--test one: expected raw data on disk with labels, found"),
        (["--test", "texts.jsonl"], "row 1: no column of labels, such as answer, in text; expected labels: COLUMN"),
        (["--test", "chats", "--out", "-"], "--out: - prints the recipe alone; expected a file with --json"),
    ],
)
def test_what_cannot_be_measured_is_told(at, capsys, given, message):
    at("llama")
    write_lines(Path("texts.jsonl"), [{"text": WORDS[3]}])
    assert main(["init", *ADAPTERS, *given]) != 0
    assert message in capsys.readouterr().err
    assert not Path("evaluation.yaml").exists()


@pytest.mark.parametrize("kind", ["whisper", "ctc"])
def test_speech_is_measured_by_its_words(kind, tmp_path, monkeypatch):
    model = model_of(kind)
    model.save_pretrained(tmp_path / "base")
    audio_base(tmp_path / "base", kind)
    if kind == "ctc":
        (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "a": 5}))
        tf.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json")).save_pretrained(tmp_path / "base")
    zoo.write_adapter(model, tmp_path / "adapters" / "one", 1, r=2, target_modules=["q_proj"])
    for number in range(2):
        write_wave(tmp_path / "clips" / f"{number}.wav", noise(0.3, number))
    rows = [{"file_name": f"{number}.wav", "sentence": "ab c"} for number in range(2)]
    write_lines(tmp_path / "clips" / "metadata.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    assert main(["init", "adapters/one", "--base", "base", "--test", "clips"]) == 0
    task = {"adapter": "adapters/one", "test": "clips", "metric": "wer", "generate": True}
    assert written()["tasks"] == {"one": task}


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("own", [True, False])
def test_heads_of_one_output_are_regressions(outputs, own, tmp_path, monkeypatch):
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    config = tf.BertConfig(vocab_size=64, **sizes, num_labels=outputs)
    torch.manual_seed(0)
    model = tf.BertForSequenceClassification(config)
    head = {"modules_to_save": ["classifier"]} if own else {}
    zoo.write_adapter(model, tmp_path / "adapters" / "one", 1, r=2, target_modules=["query"], **head)
    if own:
        # The adapter's counts, whatever the base has.
        model = tf.BertForSequenceClassification(tf.BertConfig(vocab_size=64, **sizes, num_labels=5))
    model.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    rows = [{"sentence1": WORDS[n], "sentence2": WORDS[n + 1], "label": n % 2} for n in range(3)]
    write_lines(tmp_path / "pairs.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    assert main(["init", "adapters/one", "--base", "base", "--test", "pairs.jsonl"]) == 0
    task = written()["tasks"]["one"]
    assert task["metric"] == ("pearson" if outputs == 1 else "accuracy")
    assert task["test"] == {"source": "pairs.jsonl", "text": "sentence1", "text_pair": "sentence2"}


@pytest.mark.parametrize("kind", ["value", "classes"])
def test_a_language_model_compares_two_texts(at, kind):
    """As a classifier was trained on it, whose head is behind the last token of both, as the tokenizer puts them."""
    place = at("llama")
    torch.manual_seed(0)
    outputs = 1 if kind == "value" else 3
    model = tf.LlamaForSequenceClassification.from_pretrained("base", num_labels=outputs)
    zoo.write_adapter(model, place / "pairs" / kind, 1, r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    labels = {"value": 0.5, "classes": [True, False, True]}
    rows = [{"query": " ".join(WORDS[n : n + 3]), "passage": WORDS[2 * n], "label": labels[kind]} for n in range(3)]
    write_lines(Path("pairs.jsonl"), rows)
    given = ["--base", "base", "--data", "pairs.jsonl", "--test", "pairs.jsonl", "--force"]
    assert main(["init", f"pairs/{kind}", *given]) == 0
    both = {"text": "query", "text_pair": "passage"}
    assert {name: recipe_written()["data"][name] for name in both} == both
    assert written()["tasks"][kind]["test"] == {"source": "pairs.jsonl", **both}
    assert main(["eval", "evaluation.yaml", "methods=[zero_shot]", "output={dir: pairs-out, plots: false}"]) == 0
    rows_found = json.loads(Path("pairs-out/results.json").read_text())["rows"]
    (found,) = [row["runs"][0]["losses"][kind] for row in rows_found if row["row"] == "finetuned"]
    trained, words = PeftModel.from_pretrained(model, place / "pairs" / kind).eval(), tokenizer()
    with torch.no_grad():
        each = [trained(**words(row["query"], row["passage"], return_tensors="pt")).logits for row in rows]
    goal = torch.tensor([row["label"] for row in rows])
    if kind == "value":
        wanted = F.mse_loss(torch.cat(each)[:, 0], goal)
    else:
        wanted = F.binary_cross_entropy_with_logits(torch.cat(each), goal.float())
    assert found == pytest.approx(wanted.item(), rel=1e-4)
