"""Null-space ratios per sample, against quality."""

from __future__ import annotations

import json
import math

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from zoo import KINDS, build, write_adapter

import nsc_merge
from nsc_merge.analysis import by_quantile, per_sample_ratios, sample_study
from nsc_merge.analysis.null_space_ratios import Ratios
from nsc_merge.analysis.quartiles import related
from nsc_merge.analysis.rank_correlation import rank_correlation
from nsc_merge.commands.main import main
from nsc_merge.evaluation.metrics import METRICS


def test_quartiles_by_hand():
    ratios = torch.tensor([0.1, 0.8, 0.2, 0.7, 0.3, 0.6, 0.4, 0.5])
    quality = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0])
    found = by_quantile(ratios, quality)
    assert found["mean"] == [1.0, 0.5, 0.5, 0.0]
    assert found["count"] == [2, 2, 2, 2]
    assert found["ratio"] == pytest.approx([0.15, 0.35, 0.55, 0.75])
    assert found["error"] == pytest.approx([0, 0.5, 0.5, 0])
    assert found["rho"] == pytest.approx(rank_correlation(ratios.tolist(), quality.tolist()))
    assert found["rho"] < 0
    with pytest.raises(ValueError, match="bins: expected at least two samples in each, found 8 for 5"):
        by_quantile(ratios, quality, 5)
    with pytest.raises(ValueError, match=r"quality: expected \[N\]"):
        by_quantile(ratios, quality[:4])


def test_the_other_adapters_are_told_by_their_mean_over_samples_of_a_known_quality():
    quality = torch.tensor([4.0, 3.0, 2.0, 1.0, math.nan])
    columns = [[1.0, 2.0, 3.0, 4.0, 0.0], [4.0, 3.0, 2.0, 1.0, 9.0], [2.0, 1.0, 3.0, 4.0, 9.0]]
    ratios = Ratios(torch.tensor(columns).t()[:, None], ["q"], ["own", "other", "third"])
    found = related(ratios, quality, "own", bins=2)
    # Of the third one pair of four is in another order: 1 - 6 * 2 / (4 * 15).
    assert (found["rho"], found["samples"]) == (pytest.approx(-1), 4)
    assert found["rho_others"] == pytest.approx((1 - 0.8) / 2)
    alone = Ratios(ratios.values[..., :1], ["q"], ["own"])
    assert related(alone, quality, "own", bins=2)["rho_others"] is None


def test_rank_correlation_by_hand():
    assert rank_correlation([1, 2, 3], [10, 20, 15]) == pytest.approx(0.5)
    assert rank_correlation([1, 2, 2, 3], [1, 2, 2, 3]) == pytest.approx(1.0)
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
    assert math.isnan(rank_correlation([1, 2], [1, 2]))
    with pytest.raises(ValueError, match="second: expected 2 values"):
        rank_correlation([1, 2], [1])


@pytest.fixture
def recipe(tmp_path):
    base = build("llama-cls")
    base.save_pretrained(tmp_path / "base")
    tasks = {}
    for seed, task in enumerate(("nli", "topic"), 1):
        write_adapter(
            base, tmp_path / task, seed, r=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS"
        )
        inputs = [KINDS["llama-cls"].inputs(10 * seed + i) for i in range(4)]
        stacked = {name: torch.cat([one[name] for one in inputs]) for name in inputs[0]}
        stacked["labels"] = torch.randint(0, 3, (12,), generator=torch.Generator().manual_seed(seed))
        save_file(stacked, tmp_path / f"{task}.safetensors")
        tasks[task] = {"adapter": task, "test": f"{task}.safetensors", "metric": "accuracy"}
    methods = [
        {"method": "task_arithmetic", "name": "TA 0.4", "options": {"scale": 0.4}},
        {"folder": "merged", "name": "saved"},
        "ensemble",
    ]
    adapters = {task: tmp_path / task for task in tasks}
    nsc_merge.merge(base, adapters, method="task_arithmetic", scale=0.4).save(tmp_path / "merged", "model")
    document = {"model": "base", "tasks": tasks, "methods": methods, "output": {"dir": "out"}}
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(document))
    return tmp_path


@pytest.mark.parametrize("row", ["finetuned", "TA 0.4"])
def test_quartiles_on_the_command_line(recipe, capsys, row):
    arguments = ["analyse", "quartiles", str(recipe / "eval.yaml"), "--modules", "v_proj", "--bins", "3", "--row", row]
    assert main([*arguments, "--out", str(recipe / "out"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (recipe / "out" / "quartiles.png").stat().st_size > 5_000
    for task in ("nli", "topic"):
        model = type(build("llama-cls")).from_pretrained(recipe / "base").eval()
        chosen = {name: recipe / name for name in ([task] if row == "finetuned" else ["nli", "topic"])}
        scale = 1.0 if row == "finetuned" else 0.4
        result = nsc_merge.merge(model, chosen, method="task_arithmetic", scale=scale)
        data = load_file(recipe / f"{task}.safetensors")
        labels = data.pop("labels")
        ratios = per_sample_ratios(model, result, [data], modules=["v_proj"]).of(task)
        result.apply(model)
        with torch.no_grad():
            model.score.weight.copy_(result.adapters[task].trained["score.weight"])
            quality = METRICS["accuracy"].quality(model(**data).logits, labels)
        expected = by_quantile(ratios, quality, 3)
        for key in ("rho", "mean", "ratio"):
            assert document["tasks"][task][key] == pytest.approx(expected[key], rel=1e-4)
        assert document["tasks"][task]["samples"] == 12
        assert document["tasks"][task]["rho_others"] is not None


def test_quartiles_of_a_folder_that_says_what_was_merged(recipe, capsys):
    base = type(build("llama-cls")).from_pretrained(recipe / "base")
    adapters = {task: recipe / task for task in ("nli", "topic")}
    nsc_merge.merge(base, adapters, method="task_arithmetic", scale=0.4).save(recipe / "ta", ["coefficients", "lora"])
    arguments = ["analyse", "quartiles", str(recipe / "eval.yaml"), "--json", "--bins", "3"]
    assert main([*arguments, "--row", "TA 0.4"]) == 0
    found = [json.loads(capsys.readouterr().out)]
    assert main([*arguments, f"methods=[{{folder: {recipe / 'ta'}}}]", "--row", "ta"]) == 0
    found.append(json.loads(capsys.readouterr().out))
    assert found[0]["tasks"] == found[1]["tasks"]


def test_wrong_rows_and_tasks_give_one_line(recipe, capsys):
    for wrong, message in (
        (["--row", "TA"], "--row: expected one of ['zero_shot', 'finetuned', 'TA 0.4', 'saved', 'ensemble']"),
        (["--row", "saved"], "does not say what was merged"),
        (["--row", "ensemble"], "--row: an ensemble is no single model"),
        (["--tasks", "nlp"], "--tasks: expected some of ['nli', 'topic'], found 'nlp'"),
    ):
        assert main(["analyse", "quartiles", str(recipe / "eval.yaml"), *wrong]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_suite_made_in_python_is_studied_too(llama):
    """All that is asked of a suite is its data, its heads and its measures."""
    model, adapters, batches = llama

    class Suite:
        tasks = dict.fromkeys(adapters)

        def labelled(self, task, split):
            return [(batch, batch["input_ids"][:, -1]) for batch in batches]

        def output(self, task, model, batch):
            return model(**batch).logits[:, -1]

        def loss(self, task, output, label):
            return None

        def measure(self, task, outputs, labels):
            return METRICS["accuracy"].measure(outputs, labels)

        def quality(self, task, outputs, labels):
            return -torch.nn.functional.cross_entropy(outputs, labels, reduction="none")

    suite = Suite()
    suite.model = model
    result = nsc_merge.merge(model, adapters, method="task_arithmetic", scale=0.4)
    found = sample_study(suite, result, ["b"], bins=2)
    assert list(found) == ["b"]
    assert found["b"]["count"] == [3, 3]
