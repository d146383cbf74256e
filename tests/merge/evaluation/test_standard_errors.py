"""Standard errors of an evaluation's figures over its test samples."""

from __future__ import annotations

import csv
import json
import math
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import save_file
from zoo import KINDS, build, write_adapter

import nsc_merge
from nsc_merge.commands.main import main
from nsc_merge.evaluation.eval_recipe_reader import load_eval_recipe
from nsc_merge.evaluation.metrics import IGNORE, METRICS
from nsc_merge.evaluation.rows.standard_errors import GROUPS, standard_error, without_each
from nsc_merge.evaluation.scoring import predict
from nsc_merge.evaluation.suite import RecipeSuite


def suite_of(name):
    metric = METRICS[name]
    return SimpleNamespace(
        metric=lambda task: metric,
        measure=lambda task, *pair: metric.measure(*pair),
        quality=lambda task, *pair: metric.quality(*pair),
    )


def draw(name, count, seed):
    generator = torch.Generator().manual_seed(seed)
    if name == "accuracy":
        return torch.randn(count, 3, generator=generator), torch.randint(0, 3, (count,), generator=generator)
    if name == "exact_match":
        return tuple(torch.randint(0, 2, (count, 2), generator=generator) for _ in range(2))
    return tuple(torch.randn(count, generator=generator) for _ in range(2))


@pytest.mark.parametrize("name", ["accuracy", "l1", "exact_match"])
def test_that_of_a_mean_is_what_everybody_knows(name):
    """With as many samples as groups it is the deviation over the root of the number, to the digit."""
    outputs, labels = draw(name, GROUPS, 0)
    own = METRICS[name].quality(outputs, labels)
    expected = own.double().std().item() / math.sqrt(GROUPS)
    assert standard_error(without_each(suite_of(name), "t", outputs, labels)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.of_samples is not None])
def test_figures_of_samples_are_those_that_are_measured(name):
    """Of sequences of which not everything is asked, of some nothing."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (50, 4), generator=generator)
    outputs = torch.randn(50, 4, 3, generator=generator)
    if METRICS[name].writes:
        outputs = torch.randint(0, 3, (50, 4), generator=generator)
        given = {"decode": lambda tokens: " ".join(f"w{token}" for token in tokens)}
    else:
        labels[torch.rand(50, 4, generator=generator) < 0.5] = IGNORE
        labels[7] = IGNORE
        outputs += 2 * torch.nn.functional.one_hot(labels.clamp(min=0), 3)
        given = {}
    if name == "pairwise_accuracy":
        # Scores of texts, and which of them is preferred.
        outputs, labels = outputs[..., 0], torch.randint(0, 4, (50,), generator=generator)
    metric, counts = METRICS[name], (labels != IGNORE).reshape(50, -1).sum(1)
    found = metric.of_samples(metric.quality(outputs, labels, **given), counts)
    assert found == pytest.approx(metric.measure(outputs, labels, **given), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "variance"), [("accuracy", lambda n: (1 / 3) * (2 / 3) / n), ("rmse", lambda n: 2 / (2 * n) * 1.0)]
)
def test_it_is_how_far_the_figure_of_other_samples_lies_off(name, variance):
    """The mean of its square over many draws is the variance of the figure: of a guess among three, and of the root of
    a mean square, of errors of variance 2: (2 s^4 / n) / (4 s^2) = s^2 / 2n.
    """
    count = 200
    found = [standard_error(without_each(suite_of(name), "t", *draw(name, count, seed))) ** 2 for seed in range(200)]
    assert sum(found) / len(found) == pytest.approx(variance(count), rel=0.1)


def test_there_is_none_of_few_samples_or_where_a_rest_has_no_figure():
    assert without_each(suite_of("l1"), "t", *draw("l1", GROUPS - 1, 0)) == []
    outputs, labels = draw("l1", GROUPS, 0)
    assert without_each(suite_of("l1"), "t", outputs, labels.index_fill(0, torch.arange(1, GROUPS), math.nan)) == []
    assert without_each(suite_of("l1"), "t", outputs.fill_(math.inf), labels) == []
    # A group may hold all that is known, or all that differs.
    outputs, labels = draw("accuracy", 2 * GROUPS, 0)
    known = torch.arange(2 * GROUPS) % GROUPS == 3
    assert without_each(suite_of("accuracy"), "t", outputs, labels.masked_fill(~known, IGNORE)) == []
    assert len(without_each(suite_of("accuracy"), "t", outputs, labels.masked_fill(~known, 0))) == GROUPS
    assert without_each(suite_of("pearson"), "t", outputs[:, 0], known.float()) == []
    assert standard_error([]) is None


@pytest.mark.parametrize("name", ["miou", "f1", "matthews"])
def test_what_is_no_mean_over_samples_is_measured_without_each_group(name):
    outputs, labels = draw("accuracy", 3 * GROUPS, 0)
    rests = without_each(suite_of(name), "t", outputs, labels)
    kept = torch.arange(3 * GROUPS) % GROUPS != 7
    assert rests[7] == METRICS[name].measure(outputs[kept], labels[kept])
    assert len(rests) == GROUPS


def test_captions_are_left_out_in_full():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 9, (GROUPS, 4), generator=generator)
    outputs = torch.where(torch.rand(GROUPS, 4, generator=generator) > 0.3, labels, labels + 1)
    labels[3, 2:] = IGNORE
    rests = without_each(suite_of("cider"), "t", outputs, labels)
    kept = torch.arange(GROUPS) != 7
    assert rests[7] == METRICS["cider"].measure(outputs[kept], labels[kept])
    assert len(rests) == GROUPS


def test_errors_of_scores_and_averages_from_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base = build("llama-cls")
    base.save_pretrained(tmp_path / "base")
    tasks, count = {}, 2 * GROUPS
    for seed, task in enumerate(("nli", "topic"), 1):
        write_adapter(base, tmp_path / task, seed, r=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
        inputs = [KINDS["llama-cls"].inputs(100 * seed + number) for number in range(count // 3 + 1)]
        stacked = {name: torch.cat([one[name] for one in inputs])[:count] for name in inputs[0]}
        labels = torch.randint(0, 3, (count,), generator=torch.Generator().manual_seed(seed))
        save_file({**stacked, "labels": labels}, tmp_path / f"{task}.safetensors")
        tasks[task] = {"adapter": task, "test": f"{task}.safetensors", "metric": "accuracy"}
    rows = [{"method": "task_arithmetic", "name": "TA", "options": {"scale": 0.4}}]
    recipe = {"model": "base", "tasks": tasks, "methods": rows, "output": {"dir": "out", "plots": False}}
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["eval", str(tmp_path / "eval.yaml")]) == 0
    shown = capsys.readouterr().out
    (run,) = next(
        row["runs"] for row in json.loads((tmp_path / "out" / "results.json").read_text())["rows"] if row["row"] == "TA"
    )

    suite = RecipeSuite(load_eval_recipe(tmp_path / "eval.yaml").at(0))
    merges = {
        "TA": nsc_merge.merge(suite.model, suite.adapters, method="task_arithmetic", scale=0.4),
        "finetuned": nsc_merge.merge(suite.model, suite.adapters, method="finetuned"),
    }
    hits = {
        name: {task: (o.argmax(-1) == y).double() for task, (o, y) in predict(suite, merge, "test").items()}
        for name, merge in merges.items()
    }
    averages = []
    for group in range(GROUPS):
        kept = torch.arange(count) % GROUPS != group
        shares = {name: {task: right[kept].mean() for task, right in of.items()} for name, of in hits.items()}
        averages.append(sum(100 * float(shares["TA"][task] / shares["finetuned"][task]) for task in tasks) / 2)
    assert run["average_without_each"] == pytest.approx(averages)
    spread = torch.tensor(averages).double().var(correction=0) * (GROUPS - 1)
    assert run["average_stderr"] == pytest.approx(spread.sqrt().item())
    assert f"{run['average']:.2f} ± {run['average_stderr']:.2f}" in shown
    assert "average ± standard error over test samples" in shown
    lines = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    given = {line["task"]: float(line["stderr"]) for line in lines if line["row"] == "TA"}
    assert given == pytest.approx(run["stderr"])
    assert 0.03 < given["nli"] < 0.15

    # Over seeds the deviation is that between them.
    assert main(["eval", str(tmp_path / "eval.yaml"), "seeds=[0, 1]"]) == 0
    assert "standard error" not in capsys.readouterr().out
