"""What a first evaluation recipe measures each kind of task by."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import zoo
from audio_cases import audio_base, model_of, noise, write_wave
from init_cases import write_lines
from served_cases import WORDS, picture, tokenizer, write_base

from nsc_merge.commands.main import main
from nsc_merge.recipes.first.evaluation import evaluation_text, look_at_tests
from nsc_merge.recipes.first.findings import find
from nsc_merge.utils.yaml_text import from_yaml

pytestmark = pytest.mark.usefixtures("offline")

SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}


@pytest.fixture(autouse=True)
def at(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lay_out(model: Any, targets: list[str], **config: Any) -> None:
    model.save_pretrained("base")
    zoo.write_adapter(model, Path("adapters/one"), 1, r=2, target_modules=targets, **config)


def task_of(test: str, *others: str) -> dict[str, Any]:
    assert main(["init", "adapters/one", "--base", "base", "--test", test, *others]) == 0
    (task,) = from_yaml(Path("evaluation.yaml").read_text(encoding="utf-8"))["tasks"].values()
    assert task.pop("adapter") == "adapters/one"
    return task


def bert(**config: Any) -> Any:
    torch.manual_seed(0)
    return tf.BertForSequenceClassification(tf.BertConfig(vocab_size=64, **SIZES, **config))


@pytest.mark.parametrize("columns", [["review"], ["sentence", "idx"]])
def test_the_text_is_named_and_classes_are_the_bases(columns) -> None:
    lay_out(bert(id2label={0: "bad", 1: "good"}), ["query"])
    tokenizer().save_pretrained("base")
    rows = [{**dict.fromkeys(columns, WORDS[n]), "idx": n, "label": ("good", "bad")[n % 2]} for n in range(3)]
    write_lines(Path("rows.jsonl"), rows)
    assert task_of("rows.jsonl") == {"test": {"source": "rows.jsonl", "text": columns[0]}, "metric": "accuracy"}
    assert main(["eval", "evaluation.yaml", "output.plots=false", "methods=[zero_shot]"]) == 0
    write_lines(Path("rows.jsonl"), [{**rows[0], "label": "fair"}])
    assert main(["init", "adapters/one", "--base", "base", "--test", "rows.jsonl", "--force"]) != 0


def test_names_of_another_head_are_not_the_tasks(capsys) -> None:
    lay_out(bert(num_labels=3), ["query"], modules_to_save=["classifier"])
    bert(id2label={0: "bad", 1: "good"}).save_pretrained("base")
    tokenizer().save_pretrained("base")
    write_lines(Path("rows.jsonl"), [{"text": WORDS[0], "label": "good"}])
    assert main(["init", "adapters/one", "--base", "base", "--test", "rows.jsonl"]) != 0
    assert "row 1: expected the number of a class, found 'good'" in capsys.readouterr().err
    write_lines(Path("rows.jsonl"), [{"text": WORDS[0], "label": 2}])
    assert task_of("rows.jsonl") == {"test": {"source": "rows.jsonl", "text": "text"}, "metric": "accuracy"}


def test_a_head_of_two_layers_counts_by_its_last() -> None:
    torch.manual_seed(0)
    config = tf.RobertaConfig(vocab_size=64, max_position_embeddings=20, **SIZES, num_labels=1)
    lay_out(tf.RobertaForSequenceClassification(config), ["query"], modules_to_save=["classifier"])
    tokenizer().save_pretrained("base")
    write_lines(Path("rows.jsonl"), [{"text": WORDS[n], "score": n / 2} for n in range(3)])
    assert task_of("rows.jsonl") == {"test": {"source": "rows.jsonl", "text": "text"}, "metric": "pearson"}


def test_a_head_of_two_layers_may_have_more_classes_than_its_width(capsys) -> None:
    torch.manual_seed(0)
    names = {number: f"intent {number}" for number in range(12)}
    config = tf.RobertaConfig(vocab_size=64, max_position_embeddings=20, **SIZES, id2label=names)
    assert config.hidden_size < len(names)
    lay_out(tf.RobertaForSequenceClassification(config), ["query"], modules_to_save=["classifier"])
    tokenizer().save_pretrained("base")
    write_lines(Path("rows.jsonl"), [{"text": WORDS[0], "label": label} for label in ("intent 11", 11)])
    assert task_of("rows.jsonl") == {"test": {"source": "rows.jsonl", "text": "text"}, "metric": "accuracy"}
    write_lines(Path("rows.jsonl"), [{"text": WORDS[0], "label": 12}])
    assert main(["init", "adapters/one", "--base", "base", "--test", "rows.jsonl", "--force"]) != 0
    assert "row 1: expected a class of ['intent 0', 'intent 1'" in capsys.readouterr().err


@pytest.mark.parametrize("brought", [True, False])
def test_classes_that_the_head_does_not_have_are_told_at_once(brought, capsys) -> None:
    """An evaluation would find them when its first row is run."""
    lay_out(bert(num_labels=3), ["query"], **({"modules_to_save": ["classifier"]} if brought else {}))
    if brought:
        bert(num_labels=9).save_pretrained("base")
    tokenizer().save_pretrained("base")
    write_lines(Path("rows.jsonl"), [{"text": WORDS[n], "label": n} for n in range(3)])
    assert task_of("rows.jsonl") == {"test": {"source": "rows.jsonl", "text": "text"}, "metric": "accuracy"}
    # As data have them that count from 1.
    write_lines(Path("rows.jsonl"), [{"text": WORDS[n], "label": 1 + n} for n in range(3)])
    assert main(["init", "adapters/one", "--base", "base", "--test", "rows.jsonl", "--force"]) != 0
    said = capsys.readouterr().err
    assert "row 3: expected the number of a class from 0 to 2, as the head has 3, found 3" in said
    # As SNLI has what its annotators did not agree on.
    write_lines(Path("rows.jsonl"), [{"text": WORDS[n], "label": n - 1} for n in range(3)])
    assert main(["init", "adapters/one", "--base", "base", "--test", "rows.jsonl", "--force"]) != 0
    assert "row 1: expected a class of the head, found -1; where none is known, write null" in capsys.readouterr().err


def test_classes_of_recordings_are_no_speech() -> None:
    model = model_of("without a mask")
    lay_out(model, ["q_proj"], modules_to_save=["projector", "classifier"])
    audio_base(Path("base"), "without a mask")
    for number in range(3):
        write_wave(Path("clips", f"{number}.wav"), noise(0.1, number))
    rows = [{"file_name": f"{number}.wav", "label": number} for number in range(3)]
    write_lines(Path("clips/metadata.jsonl"), rows)
    assert task_of("clips") == {"test": "clips", "metric": "accuracy"}


def test_what_is_written_in_images_is_no_speech() -> None:
    torch.manual_seed(0)
    written = tf.TrOCRConfig(
        vocab_size=64, d_model=8, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=8, is_decoder=True,
        max_position_embeddings=20, add_cross_attention=True, cross_attention_hidden_size=8,
    )  # fmt: skip
    seen = tf.ViTConfig(**SIZES, image_size=8, patch_size=4)
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(seen, written)
    config.decoder_start_token_id, config.pad_token_id = 2, 0
    lay_out(tf.VisionEncoderDecoderModel(config=config), ["q_proj", "v_proj"])
    tokenizer().save_pretrained("base")
    tf.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained("base")
    Path("lines").mkdir()
    picture(0).save("lines/0.png")
    write_lines(Path("lines/metadata.jsonl"), [{"file_name": "0.png", "text": WORDS[0]}])
    assert task_of("lines") == {"test": "lines", "metric": "exact_match", "generate": True}


@pytest.fixture
def finding(at) -> Callable[[int], Any]:
    write_base("llama", at / "base")
    zoo.write_adapter(zoo.build("llama"), at / "adapters" / "a", 1, r=2, target_modules=["q_proj"])
    write_lines(at / "rows.jsonl", [{"question": WORDS[0], "answer": WORDS[1]}])

    def found(count: int) -> Any:
        names = ["adapters/a"]
        for number in range(1, count):
            shutil.copytree("adapters/a", f"adapters/b{number}", dirs_exist_ok=True)
            names.append(f"adapters/b{number}")
        return find(names, "base")

    return found


@pytest.mark.parametrize(("count", "scale"), [(1, 1.0), (2, 0.4), (5, 0.4), (6, 0.1667)])
def test_the_scale_to_compare_with_is_that_of_so_many_tasks(finding, at, count, scale) -> None:
    found = finding(count)
    tests = look_at_tests(["rows.jsonl"], found)
    written = from_yaml(evaluation_text(found, tests, at, "eval.yaml", "elsewhere"))
    assert list(written) == ["model", "tasks", "methods", "output"]
    assert written["methods"] == [
        {"method": "task_arithmetic", "options": {"scale": scale}},
        {"folder": "elsewhere"},
    ]
    assert written["output"] == {"dir": "evaluation"}
    assert list(written["tasks"]) == [task.name for task in found.tasks]
    assert list(found.options.values()) == [pytest.approx(scale, abs=1e-4)]


def test_the_base_is_read_at_the_same_revision(finding, at) -> None:
    found = finding(1)
    tests = look_at_tests(["rows.jsonl"], found)
    assert tests["a"].said == "1 rows, labels in column 'answer'"
    base = replace(found.base, source="owner/base", revision="v1")
    text = evaluation_text(replace(found, base=base), tests, at, "my eval.yaml")
    assert text.splitlines()[2] == "#   nsc-merge eval 'my eval.yaml'"
    written = from_yaml(text)
    assert list(written) == ["model", "revision", "tasks", "methods", "output"]
    assert (written["model"], written["revision"]) == ("owner/base", "v1")


def test_data_on_the_hub_are_named_by_hand(finding, at) -> None:
    with pytest.raises(ValueError, match="--test a: expected raw data on disk with labels, found owner/data; tensors"):
        look_at_tests(["owner/data"], finding(1))


def test_a_base_without_the_head_of_its_classifiers_is_told_with_the_way_to_one(capsys) -> None:
    """As roberta-large, on which PEFT's examples train; there is no figure without what stands before the head."""
    lay_out(bert(num_labels=3), ["query"], task_type="SEQ_CLS")
    tf.BertForMaskedLM(tf.BertConfig(vocab_size=64, **SIZES)).save_pretrained("base")
    tokenizer().save_pretrained("base")
    write_lines(Path("rows.jsonl"), [{"text": WORDS[n], "label": n} for n in range(3)])
    given = ["init", "adapters/one", "--base", "base", "--test", "rows.jsonl"]
    assert main(given) == 2
    said = capsys.readouterr().err
    assert "--test one: BertForMaskedLM has no place for classifier; expected a base that classifies, which" in said
    way = re.search(r"AutoModelForSequenceClassification\.from_pretrained\('(.*)', num_labels=3\)", said)
    tf.AutoModelForSequenceClassification.from_pretrained(way[1], num_labels=3).save_pretrained("base")
    assert main(given) == 0
    zoo.write_adapter(zoo.build("llama"), Path("adapters/one"), 1, r=2, target_modules=["q_proj"])
    config = Path("adapters/one/adapter_config.json")
    config.write_text(config.read_text().replace('"task_type": null', '"task_type": "SEQ_CLS"'))
    write_base("llama", Path("base"))
    assert main([*given, "--force"]) == 2
    assert "LlamaForCausalLM has no head of classes, and the adapter brought none" in capsys.readouterr().err


def test_the_text_that_is_named_is_that_of_labelled_data_too(capsys) -> None:
    """Columns of which nobody knows how they were put together are not read by halves."""
    lay_out(bert(num_labels=3), ["query"])
    tokenizer().save_pretrained("base")
    rows = [{"prompt": WORDS[n], "response": WORDS[n + 1], "label": n} for n in range(3)]
    write_lines(Path("rows.jsonl"), rows)
    given = ["init", "adapters/one", "--base", "base", "--test", "rows.jsonl", "--force"]
    assert main(given) != 0
    said = "column 'prompt' would be read alone, beside response; expected text: prompt, or both (text_pair)"
    assert f"--test one: {said}; nsc-merge init has --text for it" in capsys.readouterr().err
    for text in ("response", "{prompt} {response}"):
        assert main([*given, "--text", text]) == 0
        (task,) = from_yaml(Path("evaluation.yaml").read_text(encoding="utf-8"))["tasks"].values()
        assert task["test"] == {"source": "rows.jsonl", "text": text}


def test_names_of_classes_are_no_text() -> None:
    lay_out(bert(id2label={0: "bad", 1: "good"}), ["query"])
    tokenizer().save_pretrained("base")
    write_lines(Path("rows.jsonl"), [{"review": WORDS[n], "label": ("good", "bad")[n % 2]} for n in range(3)])
    assert task_of("rows.jsonl", "--data", "rows.jsonl")["test"] == {"source": "rows.jsonl", "text": "review"}
    assert from_yaml(Path("recipe.yaml").read_text(encoding="utf-8"))["data"]["text"] == "review"


@pytest.mark.parametrize("pair", [("text", "text_pair"), ("text1", "text2"), ("question", "passage")])
def test_two_texts_are_compared_by_their_usual_names(pair) -> None:
    lay_out(bert(num_labels=3), ["query"])
    tokenizer().save_pretrained("base")
    write_lines(Path("rows.jsonl"), [{**dict(zip(pair, WORDS[n:], strict=False)), "label": n} for n in range(3)])
    both = {"text": pair[0], "text_pair": pair[1]}
    assert task_of("rows.jsonl", "--data", "rows.jsonl")["test"] == {"source": "rows.jsonl", **both}
    assert both.items() <= from_yaml(Path("recipe.yaml").read_text(encoding="utf-8"))["data"].items()


def test_classified_chats_are_found_in_a_column_of_any_name(finding) -> None:
    chat = [{"role": "user", "content": WORDS[0]}, {"role": "assistant", "content": WORDS[1]}]
    for row in ({"conversation": chat}, {"conversation": chat, "source": None}):
        write_lines(Path("chats.jsonl"), [row])
        found = look_at_tests(["chats.jsonl"], finding(1))["a"]
        assert (found.settings, found.said) == ({"messages": "conversation"}, "1 rows, answers of chats")


@pytest.mark.parametrize(
    ("config", "label", "metric"),
    [
        ({"id2label": {0: "bad", 1: "good"}}, "good", "accuracy"),
        ({"id2label": {0: "bad", 1: "good"}}, ["good", "bad"], "multilabel_f1"),
        ({"num_labels": 1}, 0.5, "pearson"),
    ],
)
def test_labels_are_in_the_column_that_is_named(config, label, metric, capsys) -> None:
    lay_out(bert(**config), ["query"])
    tokenizer().save_pretrained("base")
    write_lines(Path("rows.jsonl"), [{"text": WORDS[n], "rating": label} for n in range(3)])
    assert main(["init", "adapters/one", "--base", "base", "--test", "rows.jsonl"]) != 0
    said = "no column of labels, such as label, in text, rating; expected labels: COLUMN.*; nsc-merge init has --labels"
    assert re.search(said, capsys.readouterr().err)
    task = task_of("rows.jsonl", "--labels", "rating")
    assert task == {"test": {"source": "rows.jsonl", "text": "text"}, "labels": "rating", "metric": metric}
    assert main(["eval", "evaluation.yaml", "output.plots=false", "methods=[zero_shot]"]) == 0


def test_a_column_of_labels_that_no_data_have_is_refused(capsys) -> None:
    lay_out(bert(num_labels=2), ["query"])
    tokenizer().save_pretrained("base")
    write_lines(Path("rows.jsonl"), [{"text": WORDS[0], "label": 1}])
    assert main(["init", "adapters/one", "--base", "base", "--test", "rows.jsonl", "--labels", "rating"]) != 0
    assert "--labels: no data of --test have a column 'rating'" in capsys.readouterr().err
    assert main(["init", "adapters/one", "--base", "base", "--labels", "rating"]) != 0
    assert "--labels: is of labelled data, but no --test is given" in capsys.readouterr().err
    assert not Path("evaluation.yaml").exists()
