"""Evaluations that are refused, or of which a row is."""

from __future__ import annotations

import json

import pytest
import torch
from eval_cases import change, rows
from safetensors.torch import load_file, save_file
from zoo import build, write_adapter

from nsc_merge.commands.main import main


@pytest.mark.parametrize(("by", "word"), [("loss", "loss"), ("metric", "scores 0 or less")])
def test_a_scale_is_not_chosen_where_there_is_nothing_to_choose_by(place, capsys, by, word):
    """A head whose outputs overflow has no loss at any scale."""
    for split in ("test", "val"):
        file = place / "data" / f"topic-{split}.safetensors"
        save_file({**load_file(file), "labels": torch.rand(12)}, file)
    save_file({"weight": torch.full((1, 32), 3e38)}, place / "value.safetensors")
    head = [f"tasks.topic.head={place / 'value.safetensors'}", "tasks.topic.pool=mean", "tasks.topic.metric=rmse"]
    change(place, methods=["task_arithmetic", {"method": "ties", "tune": by}], joint=False)
    assert main(["eval", str(place / "eval.yaml"), *head]) == 1
    shown = capsys.readouterr()
    assert "ties, seed 0: tune: " in shown.err
    assert word in shown.err
    assert "ties" not in shown.out


@pytest.mark.parametrize("kind", ["same file", "copy in another order", "part", "more"])
def test_a_scale_is_not_chosen_on_the_data_that_are_reported(place, capsys, kind):
    test = load_file(place / "data" / "nli-test.safetensors")
    if kind == "same file":
        overrides = [f"tasks.nli.validation={place / 'data' / 'nli-test.safetensors'}"]
    else:
        order = torch.arange(12).flip(0) if kind == "copy in another order" else torch.arange(0, 12, 3)
        leak = {name: value[order] for name, value in test.items()}
        if kind == "more":
            others = load_file(place / "data" / "nli-val.safetensors")
            leak = {name: torch.cat([test[name], others[name]]) for name in test}
        save_file(leak, place / "leak.safetensors")
        overrides = [f"tasks.nli.validation={place / 'leak.safetensors'}"]
    assert main(["eval", str(place / "eval.yaml"), *overrides]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "tasks.nli.validation: tune needs data beside those that are measured" in line
    assert not (place / "out").exists()
    # Inputs without their labels are no tuning.
    assert main(["eval", str(place / "eval.yaml"), *overrides, "methods=[{method: nsc, options: {steps: 1}}]"]) == 0
    assert "test samples" not in capsys.readouterr().err


def test_samples_of_both_splits_are_told(place, capsys):
    test, val = (load_file(place / "data" / f"nli-{split}.safetensors") for split in ("test", "val"))
    both = {name: torch.cat([val[name][:6], test[name][:5]]) for name in test}
    save_file(both, place / "data" / "nli-val.safetensors")
    assert main(["eval", str(place / "eval.yaml"), "methods=[{method: task_arithmetic, tune: loss}]"]) == 0
    assert "tasks.nli: 5 of 12 test samples are in validation, too" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=1"], "task: no such key; did you mean tasks?"),
        (["tasks=null"], "tasks: expected at least one task"),
        (["tasks.nli=3"], "tasks.nli: expected keys and values, found 3"),
        (["tasks.nli.metric=meteor"], "tasks.nli.metric: expected one of ['accuracy', 'miou', 'f1'"),
        (["tasks.nli.metric={name: accuracy, tolerance: 2}"], "tasks.nli.metric.tolerance: not an option"),
        (["tasks.nli.metric=cider"], "tasks.nli.generate: metric cider needs true, found false"),
        (["tasks.nli.generate=true"], "tasks.nli.metric: a task that generates has exact_match or one of ['cider'"),
        (["tasks.nli.adapter=nowhere"], "tasks.nli.adapter: expected a PEFT folder"),
        (["tasks.nli.test=nowhere"], "tasks.nli.test: expected a safetensors file or a folder of them"),
        (["tasks.nli.test=pairs.jsonl"], "tasks.nli.test: expected a file or folder of raw data, or of inputs in saf"),
        (["tasks.nli.head=nowhere"], "tasks.nli.head: expected a safetensors file"),
        (["tasks.nli.pool=max"], "tasks.nli.pool: expected one of ['mean', 'first'"),
        (["tasks.nli.lables=y"], "tasks.nli.lables: no such key; did you mean tasks.nli.labels?"),
        (["methods=[]"], "methods: expected a list of methods or folders"),
        (["methods=[magic]"], "methods[0].method: expected one of"),
        (
            ["methods=[{method: nsc, options: {stepz: 1}}]"],
            "methods[0].options.stepz: not an option of method 'nsc'",
        ),
        (["methods=[{method: nsc, tune: loss}]"], "methods[0].tune: method 'nsc' has no scale to tune"),
        (
            ["methods=[{method: task_arithmetic, tune: labels}]"],
            "methods[0].tune.by: expected one of ['metric', 'loss']",
        ),
        (
            ["methods=[{method: task_arithmetic, tune: loss, options: {scale: 1}}]"],
            "options.scale is given, too",
        ),
        (["methods=[nsc, nsc]"], "methods: two rows are called 'nsc'"),
        (["methods=[{folder: nowhere}]"], "methods.nowhere.folder: expected a folder"),
        (["methods=[{folder: base, method: nsc}]"], "methods[0]: expected either a method or a folder"),
        (
            ["methods=[nsc]", "tasks.nli.validation=null"],
            "tasks.nli.calibration: methods[0] (nsc) needs inputs",
        ),
        (
            ["tasks.nli.validation=null"],
            "tasks.nli.validation: methods[1] (task_arithmetic) needs it, found none",
        ),
        (["joint=yes please"], "joint: expected one of ['logits', 'probabilities']"),
        (
            ["joint=logits", "tasks.nli.metric=exact_match"],
            "joint: expected at least two tasks of metric accuracy",
        ),
        (["seeds=3"], "seeds: expected a list of different whole numbers, found 3"),
        (["lm_eval.batch_size=2"], "lm_eval: no task is measured by it; expected the key lm_eval in some of tasks"),
        (["output.plots=maybe"], "output.plots: expected true or false"),
        (["output=null"], "output.dir: expected text"),
        (["model=nowhere"], "model: expected a folder or a hub id"),
    ],
)
def test_wrong_recipes_give_one_line_and_status_2(place, monkeypatch, capsys, overrides, message):
    monkeypatch.chdir(place)
    assert main(["eval", "eval.yaml", *overrides]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no labels", "tasks.nli.test: expected a tensor 'labels'"),
        ("wrong input", "tasks.nli.test: LlamaForSequenceClassification takes no input ['pixels']"),
        ("float labels", "tasks.nli: labels: expected class indices as integers, found torch.float32"),
        ("other tokenizer", "tasks.nli.test: expected tokens from 0 to 63 in input_ids"),
        ("mask of floats", "tokens from 0 to 63 in input_ids, which LlamaForSequenceClassification has, found 64;"),
        ("labels for tokens", "which LlamaForSequenceClassification has, found -100; expected text encoded by"),
        ("float tokens", "which LlamaForSequenceClassification has, found torch.float32; expected whole numbers"),
        ("no samples", "nli-test.safetensors: expected a row for every sample, found none: {"),
        ("unknown labels", "tasks.nli: labels: expected at least one known label, found none"),
        ("no head", "tasks.nli.head: the adapter brought no head"),
        ("head of another width", "no pool"),
    ],
)
def test_data_that_do_not_fit_give_one_line_and_write_nothing(place, capsys, kind, message):
    file = place / "data" / "nli-test.safetensors"
    data = load_file(file)
    overrides = []
    if kind == "no labels":
        del data["labels"]
    elif kind == "wrong input":
        data["pixels"] = data.pop("attention_mask")
    elif kind == "float labels":
        data["labels"] = data["labels"].float()
    elif kind == "other tokenizer":
        data["input_ids"][3, 1] = 64
    elif kind == "mask of floats":
        data["input_ids"][3, 1] = 64
        data["attention_mask"] = data["attention_mask"].float()
    elif kind == "labels for tokens":
        data["input_ids"][3, 1] = -100
    elif kind == "float tokens":
        data["input_ids"] = data["input_ids"].float()
    elif kind == "no samples":
        data = {name: value[:0] for name, value in data.items()}
    elif kind == "unknown labels":
        data["labels"] = torch.full((12,), -100)
    elif kind == "no head":
        write_adapter(build("llama-cls"), place / "adapters" / "bare", 1, r=2, target_modules=["q_proj"])
        overrides = [f"tasks.nli.adapter={place / 'adapters' / 'bare'}", "tasks.nli.head=adapter"]
    else:
        overrides = ["tasks.nli.pool=first"]
    save_file(data, file)
    assert main(["eval", str(place / "eval.yaml"), "methods=[task_arithmetic]", *overrides]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("nsc-merge: error: ")
    assert message in line
    assert not (place / "out" / "results.json").exists()


def test_a_row_that_fails_costs_no_other(place, capsys):
    lines = [
        "task_arithmetic",
        {"method": "task_arithmetic", "name": "odd", "options": {"scale": {"nli": 0.3}}},
        {"folder": "other", "name": "of fewer tokens"},
        {"folder": "unpadded", "name": "unpadded"},
    ]
    change(place, methods=lines)
    other = build("llama-cls")
    other.config.pad_token_id = None
    other.save_pretrained(place / "unpadded")
    other = build("llama-cls")
    other.resize_token_embeddings(8)
    other.save_pretrained(place / "other")
    assert main(["eval", str(place / "eval.yaml"), "output.plots=false"]) == 1
    shown = capsys.readouterr()
    assert "odd, seed 0: scale: expected one value for each of ['nli', 'topic'], found ['nli']" in shown.err
    assert "of fewer tokens, seed 0: tasks.nli: in a forward of attention_mask [5, 7]" in shown.err
    assert "; expected tokens that the model has" in shown.err
    assert "no padding token is defined; expected pad_token_id in the base's config.json, of the token" in shown.err
    found = rows(json.loads((place / "out" / "results.json").read_text()))
    assert list(found) == ["zero_shot", "finetuned", "task_arithmetic"]


@pytest.mark.parametrize("command", [["eval"], ["analyse", "quartiles", "--row", "finetuned"]])
def test_inputs_that_the_model_refuses_are_told_with_the_task_and_their_shapes(place, capsys, command):
    file = place / "data" / "topic-test.safetensors"
    save_file({**load_file(file), "position_ids": torch.zeros(12, 3, dtype=torch.long)}, file)
    assert main([*command, str(place / "eval.yaml"), "tasks.topic.validation=null", "methods=[task_arithmetic]"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("nsc-merge: error: tasks.topic: in a forward of attention_mask [5, 7], input_ids [5, 7], ")
    assert "position_ids [5, 3]: The size of tensor a" in line
