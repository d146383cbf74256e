"""Labelled raw data: the same batches and figures as of tensors made by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import transformers as tf
import yaml
import zoo
from architectures import ARCHITECTURES
from audio_cases import audio_base, model_of, noise, whisper_words, write_wave
from harness_cases import WORDS, tokenizer
from safetensors.torch import load_file, save_file
from served_cases import WORDS as WORDS_BESIDE
from served_cases import picture, write_base

from nsc_merge.calibration.raw.labels import Labelling
from nsc_merge.calibration.raw.reading import batches_of
from nsc_merge.calibration.raw.settings import DataSettings
from nsc_merge.commands.main import main
from nsc_merge.evaluation.eval_recipe_reader import load_eval_recipe
from nsc_merge.evaluation.heads import CTCHead
from nsc_merge.evaluation.suite import RecipeSuite
from nsc_merge.models.traits import hears

pytestmark = pytest.mark.usefixtures("offline")

CLASSES = ["cat", "dog"]


def lines(file: Path, rows: Iterable[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def lay_out(place: Path, model: Any, targets: list[str], **config: Any) -> None:
    model.save_pretrained(place / "base")
    zoo.write_adapter(model, place / "adapter", 1, r=2, target_modules=targets, **config)


def suite_of(place: Path, task: dict[str, Any], **others: Any) -> RecipeSuite:
    tasks = {"t": {"adapter": "adapter", **task}}
    recipe = {"model": "base", "tasks": tasks, "methods": ["zero_shot"], "output": {"dir": "out"}, **others}
    (place / "evaluation.yaml").write_text(yaml.safe_dump(recipe))
    return RecipeSuite(load_eval_recipe(place / "evaluation.yaml").at(0))


def score(suite: RecipeSuite) -> float:
    batches = suite.labelled("t", "test")
    kept = [suite.kept("t", suite.output("t", suite.model, inputs).detach(), label) for inputs, label in batches]
    # Of unequal lengths each is measured by itself.
    sizes = [len(label) for _, label in batches]
    scores = [suite.measure("t", output, label) for output, (_, label) in zip(kept, batches, strict=True)]
    return sum(size * one for size, one in zip(sizes, scores, strict=True)) / sum(sizes)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A base with a head of two classes, whose adapter names them, and a folder for each class."""
    model = ARCHITECTURES["ViT"].build()
    lay_out(tmp_path, model, ["q_proj", "v_proj"], modules_to_save=["classifier"])
    config = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: n for n, name in enumerate(CLASSES)}}
    (tmp_path / "adapter" / "config.json").write_text(json.dumps(config))
    size = model.config.image_size
    tf.ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(tmp_path / "base")
    for number in range(7):
        folder = tmp_path / "photos" / CLASSES[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / f"{number}.png")
    return tmp_path


def by_hand(place: Path) -> Path:
    tool = tf.AutoImageProcessor.from_pretrained(place / "base")
    pixels = tool([picture(number).convert("RGB") for number in range(7)], return_tensors="pt")["pixel_values"]
    save_file({"pixel_values": pixels, "labels": torch.arange(7) % 2}, place / "test.safetensors")
    return place / "test.safetensors"


def test_folders_of_classes_are_classes_of_the_head(photos):
    raw = suite_of(photos, {"test": "photos", "metric": "accuracy"})
    hand = suite_of(photos, {"test": str(by_hand(photos)), "metric": "accuracy"})
    assert score(raw) == score(hand)
    ((inputs, labels),) = raw.labelled("t", "test")
    ((expected, numbers),) = hand.labelled("t", "test")
    for image, label in zip(inputs["pixel_values"], labels, strict=True):
        (at,) = [n for n in range(7) if torch.equal(expected["pixel_values"][n], image)]
        assert label == numbers[at]


def test_samples_beyond_what_is_held_in_memory_are_on_the_disk_of_the_results(photos, monkeypatch):
    task = {"test": "photos", "metric": "accuracy"}
    wanted = score(suite_of(photos, task))
    monkeypatch.setattr("nsc_merge.calibration.on_disk._SMALL", 1)
    monkeypatch.setattr("nsc_merge.evaluation.suite._IN_MEMORY", 0)
    suite = suite_of(photos, task)
    assert score(suite) == wanted
    assert str(photos / "out") in Path("/proc/self/maps").read_text()
    assert list((photos / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("values", "task"),
    [
        (CLASSES, {}),
        ([0, 1], {}),
        (["0", "1"], {}),
        ([0.0, 1.0], {}),
        (["0.0", "1.0"], {}),
        (["2", "1"], {"classes": ["2", "1"]}),
        ([0, "1.0"], {"classes": ["0", "1"]}),
        (["zero", "one"], {"classes": ["zero", "one"]}),
    ],
)
@pytest.mark.parametrize("column", ["label", "kind"])
def test_columns_of_classes_by_name_or_number(photos, values, task, column):
    rows = [{"image": f"photos/{CLASSES[n % 2]}/{n}.png", column: values[n % 2]} for n in range(7)]
    lines(photos / "rows.jsonl", rows)
    named = {} if column == "label" else {"labels": column}
    raw = suite_of(photos, {"test": "rows.jsonl", "metric": "accuracy", **named, **task})
    assert sorted(torch.cat([label for _, label in raw.labelled("t", "test")]).tolist()) == [0, 0, 0, 0, 1, 1, 1]
    assert score(raw) == score(suite_of(photos, {"test": str(by_hand(photos)), "metric": "accuracy"}))


def test_unknown_classes_count_nowhere(photos):
    unknown = {3: None, 4: "", 5: float("nan")}
    rows = [{"image": f"photos/{CLASSES[n % 2]}/{n}.png", "label": unknown.get(n, n % 2)} for n in range(7)]
    lines(photos / "rows.jsonl", rows)
    ((_, labels),) = suite_of(photos, {"test": "rows.jsonl", "metric": "f1"}).labelled("t", "test")
    assert sorted(labels.tolist()) == [-100, -100, -100, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("row", "task", "message"),
    [
        ({"label": "fox"}, {}, r"tasks.t.test: .*row 1: expected a class of \['cat', 'dog'\], .*found 'fox'"),
        ({"label": 3}, {}, "expected a class of .*found 3"),
        ({"label": -1}, {}, "expected a class of .*found -1"),
        ({"label": 1.5}, {}, "expected a class of .*found 1.5"),
        ({"label": "-1"}, {}, "expected a class of .*found '-1'"),
        ({"label": 1}, {"classes": ["1", "2"]}, r"row 1: 1 may be a name or a number, .*\['1', '2'\]"),
        ({"label": "0"}, {"classes": ["1", "2"]}, "row 1: '0' may be a name or a number"),
        ({"kind": "cat"}, {"labels": "sort"}, r"labels: column 'sort' is not there \(columns: image, kind"),
        ({"label": 1}, {"metric": "mean_angle"}, "raw data hold classes, numbers or answers, and mean_angle is of oth"),
        ({"label": "much"}, {"metric": "rmse"}, "row 1: expected a number as its label, found 'much'"),
    ],
)
def test_labels_that_cannot_be_are_refused(photos, row, task, message):
    lines(photos / "rows.jsonl", [{"image": "photos/cat/0.png", **row}])
    with pytest.raises(ValueError, match=message):
        suite_of(photos, {"test": "rows.jsonl", "metric": "accuracy", **task})


def test_names_of_classes_that_nobody_has_are_asked_for(photos):
    (photos / "adapter" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"row \d: expected the number of a class, found '\w+'; classes: \[FIRST"):
        suite_of(photos, {"test": "photos", "metric": "accuracy"})


def test_files_in_no_folder_have_no_class(photos):
    lines(photos / "rows.jsonl", [{"image": "0.png"}])
    picture(0).save(photos / "0.png")
    with pytest.raises(ValueError, match="row 1: no column of labels, such as label, in image; expected labels: COL"):
        suite_of(photos, {"test": "rows.jsonl", "metric": "accuracy"})


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    lay_out(tmp_path, zoo.build("llama"), ["q_proj", "v_proj"])
    words = tokenizer()
    words.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    words.save_pretrained(tmp_path / "base")
    return tmp_path


ASKED = [f"{WORDS[n]} {' '.join(WORDS[n : n + n % 3])}".strip() for n in range(5)]
ANSWERS = [" ".join(WORDS[2 * n : 2 * n + 1 + n % 2]) for n in range(5)]


def generated_by_hand(place: Path, prompts: list[str]) -> Path:
    """As the documentation makes them."""
    words = tf.AutoTokenizer.from_pretrained(place / "base", padding_side="left")
    asked = words(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
    told = words([f"{one} </s>" for one in ANSWERS], add_special_tokens=False, padding=True, padding_side="right",
                 return_tensors="pt")  # fmt: skip
    labels = told["input_ids"].masked_fill(told["attention_mask"] == 0, -100)
    save_file({**asked, "labels": labels}, place / "test.safetensors")
    return place / "test.safetensors"


def rows_of(suite: RecipeSuite) -> dict[tuple[int, ...], list[int]]:
    """Label by prompt, both without padding."""
    found = {}
    for inputs, labels in suite.labelled("t", "test"):
        for ids, mask, label in zip(inputs["input_ids"], inputs["attention_mask"], labels, strict=True):
            found[tuple(ids[mask == 1].tolist())] = label[label != -100].tolist()
    return found


@pytest.mark.parametrize("metric", ["exact_match", "bleu"])
def test_questions_are_answered_as_by_hand(chat, metric):
    lines(chat / "rows.jsonl", ({"question": q, "answer": a} for q, a in zip(ASKED, ANSWERS, strict=True)))
    task = {"metric": metric, "generate": True}
    raw = suite_of(chat, {"test": {"source": "rows.jsonl", "text": "question"}, **task}, batch_size=2)
    hand = suite_of(chat, {"test": str(generated_by_hand(chat, ASKED)), **task})
    assert rows_of(raw) == rows_of(hand)
    for inputs, _ in raw.labelled("t", "test"):
        assert inputs["attention_mask"][:, -1].all()
    if metric == "exact_match":
        assert score(raw) == score(hand)


@pytest.mark.parametrize("apart", [True, False])
def test_a_chat_is_asked_without_its_last_turn(chat, apart):
    chats = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        for asked, answer in zip(ASKED, ANSWERS, strict=True)
    ]
    rows = [{"messages": turns[:1], "answer": turns[1]["content"]} if apart else {"messages": turns} for turns in chats]
    lines(chat / "rows.jsonl", rows)
    raw = suite_of(chat, {"test": "rows.jsonl", "metric": "exact_match", "generate": True})
    hand = generated_by_hand(chat, [f"user {one} assistant " for one in ASKED])
    assert rows_of(raw) == rows_of(suite_of(chat, {"test": str(hand), "metric": "exact_match", "generate": True}))


@pytest.mark.parametrize("metric", ["perplexity", "exact_match", "accuracy"])
def test_answers_are_predicted_behind_their_prompts(chat, metric):
    lines(chat / "rows.jsonl", ({"question": q, "answer": a} for q, a in zip(ASKED, ANSWERS, strict=True)))
    task = {"test": {"source": "rows.jsonl", "text": "question"}, "metric": metric}
    raw = suite_of(chat, task, batch_size=1)
    words = tf.AutoTokenizer.from_pretrained(chat / "base")
    hand = {}
    for asked, answer in zip(ASKED, ANSWERS, strict=True):
        prompt, told = words(asked)["input_ids"], words(f"{answer} </s>", add_special_tokens=False)["input_ids"]
        hand[(*prompt, *told)] = told
    assert rows_of(raw) == hand
    together = suite_of(chat, {**task, "test": {**task["test"], "padding_side": "left"}}, batch_size=5)
    assert rows_of(together) == hand
    for suite in (raw, together):
        outputs = [
            (suite.output("t", suite.model, inputs), label) for inputs, label in suite.labelled("t", "test")
        ]
        logits = torch.cat([output.detach()[label != -100] for output, label in outputs])
        labels = torch.cat([label[label != -100] for _, label in outputs])
        found = torch.nn.functional.cross_entropy(logits, labels)
        assert found == pytest.approx(float(mean_loss(suite.model, hand)), rel=1e-5)


def mean_loss(model: Any, rows: dict[tuple[int, ...], list[int]]) -> torch.Tensor:
    total, count = torch.zeros(()), 0
    for ids, told in rows.items():
        logits = model(input_ids=torch.tensor([ids])).logits.detach()[0, -len(told) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(told), reduction="sum")
        count += len(told)
    return total / count


def test_several_answers_are_references(chat):
    rows = [{"text": ASKED[0], "answers": ANSWERS[:2]}, {"text": ASKED[1], "answers": [ANSWERS[3]]}]
    lines(chat / "rows.jsonl", rows)
    suite = suite_of(chat, {"test": "rows.jsonl", "metric": "vqa", "generate": True})
    ((inputs, labels),) = suite.labelled("t", "test")
    assert labels.shape == (2, 2, 3)
    written = [[tokenizer().decode(one[one >= 0], skip_special_tokens=True) for one in several] for several in labels]
    assert sorted(written) == sorted([ANSWERS[:2], [ANSWERS[3], ""]])
    suite.measure("t", suite.output("t", suite.model, inputs), labels)
    with pytest.raises(ValueError, match="expected one answer, found 2; generate: true takes more"):
        suite_of(chat, {"test": "rows.jsonl", "metric": "exact_match"})


@pytest.mark.parametrize(
    "answers",
    [
        {"text": ["w7", "w8 w9"], "answer_start": [0, 3]},
        [{"answer": "w7", "answer_id": 1}, {"answer": "w8 w9", "answer_id": 2}],
        {"answer": ["w7", "w8 w9"], "answer_id": [1, 2]},
    ],
    ids=["SQuAD", "VQA", "VQA by column"],
)
def test_answers_within_objects(chat, answers):
    lines(chat / "rows.jsonl", [{"question": "w6", "answers": answers}])
    task = {"test": {"source": "rows.jsonl", "text": "question"}, "metric": "vqa", "generate": True}
    ((_, labels),) = suite_of(chat, task).labelled("t", "test")
    written = [tokenizer().decode(one[one >= 0], skip_special_tokens=True) for one in labels[0]]
    assert written == ["w7", "w8 w9"]


@pytest.mark.parametrize(
    ("rows", "task", "message"),
    [
        ({"answer": "w7"}, {"text": "{question} {answer}"}, "holds the column 'answer' of the labels"),
        ({"answer": "w7"}, {"text": "answer"}, "holds the column 'answer' of the labels, which the model would read"),
        ({"answer": None}, {"text": "question"}, "row 1: expected a text, or a list of texts, as its answer"),
        ({"answer": []}, {"text": "question"}, "row 1: expected an answer as its label, found none"),
        ({}, {}, "row 1: no column of labels, such as answer, in question; expected labels: COLUMN$"),
    ],
)
def test_answers_that_cannot_be_are_refused(chat, rows, task, message):
    lines(chat / "rows.jsonl", [{"question": "w6", **rows}])
    with pytest.raises(ValueError, match=message):
        suite_of(chat, {"test": {"source": "rows.jsonl", **task}, "metric": "exact_match", "generate": True})


def test_all_samples_are_measured_whatever_is_drawn_of_calibration(chat):
    lines(chat / "rows.jsonl", ({"text": q, "answer": a} for q, a in zip(ASKED, ANSWERS, strict=True)))
    task = {"metric": "exact_match", "generate": True}
    whole = suite_of(chat, {"test": "rows.jsonl", **task}, data={"samples": 2})
    assert len(rows_of(whole)) == 5
    some = suite_of(chat, {"test": {"source": "rows.jsonl", "samples": 2}, **task})
    assert len(rows_of(some)) == 2


@pytest.mark.parametrize("kind", ["T5", "BART"])
def test_decoders_are_asked_from_what_begins_an_answer(kind, tmp_path):
    model = ARCHITECTURES[kind].build()
    if getattr(model.config, "decoder_start_token_id", None) is None:
        model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = 0
    start = model.config.decoder_start_token_id
    lay_out(tmp_path, model, ARCHITECTURES[kind].targets)
    words = tokenizer()
    words.save_pretrained(tmp_path / "base")
    asked, answers = ["w6 w7", "w8"], ["w9 w10 w11", "w12"]
    lines(tmp_path / "rows.jsonl", ({"text": q, "answer": a} for q, a in zip(asked, answers, strict=True)))
    pairs = zip(asked, answers, strict=True)
    told = {tuple(words(q)["input_ids"]): words(text_target=a)["input_ids"] for q, a in pairs}
    written = suite_of(tmp_path, {"test": "rows.jsonl", "metric": "exact_match", "generate": True})
    assert rows_of(written) == told
    predicted = suite_of(tmp_path, {"test": "rows.jsonl", "metric": "perplexity"})
    assert rows_of(predicted) == told
    for inputs, labels in predicted.labelled("t", "test"):
        moved = torch.cat([torch.full((len(labels), 1), start), labels[:, :-1].clamp(min=0)], 1)
        real = inputs["decoder_attention_mask"] == 1
        assert torch.equal(inputs["decoder_input_ids"][real], moved[real])
        assert torch.equal(real, labels != -100)
        assert torch.isfinite(predicted.output("t", predicted.model, inputs)).all()


def test_whisper_is_measured_on_what_it_writes(tmp_path):
    """Language and task are given to it, and no part of the answer."""
    lay_out(tmp_path, model_of("whisper"), ["q_proj", "v_proj"])
    audio_base(tmp_path / "base", "whisper")
    for number in range(3):
        write_wave(tmp_path / "clips" / f"{number}.wav", noise(0.3, number))
    said = ["ab c", "h", "d"]
    rows = [{"file_name": f"{number}.wav", "transcription": one} for number, one in enumerate(said)]
    lines(tmp_path / "clips" / "metadata.jsonl", rows)
    suite = suite_of(tmp_path, {"test": "clips", "metric": "wer", "generate": True})
    ((inputs, labels),) = suite.labelled("t", "test")
    assert inputs["decoder_input_ids"].tolist() == [whisper_words().prefix_tokens] * 3
    written = [whisper_words().decode(one[one >= 0]) for one in labels]
    assert sorted(written) == sorted(f"{one}<|endoftext|>" for one in said)
    assert suite.measure("t", suite.output("t", suite.model, inputs), labels) >= 0


def test_values_of_a_regression(tmp_path):
    config = tf.BertConfig(
        vocab_size=64, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, num_labels=1
    )
    torch.manual_seed(0)
    model = tf.BertForSequenceClassification(config)
    lay_out(tmp_path, model, ["query", "value"])
    tokenizer().save_pretrained(tmp_path / "base")
    rows = [{"text": f"w{6 + n}", "score": None if n == 2 else f"{n / 4}"} for n in range(4)]
    lines(tmp_path / "rows.jsonl", rows)
    suite = suite_of(tmp_path, {"test": "rows.jsonl", "metric": "rmse"})
    labels = torch.cat([label for _, label in suite.labelled("t", "test")])
    assert sorted(labels[~labels.isnan()].tolist()) == [0.0, 0.25, 0.75]
    assert labels.isnan().sum() == 1


def test_the_command_measures_raw_data_and_again_when_they_change(photos, capsys):
    recipe = {
        "model": "base",
        "tasks": {"t": {"adapter": "adapter", "test": "photos", "validation": "photos", "metric": "accuracy"}},
        "methods": [{"method": "task_arithmetic", "options": {"scale": 0.5}}],
        "output": {"dir": "out", "plots": False},
    }
    (photos / "evaluation.yaml").write_text(yaml.safe_dump(recipe))
    run = ["eval", str(photos / "evaluation.yaml")]
    assert main(run) == 0
    first = (photos / "out" / "rows.jsonl").read_text()
    assert main(run) == 0
    assert (photos / "out" / "rows.jsonl").read_text() == first
    (photos / "photos" / "cat" / "0.png").rename(photos / "photos" / "dog" / "0.png")
    assert main(run) == 0
    assert (photos / "out" / "rows.jsonl").read_text() != first


def test_labels_are_part_of_what_samples_are(photos):
    ways = (None, Labelling("class", classes=CLASSES), Labelling("class", classes=CLASSES[::-1]))
    place, base = photos / "photos", str(photos / "base")
    made = [batches_of(place, base, DataSettings(), 4, "a", labelling=labelling) for labelling in ways]
    assert len({one.sha256["samples"] for one in made}) == 3


@pytest.mark.parametrize("generate", [True, False])
def test_questions_about_images(generate, tmp_path):
    """The answer stands behind a prompt with an image in it; prompts alone are padded in front."""
    write_base("llava", tmp_path / "base")
    model = zoo.build("llava")
    zoo.write_adapter(model, tmp_path / "adapter", 1, r=2, target_modules=["q_proj", "v_proj"])
    rows = []
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
        asked = " ".join(WORDS_BESIDE[number : 2 * number + 1])
        rows.append({"image": f"{number}.png", "prompt": asked, "answer": WORDS_BESIDE[9 + number]})
    lines(tmp_path / "rows.jsonl", rows)
    suite = suite_of(tmp_path, {"test": "rows.jsonl", "metric": "exact_match", "generate": generate})
    ((inputs, labels),) = suite.labelled("t", "test")
    words = tf.AutoTokenizer.from_pretrained(tmp_path / "base")
    for row, label in enumerate(labels):
        told = label[label != -100].tolist()
        assert told[-1] == words.eos_token_id
        (number,) = [n for n in range(3) if words.decode(told[:-1]) == rows[n]["answer"]]
        ids = inputs["input_ids"][row][inputs["attention_mask"][row] == 1].tolist()
        prompt = ids if generate else ids[: -len(told)]
        assert ids[len(prompt) :] == ([] if generate else told)
        assert words.decode(prompt).endswith(rows[number]["prompt"])
    assert inputs["attention_mask"][:, -1 if generate else 0].all()
    assert len(inputs["pixel_values"]) == 3
    output = suite.output("t", suite.model, inputs)
    assert 0 <= suite.measure("t", output, labels) <= 1


def test_classes_of_a_base_of_other_size_are_not_the_heads(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    base = tf.BertForSequenceClassification(tf.BertConfig(vocab_size=64, **sizes, id2label={0: "bad", 1: "good"}))
    own = tf.BertForSequenceClassification(tf.BertConfig(vocab_size=64, **sizes, num_labels=3))
    zoo.write_adapter(own, tmp_path / "adapter", 1, r=2, target_modules=["query"], modules_to_save=["classifier"])
    base.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    lines(tmp_path / "rows.jsonl", ({"text": f"w{6 + n}", "label": n} for n in range(3)))
    suite = suite_of(tmp_path, {"test": "rows.jsonl", "metric": "accuracy"})
    assert sorted(torch.cat([label for _, label in suite.labelled("t", "test")]).tolist()) == [0, 1, 2]
    lines(tmp_path / "rows.jsonl", [{"text": "w6", "label": "good"}])
    with pytest.raises(ValueError, match="row 1: expected the number of a class, found 'good'"):
        suite_of(tmp_path, {"test": "rows.jsonl", "metric": "accuracy"})


def test_nothing_is_measured_on_what_was_trained_on_without_a_word(photos):
    (photos / "photos").rename(photos / "train")
    (photos / "both" / "test").mkdir(parents=True)
    (photos / "train").rename(photos / "both" / "train")
    picture(9).save(photos / "both" / "test" / "9.png")
    lines(photos / "both" / "test" / "metadata.jsonl", [{"file_name": "9.png", "label": "dog"}])
    rows = {"image": [str(photos / "both" / "test" / "9.png")], "label": [1]}
    held = {split: datasets.Dataset.from_dict(rows) for split in ("train", "test")}
    datasets.DatasetDict(held).save_to_disk(str(photos / "held"))
    for source in ("both", "held"):
        with pytest.raises(ValueError, match="would be measured on its split train, as none is named; expected split"):
            suite_of(photos, {"test": source, "metric": "accuracy"})
        suite = suite_of(photos, {"test": {"source": source, "split": "test"}, "metric": "accuracy"})
        assert [label.tolist() for _, label in suite.labelled("t", "test")] == [[1]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "w6", "input": "w7", "output": "w8"}, "'instruction' would be read alone, beside input;"),
        ({"question": "w6", "context": "w7", "answer": "w8"}, r"beside context; .*text: \"\{question\}\\n\{context"),
    ],
)
def test_half_a_question_is_not_asked_without_a_word(chat, row, message):
    lines(chat / "rows.jsonl", [row])
    task = {"metric": "exact_match", "generate": True}
    with pytest.raises(ValueError, match=message):
        suite_of(chat, {"test": "rows.jsonl", **task})
    named = next(iter(row))
    assert len(rows_of(suite_of(chat, {"test": {"source": "rows.jsonl", "text": named}, **task}))) == 1


@pytest.mark.parametrize("task", [{"test": "texts.txt"}, {"test": {"source": "rows.jsonl", "text": "said"}}])
def test_all_of_a_text_is_predicted_where_it_is_its_own_label(chat, task):
    (chat / "texts.txt").write_text("\n".join(ASKED), encoding="utf-8")
    lines(chat / "rows.jsonl", ({"said": one, "by": "w9"} for one in ASKED))
    named = "text" if isinstance(task["test"], str) else "said"
    suite = suite_of(chat, {**task, "metric": "perplexity", "labels": named}, batch_size=1)
    words, total, count = tf.AutoTokenizer.from_pretrained(chat / "base"), 0.0, 0
    for one in ASKED:
        ids = torch.tensor([words(one)["input_ids"]])
        logits = suite.model(input_ids=ids).logits.detach()[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += len(logits)
    kept = [(suite.output("t", suite.model, inputs).detach(), label) for inputs, label in suite.labelled("t", "test")]
    logits = torch.cat([output[label != -100] for output, label in kept])
    found = torch.nn.functional.cross_entropy(logits, torch.cat([label[label != -100] for _, label in kept]))
    assert float(found) == pytest.approx(total / count, rel=1e-5)
    together = suite_of(chat, {**task, "metric": "perplexity", "labels": named}, batch_size=5)
    assert sum(int((label != -100).sum()) for _, label in together.labelled("t", "test")) == count


def test_ctc_is_measured_on_what_it_hears(tmp_path):
    """Frames beyond a recording, repeated tokens and blanks count nowhere; letters that are doubled stay two."""
    letters = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefgh"])}
    (tmp_path / "vocab.json").write_text(json.dumps(letters))
    words = tf.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))
    model = model_of("ctc", vocab_size=len(letters), pad_token_id=0)
    lay_out(tmp_path, model, ["q_proj", "v_proj"])
    audio_base(tmp_path / "base", "ctc", vocab_size=len(letters), pad_token_id=0)
    words.save_pretrained(tmp_path / "base")
    waves = [noise(0.1 + 0.05 * number, number) for number in range(3)]
    said = ["abba c", "h", "dd"]
    rows = []
    for number, wave in enumerate(waves):
        write_wave(tmp_path / "clips" / f"{number}.wav", wave)
        rows.append({"file_name": f"{number}.wav", "sentence": said[number]})
    lines(tmp_path / "clips" / "metadata.jsonl", rows)
    suite = suite_of(tmp_path, {"test": "clips", "metric": "cer", "generate": True}, batch_size=3)
    ((inputs, labels),) = suite.labelled("t", "test")
    decode = partial(words.decode, skip_special_tokens=True, group_tokens=False)
    assert sorted(decode(label[label >= 0]) for label in labels) == sorted(said)
    heard = suite.output("t", suite.model, inputs)
    extractor = tf.AutoFeatureExtractor.from_pretrained(tmp_path / "base")
    alone = []
    for wave in waves:
        logits = suite.model(**extractor(wave, sampling_rate=16_000, return_tensors="pt")).logits[0]
        # transformers' own decoding groups and drops blanks, in this order where special tokens stay.
        text = words.decode(logits.argmax(-1))
        alone.append(re.sub("<.*?>", "", text))
    assert sorted(decode(one[one >= 0]) for one in heard) == sorted(alone)
    with pytest.raises(ValueError, match="tasks.t.metric: expected wer or cer of a CTC model, found exact_match"):
        suite_of(tmp_path, {"test": "clips", "metric": "exact_match", "generate": True})
    with pytest.raises(ValueError, match="tasks.t.num_beams: CTC has a token of every frame; expected none"):
        suite_of(tmp_path, {"test": "clips", "metric": "cer", "generate": True, "num_beams": 4})


def test_frames_of_ctc_become_a_text():
    frames = torch.tensor([[5, 5, 0, 5, 6, 6, 0], [0, 7, 7, 7, 5, 5, 5]])
    model = type("TinyForCTC", (torch.nn.Module,), {"forward": lambda self, **batch: batch["out"]})()
    model.config = SimpleNamespace(pad_token_id=0, model_type="tiny")
    out = SimpleNamespace(logits=torch.nn.functional.one_hot(frames, 8).float())
    assert hears(model)
    assert CTCHead()(model, {"out": out}).tolist() == [[5, 5, 6], [7, 5, -100]]
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    assert CTCHead()(model, {"out": out, "attention_mask": mask}).tolist() == [[5, 5, 6], [7, -100, -100]]


def test_tensors_are_tensors_in_either_form(photos):
    by_hand(photos).rename(photos / "named.safetensors")
    held = load_file(photos / "named.safetensors")
    save_file({"pixel_values": held["pixel_values"], "kinds": held["labels"]}, photos / "named.safetensors")
    task = {"metric": "accuracy", "labels": "kinds"}
    plain = suite_of(photos, {"test": "named.safetensors", **task})
    mapped = suite_of(photos, {"test": {"source": "named.safetensors"}, **task})
    assert score(plain) == score(mapped)
