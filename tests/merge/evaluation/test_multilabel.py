"""Samples of which several classes may be true are measured and distilled as such."""

from __future__ import annotations

import json
import math

import embedding_cases as cases
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
import yaml
import zoo
from peft import PeftModel
from safetensors.torch import save_file
from sklearn.metrics import f1_score

import nsc_merge
from nsc_merge.calibration.raw.inputs.labelled import classes_of
from nsc_merge.calibration.raw.labels import Labelling
from nsc_merge.commands.main import main
from nsc_merge.evaluation.metrics import METRICS
from nsc_merge.utils.yaml_text import from_yaml

NAMES = ["joy", "anger", "fear", "love"]
OUT = {"dir": "out", "plots": False}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A classifier of four classes, two adapters with heads of their own, and rows with lists of labels."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = tf.BertConfig(vocab_size=len(cases.words()), max_position_embeddings=48, initializer_range=0.5, **sizes)
    config.id2label, config.label2id = dict(enumerate(NAMES)), {name: n for n, name in enumerate(NAMES)}
    model = tf.BertForSequenceClassification(config)
    model.save_pretrained(tmp_path / "base")
    cases.words().save_pretrained(tmp_path / "base")
    head = {"modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}
    for seed, name in enumerate(("one", "two"), 1):
        zoo.write_adapter(model, tmp_path / name, seed, r=4, target_modules=["query", "value"], **head)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(24):
        true = (torch.rand(4, generator=generator) > 0.5).tolist()
        held = [name for name, one in zip(NAMES, true, strict=True) if one]
        rows.append({"text": f"w{number} w{number * 7 % 60} w{number % 11}", "labels": None if number == 5 else held})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def logits_of(place, name):
    """Of PEFT, one text at a time."""
    base = tf.BertForSequenceClassification.from_pretrained(place / "base")
    model = PeftModel.from_pretrained(base, place / name).eval()
    with torch.no_grad():
        asked = (cases.words()(row["text"], return_tensors="pt") for row in cases.rows_in(place / "rows.jsonl"))
        return torch.cat([model(**one).logits for one in asked])


def truth(place):
    rows = cases.rows_in(place / "rows.jsonl")
    known = [number for number, row in enumerate(rows) if row["labels"] is not None]
    return known, torch.tensor([[int(name in rows[number]["labels"]) for name in NAMES] for number in known])


@pytest.mark.parametrize("average", ["micro", "macro"])
@pytest.mark.parametrize("raw", [True, False])
def test_f1_is_that_of_scikit_learn(place, average, raw):
    known, labels = truth(place)
    test = "rows.jsonl"
    if not raw:
        texts = [cases.rows_in(place / "rows.jsonl")[number]["text"] for number in known]
        held = {**cases.words()(texts, padding=True, return_tensors="pt"), "labels": labels.float()}
        save_file({name: value.contiguous() for name, value in held.items()}, place / "rows.safetensors")
        test = "rows.safetensors"
    task = {"adapter": "one", "test": test, "metric": {"name": "multilabel_f1", "average": average}}
    recipe = {"model": "base", "tasks": {"one": task}, "methods": ["zero_shot"], "output": OUT}
    (place / "eval.yaml").write_text(yaml.safe_dump({**recipe, "batch_size": 5}))
    assert main(["eval", "eval.yaml"]) == 0
    rows = {row["row"]: row["runs"][0] for row in json.loads((place / "out/results.json").read_text())["rows"]}
    logits = logits_of(place, "one")[known]
    expected = f1_score(labels, (logits > 0).int(), average=average)
    assert rows["finetuned"]["metrics"]["one"] == pytest.approx(expected, abs=1e-6)
    loss = F.binary_cross_entropy_with_logits(logits, labels.float()).item()
    assert rows["finetuned"]["losses"]["one"] == pytest.approx(loss, rel=1e-5)


def test_a_first_evaluation_knows_lists_of_labels_and_rows_run(place):
    assert main(["init", "one", "two", "--base", "base", "--data", "rows.jsonl", "--test", "rows.jsonl"]) == 0
    recipe = from_yaml((place / "evaluation.yaml").read_text())
    assert [task["metric"] for task in recipe["tasks"].values()] == ["multilabel_f1", "multilabel_f1"]
    tasks = {name: {**task, "validation": "rows.jsonl"} for name, task in recipe["tasks"].items()}
    options = {"distill": {"steps": 2}, "fisher": {"exact": 1}, "ensemble": {}}
    methods = [{"method": name, "options": given} for name, given in options.items()]
    recipe |= {"tasks": tasks, "methods": methods, "output": OUT}
    (place / "evaluation.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["eval", "evaluation.yaml"]) == 0
    rows = json.loads((place / "out/results.json").read_text())["rows"]
    assert [row["row"] for row in rows] == ["zero_shot", "finetuned", "distill", "fisher", "ensemble"]


def test_methods_of_one_class_are_refused(place, capsys):
    task = {"adapter": "one", "test": "rows.jsonl", "validation": "rows.jsonl", "metric": "multilabel_f1"}
    recipe = {"model": "base", "tasks": {"one": task}, "methods": ["adamerging"], "output": OUT}
    (place / "eval.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["eval", "eval.yaml"]) == 1
    assert "tasks.one: several of its classes may be true, and adamerging is of outputs" in capsys.readouterr().err


@pytest.mark.parametrize("metric", ["multilabel_f1", "accuracy"])
def test_names_of_some_classes_are_refused(place, capsys, metric):
    (place / "one.jsonl").write_text('{"text": "w1", "label": "joy"}')
    test = "rows.jsonl" if metric == "multilabel_f1" else "one.jsonl"
    task = {"adapter": "one", "test": test, "metric": metric, "classes": NAMES[:3]}
    recipe = {"model": "base", "tasks": {"one": task}, "methods": ["zero_shot"], "output": OUT}
    (place / "eval.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["eval", "eval.yaml"]) == 1
    said = "tasks.one.classes: expected 4 names, as the head of 'one' has classes, found 3"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("distance", ["bounded", "divergence"])
def test_distill_compares_every_class_by_itself(place, distance):
    texts = [row["text"] for row in cases.rows_in(place / "rows.jsonl")]
    batch = dict(cases.words()(texts, padding=True, return_tensors="pt"))
    model = tf.BertForSequenceClassification.from_pretrained(place / "base").eval()
    options = {"likelihood": "bernoulli", "distance": distance, "steps": 1, "init": 0.0, "normalise": "none"}
    found = nsc_merge.merge(model, {"one": place / "one"}, {"one": [batch]}, "distill", **options).history[0]
    own = logits_of(place, "one").double()
    adapter = nsc_merge.load_adapter(place / "one", "one")
    with torch.no_grad():
        # The base under the task's head.
        model.classifier.load_state_dict({name.rpartition(".")[2]: value for name, value in adapter.trained.items()})
        base = model(**batch).logits.double()
    p, q = base.sigmoid(), own.sigmoid()
    each = (p - q).abs() if distance == "bounded" else q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    assert found["objective"] == pytest.approx(each.mean().item(), rel=1e-4)


@pytest.mark.parametrize("method", ["distill", "adamerging", "fisher"])
def test_a_base_that_says_so_is_not_taken_for_one_of_one_class(place, method):
    model = tf.BertForSequenceClassification.from_pretrained(place / "base").eval()
    model.config.problem_type = "multi_label_classification"
    batch = dict(cases.words()(["w1 w2"], return_tensors="pt"))
    with pytest.raises(ValueError, match=r"\(multi_label_classification\) several classes of a sample of 'one' may be"):
        nsc_merge.merge(model, {"one": place / "one"}, {"one": [batch]}, method)
    options = {"steps": 1, "likelihood": "bernoulli"} if method == "distill" else {}
    if method == "distill":
        nsc_merge.merge(model, {"one": place / "one"}, {"one": [batch]}, method, **options)


@pytest.mark.parametrize(
    ("label", "names", "expected"),
    [
        (["joy", "love"], NAMES, [1, 0, 0, 1]),
        ("fear", NAMES, [0, 0, 1, 0]),
        ([], NAMES, [0, 0, 0, 0]),
        ([0, 3], [], [1, 0, 0, 1]),
        ([1, 0, 1, 0], NAMES, [1, 0, 1, 0]),
        ([True, False, False, True], [], [1, 0, 0, 1]),
        ([0.0, 1.0], ["a", "b"], [0, 1]),
        ([True, False], [], [1, 0]),
        (["1", "0"], ["0", "1"], [1, 1]),
    ],
)
def test_classes_are_names_numbers_or_one_flag_each(label, names, expected):
    count = len(expected)
    found = classes_of(label, Labelling("classes", None, names, count), "row 1")
    assert found.tolist() == [float(one) for one in expected]
    assert classes_of(None, Labelling("classes", None, names, count), "row 1").isnan().all()


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (["joy", "hate"], "row 1: expected a class of .*, or its number, found 'hate'"),
        (["joy", None], "row 1: expected classes, or null for all of them"),
        ([0, 4], "row 1: expected a class of"),
    ],
)
def test_labels_that_are_no_classes_are_refused(label, message):
    with pytest.raises(ValueError, match=message):
        classes_of(label, Labelling("classes", None, NAMES, 4), "row 1")


def test_what_may_be_either_is_refused():
    with pytest.raises(ValueError, match=r"\[0, 1\] may be both classes by number, or whether each is true"):
        classes_of([0, 1], Labelling("classes", None, ["a", "b"], 2), "row 1")
    with pytest.raises(ValueError, match="how many classes there are is not known"):
        classes_of([0, 1], Labelling("classes"), "row 1")


def test_a_sample_has_the_f1_of_its_classes():
    outputs = torch.tensor([[1.0, -1, 1], [-1, -1, -1], [1, 1, 1], [-1, -1, -1], [math.nan, 1, -1]])
    labels = torch.tensor([[1.0, 0, 0], [0, 0, 0], [math.nan] * 3, [0, 1, 0], [1, 1, math.nan]])
    found = METRICS["multilabel_f1"].quality(outputs, labels)
    expected = [2 / 3, 1.0, math.nan, 0.0, 2 / 3]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), equal_nan=True)
    with pytest.raises(ValueError, match="labels: expected 0, 1 or NaN, found 2"):
        METRICS["multilabel_f1"].measure(outputs, labels + 1)
    with pytest.raises(ValueError, match=r"expected logits and labels \[N, C\], found \[5, 3\] and \[5, 2\]"):
        METRICS["multilabel_f1"].measure(outputs, labels[:, :2])
