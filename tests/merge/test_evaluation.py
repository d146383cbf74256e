"""Metrics against figures by hand, normalisation, the union of tasks, and evaluation recipes from end to end."""

from __future__ import annotations

import copy
import csv
import functools
import json
import math
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn
from zoo import KINDS, build, write_adapter

import nsc_merge
from nsc_merge.cli import main
from nsc_merge.evaluation import captions, heads, metrics
from nsc_merge.evaluation.joint import Union, hits
from nsc_merge.evaluation.measure import applied, joint_hits, predict
from nsc_merge.evaluation.normalise import average, normalised, over_seeds
from nsc_merge.evaluation.recipe import load_eval_recipe
from nsc_merge.evaluation.run import candidate_of
from nsc_merge.evaluation.suite import RecipeSuite

METRICS = metrics.METRICS


def logits(predicted, classes):
    return nn.functional.one_hot(torch.tensor(predicted), classes).float()


# Metrics


def test_accuracy_by_hand():
    outputs, labels = logits([0, 2, 1, 1], 3), torch.tensor([0, 1, 1, metrics.IGNORE])
    assert metrics.accuracy(outputs, labels) == pytest.approx(2 / 3)
    per_sample = metrics.accuracy_per_sample(outputs[:3], labels[:3])
    assert per_sample.tolist() == [1, 0, 1]


def test_mean_iou_by_hand():
    # Class 0: 2 of 3 pixels in common; class 1: 1 of 3; class 2 neither occurs nor is predicted.
    outputs = logits([[0, 0, 1, 1]], 3)
    labels = torch.tensor([[0, 0, 0, 1]])
    assert metrics.mean_iou(outputs, labels) == pytest.approx((2 / 3 + 1 / 2) / 2)
    two = torch.cat([outputs, logits([[1, 1, 1, 1]], 3)]), torch.cat([labels, torch.tensor([[1, 1, 1, 1]])])
    assert metrics.mean_iou_per_sample(*two).tolist() == pytest.approx([(2 / 3 + 1 / 2) / 2, 1.0])
    # Together: class 0 2/3, class 1 5/6; an unknown pixel counts nowhere.
    assert metrics.mean_iou(*two) == pytest.approx((2 / 3 + 5 / 6) / 2)
    ignored = torch.tensor([[0, 0, metrics.IGNORE, 1]])
    assert metrics.mean_iou(outputs, ignored) == 1.0


def test_errors_by_hand():
    outputs, labels = torch.tensor([[1.0, 5.0], [2.0, 2.0]]), torch.tensor([[2.0, 2.0], [2.0, math.nan]])
    assert metrics.rmse(outputs, labels) == pytest.approx(math.sqrt(10 / 3))
    assert metrics.l1(outputs[..., None], labels) == pytest.approx(4 / 3)
    assert METRICS["rmse"].quality(outputs, labels).tolist() == pytest.approx([-math.sqrt(5), 0])
    assert METRICS["l1"].quality(outputs, labels).tolist() == pytest.approx([-2, 0])
    assert float(METRICS["rmse"].loss(outputs, labels)) == pytest.approx(10 / 3)


def test_mean_angle_by_hand():
    outputs = torch.tensor([[[2.0, 0.0], [3.0, 3.0]], [[0.0, -1.0], [1.0, 0.0]]])
    labels = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [math.nan, 0.0]]])
    assert metrics.mean_angle(outputs, labels) == pytest.approx((0 + 45 + 180) / 3, rel=1e-5)
    assert METRICS["mean_angle"].quality(outputs, labels).tolist() == pytest.approx([-22.5, -180])
    assert float(metrics.cosine_loss(outputs, labels)) == pytest.approx((0 + 1 - math.sqrt(0.5) + 2) / 3)


def test_edge_f_by_hand():
    truth = torch.zeros(1, 5, 5)
    truth[0, :, 2] = 1
    scores = torch.zeros(1, 5, 5)
    scores[0, :, 3], scores[0, 0, 0] = 0.9, 0.6
    # Above 0.6 only the column beside the edge is predicted: right within one pixel, wrong within none.
    assert metrics.edge_f(scores, truth) == pytest.approx(1.0)
    assert metrics.edge_f(scores, truth, tolerance=0) == 0
    # With the stray pixel, precision is 5/6 and recall 1.
    assert metrics.edge_f(scores, truth, thresholds=1) == pytest.approx(2 * (5 / 6) / (5 / 6 + 1))
    assert metrics.edge_f(10 * (scores - 0.5), truth, logits=True, thresholds=1) == pytest.approx(10 / 11)
    blank = torch.cat([scores, torch.zeros(1, 5, 5)]), torch.cat([truth, truth])
    assert metrics.edge_f_per_sample(*blank).tolist() == pytest.approx([1.0, 0.0])


def test_exact_match_by_hand():
    labels = torch.tensor([[1, 2, metrics.IGNORE], [1, 2, 0]])
    tokens = torch.tensor([[1, 2, 7], [1, 0, 0]])
    assert metrics.exact_match_per_sample(tokens, labels).tolist() == [1, 0]
    assert metrics.exact_match(logits([[1, 2, 0], [1, 2, 0]], 3), labels) == 1


def test_cider_by_hand():
    references = [["a cat sat"], ["a dog ran", "the dog ran"]]
    assert captions.cider(["A cat sat.", "a dog ran"], references) < 1
    # "a" is in both samples and weighs nothing. Length 1: cat and sat weigh alike, so that the cosine of "cat" with
    # them is sqrt(1/2); no longer n-gram occurs.
    scores = captions.cider_per_sample(["cat", "the dog ran"], [["a cat sat"], ["a dog ran"]])
    assert scores[0] == pytest.approx(math.sqrt(0.5) / 4)
    # the, dog, ran against dog, ran: sqrt(2/3). Of "the dog", "dog ran" against "a dog", "dog ran": 1/2.
    assert scores[1] == pytest.approx((math.sqrt(2 / 3) + 1 / 2) / 4)
    # A caption that is its own reference: 1 for every length up to its own.
    same = captions.cider_per_sample(
        ["one two three four five", "six"], [["one two three four five"], ["six"]]
    )
    assert same == pytest.approx([1.0, 0.25])


def test_cider_of_tokens_is_that_of_words():
    outputs = torch.tensor([[3, metrics.IGNORE, metrics.IGNORE], [5, 6, 7]])
    labels = torch.tensor([[1, 3, 4], [1, 6, 7]])
    words = captions.cider_per_sample(["cat", "the dog ran"], [["a cat sat"], ["a dog ran"]])
    assert METRICS["cider"].quality(outputs, labels).tolist() == pytest.approx(words)
    several = labels[:, None].repeat(1, 2, 1)
    several[:, 1] = metrics.IGNORE
    assert METRICS["cider"].measure(outputs, several) == pytest.approx(sum(words) / 2)


@pytest.mark.parametrize("name", METRICS)
def test_quality_and_metric_agree_in_direction(name):
    """A perfect prediction is the best there is, overall and for every sample."""
    metric = METRICS[name]
    generator = torch.Generator().manual_seed(0)
    if name in ("accuracy", "miou"):
        labels = torch.randint(0, 3, (4, 6), generator=generator)
        good, bad = logits(labels.tolist(), 3), logits(((labels + 1) % 3).tolist(), 3)
    elif name in ("exact_match", "cider"):
        labels = torch.randint(0, 30, (4, 6), generator=generator)
        good, bad = labels, labels + 1
    elif name == "mean_angle":
        labels = nn.functional.normalize(torch.randn(4, 6, 3, generator=generator), dim=-1)
        good, bad = labels, -labels
    else:
        labels = (torch.rand(4, 6, 6, generator=generator) > 0.7).float()
        good, bad = labels, 1 - labels
    assert (metric.measure(good, labels) < metric.measure(bad, labels)) == metric.lower_is_better
    quality, worse = metric.quality(good, labels), metric.quality(bad, labels)
    assert quality.shape == (4,)
    assert (quality >= worse).all()
    assert quality.mean() > worse.mean()
    if metric.loss is not None and good.is_floating_point():
        assert metric.loss(good, labels) < metric.loss(bad, labels)


@pytest.mark.parametrize(
    ("name", "outputs", "labels", "error", "words"),
    [
        ("accuracy", torch.zeros(2, 3), torch.zeros(2), TypeError, "labels: expected class indices"),
        ("accuracy", torch.zeros(2, 3).long(), torch.zeros(2).long(), TypeError, "outputs: expected logits"),
        ("accuracy", torch.zeros(3), torch.zeros(3).long(), ValueError, r"expected logits \[N, ..., C\]"),
        (
            "miou",
            torch.zeros(2, 3),
            torch.tensor([0, 3]),
            ValueError,
            "classes from 0 to 2 .or -100., found 3",
        ),
        ("miou", torch.zeros(1, 3), torch.tensor([-100]), ValueError, "at least one known label"),
        (
            "rmse",
            torch.zeros(2, 3),
            torch.zeros(2),
            ValueError,
            r"expected \[2\] or \[2, 1\].*found \[2, 3\]",
        ),
        ("l1", torch.zeros(2), torch.zeros(2).long(), TypeError, "labels: expected floating point"),
        ("l1", torch.zeros(2), torch.full((2,), math.nan), ValueError, "at least one known label"),
        ("mean_angle", torch.zeros(2), torch.zeros(2), ValueError, r"expected vectors \[N, ..., D\]"),
        ("edge_f", torch.zeros(2, 3, 3), torch.zeros(2, 3, 3), ValueError, "at least one edge pixel"),
        ("edge_f", torch.zeros(2, 3), torch.ones(2, 3), ValueError, r"expected edge maps \[N, H, W\]"),
        ("cider", torch.zeros(2, 3), torch.zeros(2, 3).long(), TypeError, "expected tokens as integers"),
        ("cider", torch.ones(1, 3).long(), torch.ones(1, 3).long(), ValueError, "at least two samples"),
    ],
)
def test_wrong_outputs_are_refused_by_name(name, outputs, labels, error, words):
    with pytest.raises(error, match=words):
        METRICS[name].measure(outputs, labels)


def test_metrics_take_only_their_own_options():
    with pytest.raises(ValueError, match=r"tolerance: not an option of metric 'rmse' \(options: none\)"):
        METRICS["rmse"].with_options(tolerance=2)
    assert METRICS["edge_f"].with_options(tolerance=2).settings == {"tolerance": 2}
    with pytest.raises(ValueError, match="tolerance: expected a whole number of at least 0"):
        METRICS["edge_f"].with_options(tolerance=-1).measure(torch.ones(1, 2, 2), torch.ones(1, 2, 2))


# Summary


def test_normalised_by_hand():
    assert normalised(0.4, 0.5, False) == pytest.approx(80)
    assert normalised(0.5, 0.4, True) == pytest.approx(80)
    assert math.isnan(normalised(0.4, 0.0, False))
    assert average({"a": 80.0, "b": 120.0}) == 100
    spread = over_seeds([79.0, 80.0, 81.0])
    assert (spread.mean, spread.std, spread.count, str(spread)) == (80, 1, 3, "80.00 ± 1.00")
    assert str(over_seeds([3.0])) == "3.00"


def test_the_union_of_tasks_by_hand():
    union = Union.of({"a": 2, "b": 3}, None)
    assert (union.size, union.columns) == (5, {"a": [0, 1], "b": [2, 3, 4]})
    named = Union.of({"a": 2, "b": 3}, {"a": ["cat", "dog"], "b": ["owl", "cat", "elk"]})
    assert (named.size, named.columns) == (4, {"a": [0, 1], "b": [2, 0, 3]})
    outputs = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([[0.0, 3.0, -1.0]])}
    assert named.scores(outputs).tolist() == [[3.0, 2.0, 0.0, -1.0]]
    shares = named.scores(outputs, "probabilities")
    assert shares[0, 0] == pytest.approx(outputs["b"].softmax(-1)[0, 1].item())
    assert named.labels("b", torch.tensor([2, 0])).tolist() == [3, 2]
    found = hits(torch.tensor([[3.0, 2.0, 0.0, -1.0], [3.0, 2.0, 0.0, -1.0]]), torch.tensor([1, 3]))
    assert found == {1: 0.0, 3: 0.5, 5: 1.0}
    # Equal scores rank by index, so that a constant model is no better than it is.
    assert hits(torch.zeros(4, 4), torch.arange(4)) == {1: 0.25, 3: 0.75, 5: 1.0}
    with pytest.raises(ValueError, match="classes.a: expected 2 names, found 1"):
        Union.of({"a": 2}, {"a": ["cat"]})
    with pytest.raises(ValueError, match="labels: expected classes from 0 to 3"):
        hits(torch.zeros(1, 4), torch.tensor([4]))


# Heads


def test_linear_heads_pool_as_they_say():
    model, inputs = build("llama"), KINDS["llama"].inputs(0)
    with torch.no_grad():
        features = model.model(**inputs).last_hidden_state
    weight, bias = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)), torch.ones(3)
    expected = {
        "first": features[:, 0],
        "last": torch.stack([features[0, -1], features[1, 4], features[2, -1]]),
        "mean": torch.stack([features[0].mean(0), features[1, :5].mean(0), features[2].mean(0)]),
        "tokens": features,
    }
    for pool, pooled in expected.items():
        with torch.no_grad():
            output = heads.LinearHead(weight, bias, pool)(model, inputs)
        torch.testing.assert_close(output, pooled @ weight.t() + 1)
    with pytest.raises(ValueError, match="expected a model of images"):
        heads.LinearHead(weight, bias, "patches")(model, inputs)
    with pytest.raises(ValueError, match=r"expected weight \[C, 32\].*found \[3, 8\]"):
        heads.LinearHead(weight[:, :8], bias, "first")(model, inputs)


def test_images_are_laid_out_patch_by_patch():
    model, inputs = build("vit"), KINDS["vit"].inputs(0)
    with torch.no_grad():
        patches = model.vit(**inputs).last_hidden_state[:, 1:]
        weight = torch.randn(2 * 16, 32, generator=torch.Generator().manual_seed(0))
        image = heads.LinearHead(weight, None, "image")(model, inputs)
        pooled = heads.LinearHead(weight, None, "patches")(model, inputs)
    assert image.shape == (3, 8, 8, 2)
    # Patch (1, 0), channel 1, pixel (2, 3) of it.
    expected = patches[0, 2] @ weight[16 + 2 * 4 + 3]
    torch.testing.assert_close(image[0, 4 + 2, 3, 1], expected)
    torch.testing.assert_close(pooled, patches.mean(1) @ weight.t())


def test_a_brought_classifier_may_have_other_classes_and_is_taken_out_again():
    model, inputs = build("llama-cls"), KINDS["llama-cls"].inputs(0)
    before = model(**inputs).logits
    head = heads.head_of({"score.weight": torch.zeros(5, 32)}, model, None, "head")
    assert head(model, inputs).tolist() == [[0.0] * 5] * 3
    assert torch.equal(model(**inputs).logits, before)
    with pytest.raises(ValueError, match="head: expected a pool for a linear layer"):
        heads.head_of({"weight": torch.zeros(5, 32)}, model, None, "head")
    with pytest.raises(ValueError, match="to which no pool applies"):
        heads.head_of({"score.weight": torch.zeros(5, 32)}, model, "first", "head")
    with pytest.raises(ValueError, match="expected parameters of LlamaForSequenceClassification, or weight"):
        heads.head_of({"a": torch.zeros(1)}, model, None, "head")


def test_generation_stops_at_the_end_and_wants_padding_in_front():
    model = build("llama")
    inputs = {name: value.flip(1) for name, value in KINDS["llama"].inputs(0).items()}
    model.generation_config.eos_token_id = None
    free = heads.GeneratingHead(4)(model, inputs)
    assert free.shape == (3, 4)
    torch.testing.assert_close(free[0, 0], model(**inputs).logits[0, -1].argmax())
    end = int(free[0, 1])
    model.generation_config.eos_token_id = end
    stopped = heads.GeneratingHead(4)(model, inputs)
    written = free[0].tolist()[: free[0].tolist().index(end) + 1]
    assert stopped[0].tolist() == [*written, *[metrics.IGNORE] * (4 - len(written))]
    with pytest.raises(ValueError, match="expected prompts padded in front"):
        heads.GeneratingHead(4)(model, KINDS["llama"].inputs(0))


# Recipes


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def place(tmp_path):
    """Two classification tasks with heads of their own, their data, and a recipe."""
    base = build("llama-cls")
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "data").mkdir()
    tasks = {}
    for seed, task in enumerate(("nli", "topic"), 1):
        write_adapter(
            base,
            tmp_path / "adapters" / task,
            seed,
            r=4,
            target_modules=["q_proj", "v_proj"],
            task_type="SEQ_CLS",
        )
        for split, first in (("test", 10), ("val", 50)):
            inputs = [KINDS["llama-cls"].inputs(first * seed + i) for i in range(4)]
            stacked = {name: torch.cat([one[name] for one in inputs]) for name in inputs[0]}
            generator = torch.Generator().manual_seed(seed)
            stacked["labels"] = torch.randint(0, 3, (12,), generator=generator)
            save_file(stacked, tmp_path / "data" / f"{task}-{split}.safetensors")
        tasks[task] = {
            "adapter": f"adapters/{task}",
            "test": f"data/{task}-test.safetensors",
            "validation": f"data/{task}-val.safetensors",
            "metric": "accuracy",
        }
    recipe = {
        "model": "base",
        "tasks": tasks,
        "methods": [
            {"method": "task_arithmetic", "name": "TA 0.4", "options": {"scale": "4e-1"}},
            {"method": "task_arithmetic", "name": "TA", "tune": {"by": "loss", "fine_step": None}},
            {"method": "nsc", "options": {"steps": 3, "lr": 0.05}},
            "ensemble",
        ],
        "joint": "logits",
        "batch_size": 5,
        "output": {"dir": "out"},
    }
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def reference(place, candidate, task, split="test"):
    """Logits and labels of a task, put together from public pieces alone."""
    model = type(build("llama-cls")).from_pretrained(place / "base").eval()
    adapters = {name: place / "adapters" / name for name in ("nli", "topic")}
    if candidate == "finetuned":
        adapters, candidate = {task: adapters[task]}, 1.0
    nsc_merge.merge(model, adapters, method="task_arithmetic", scale=candidate).apply(model)
    weights = load_file(place / "adapters" / task / "adapter_model.safetensors")
    with torch.no_grad():
        model.score.weight.copy_(weights["base_model.model.score.weight"])
        data = load_file(place / "data" / f"{task}-{split}.safetensors")
        labels = data.pop("labels")
        return model(**data).logits, labels


def rows(document):
    return {row["row"]: row["runs"] for row in document["rows"]}


def test_a_recipe_from_end_to_end(place, capsys):
    assert main(["eval", str(place / "eval.yaml"), "--json"]) == 0
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    found = rows(document)
    assert list(found) == ["zero_shot", "finetuned", "TA 0.4", "TA", "nsc", "ensemble"]
    assert "\r" not in shown.err
    for task in ("nli", "topic"):
        for row, candidate in (("TA 0.4", 0.4), ("finetuned", "finetuned"), ("zero_shot", 0.0)):
            outputs, labels = reference(place, candidate, task)
            share = (outputs.argmax(-1) == labels).float().mean().item()
            assert found[row][0]["metrics"][task] == pytest.approx(share)
            loss = nn.functional.cross_entropy(outputs, labels).item()
            assert found[row][0]["losses"][task] == pytest.approx(loss, rel=1e-4)
    own = found["finetuned"][0]["metrics"]
    percents = {task: 100 * found["TA 0.4"][0]["metrics"][task] / own[task] for task in own}
    assert found["TA 0.4"][0]["normalised"] == pytest.approx(percents)
    assert found["TA 0.4"][0]["average"] == pytest.approx(sum(percents.values()) / 2)

    # The tuned scale has the least summed validation loss of the coarse sweep.
    tuned = found["TA"][0]["tuned"]
    losses = {}
    for scale in (0.1, 0.5, 1.0):
        pairs = [reference(place, scale, task, "val") for task in ("nli", "topic")]
        losses[scale] = sum(nn.functional.cross_entropy(*pair).item() for pair in pairs)
    trail = {scale: -value for scale, value in tuned["trail"]}
    assert {scale: trail[scale] for scale in losses} == pytest.approx(losses, rel=1e-4)
    assert trail[tuned["value"]] == min(trail.values())

    out = place / "out"
    assert json.loads((out / "results.json").read_text()) == document
    table = (out / "results.md").read_text()
    assert "| TA 0.4 |" in table
    assert "nli (acc ↑)" in table
    assert "Hits@1" in table
    lines = list(csv.DictReader((out / "results.csv").open()))
    assert len(lines) == 12
    assert float(lines[0]["value"]) == found["zero_shot"][0]["metrics"]["nli"]
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    pictures = {
        "normalised.png",
        "coefficients/nsc-seed0/coefficients.png",
        "coefficients/nsc-seed0/ratios.png",
    }
    assert names == {"results.json", "results.md", "results.csv", "rows.jsonl", *pictures}


def test_the_ensemble_and_the_joint_labels_by_hand(place):
    suite = RecipeSuite(load_eval_recipe(place / "eval.yaml").at(0))
    ensemble = nsc_merge.merge(suite.model, suite.adapters, method="ensemble")
    mean = 0
    for task in ("nli", "topic"):
        with applied(suite.model, ensemble.for_task(task)) as model, torch.no_grad():
            mean = mean + torch.cat(
                [suite.output("nli", model, inputs) for inputs, _ in suite.labelled("nli", "test")]
            )
    torch.testing.assert_close(predict(suite, ensemble, "test")["nli"][0], mean / 2)

    summed = nsc_merge.merge(suite.model, suite.adapters, method="task_arithmetic", scale=0.4)
    found = joint_hits(suite, summed, "test", ["nli", "topic"], "logits")
    right = []
    for offset, task in ((0, "nli"), (3, "topic")):
        with applied(suite.model, summed) as model, torch.no_grad():
            pairs = suite.labelled(task, "test")
            union = torch.cat(
                [
                    torch.cat([suite.output(head, model, inputs) for head in ("nli", "topic")], 1)
                    for inputs, _ in pairs
                ]
            )
        labels = torch.cat([label for _, label in pairs]) + offset
        right.append((union.topk(3).indices == labels[:, None]).any(1).float())
        assert found[task][3] == pytest.approx(right[-1].mean().item())
    assert found["all"][3] == pytest.approx(torch.cat(right).mean().item())
    finetuned = nsc_merge.merge(suite.model, suite.adapters, method="finetuned")
    assert joint_hits(suite, finetuned, "test", ["nli", "topic"], "logits") is None


def test_applying_is_undone_to_the_bit_even_by_an_error(place):
    suite = RecipeSuite(load_eval_recipe(place / "eval.yaml").at(0))
    before = {name: value.clone() for name, value in suite.model.state_dict().items()}
    result = nsc_merge.merge(suite.model, suite.adapters, method="task_arithmetic", scale=0.7)
    with pytest.raises(RuntimeError, match="stop"), applied(suite.model, result):
        assert not torch.equal(
            suite.model.state_dict()["model.layers.0.self_attn.q_proj.weight"], next(iter(before.values()))
        )
        raise RuntimeError("stop")
    assert all(torch.equal(value, before[name]) for name, value in suite.model.state_dict().items())


def test_saved_merges_of_every_kind_measure_alike(place, capsys):
    adapters = {name: place / "adapters" / name for name in ("nli", "topic")}
    model = type(build("llama-cls")).from_pretrained(place / "base")
    result = nsc_merge.merge(model, adapters, method="task_arithmetic", scale=0.4)
    result.save(place / "merged", ["lora", "model"])
    result.save(place / "adapter", "lora")
    result.save(place / "whole", "model")
    result.save(place / "numbers", "coefficients")
    nsc_merge.merge(model, adapters, method="finetuned").save(place / "each", ["lora"])
    listed = ["merged", "merged/lora", "adapter", "whole", "numbers", "each"]
    methods = [{"method": "task_arithmetic", "name": "TA"}, *({"folder": one, "name": one} for one in listed)]
    change(place, methods=methods)
    assert main(["eval", str(place / "eval.yaml"), "--json"]) == 0
    found = rows(json.loads(capsys.readouterr().out))
    for name in listed:
        expected = found["finetuned" if name == "each" else "TA"][0]
        assert found[name][0]["losses"] == pytest.approx(expected["losses"], rel=1e-4)
        assert found[name][0]["folder"] == str(place / name)


def change(place, **values):
    recipe = yaml.safe_load((place / "eval.yaml").read_text())
    (place / "eval.yaml").write_text(yaml.safe_dump({**recipe, **values}))


def test_rows_are_measured_once_and_again_only_if_something_changed(place, capsys, monkeypatch):
    from nsc_merge.evaluation import run as module

    measured = []
    original = module._Bench.measured

    def counted(self, row):
        measured.append(row.name)
        return original(self, row)

    monkeypatch.setattr(module._Bench, "measured", counted)
    recipe = str(place / "eval.yaml")
    assert main(["eval", recipe, "output.plots=false"]) == 0
    assert len(measured) == 6
    first = (place / "out" / "results.json").read_bytes()
    # The last line is lost, as by an interruption, and half of another is left.
    lines = (place / "out" / "rows.jsonl").read_text().splitlines()
    (place / "out" / "rows.jsonl").write_text("\n".join([*lines[:-1], lines[-1][:40]]))
    measured.clear()
    assert main(["eval", recipe, "output.plots=false"]) == 0
    assert measured == ["ensemble"]
    again = json.loads((place / "out" / "results.json").read_text())
    for document in (again, expected := json.loads(first)):
        for run in rows(document)["ensemble"]:
            del run["seconds"]
    assert again == expected
    measured.clear()
    change(
        place,
        methods=["ensemble", {"method": "task_arithmetic", "name": "renamed", "options": {"scale": 0.4}}],
    )
    assert main(["eval", recipe, "output.plots=false"]) == 0
    assert measured == []
    data = load_file(place / "data" / "nli-test.safetensors")
    save_file({**data, "labels": (data["labels"] + 1) % 3}, place / "data" / "nli-test.safetensors")
    assert main(["eval", recipe, "output.plots=false"]) == 0
    assert measured == ["zero_shot", "finetuned", "ensemble", "renamed"]
    capsys.readouterr()


def test_seeds_repeat_what_depends_on_them(place, capsys):
    for seed in (3, 4):
        shutil.copytree(place / "adapters" / "nli", place / "adapters" / f"nli-{seed}")
    write_adapter(
        build("llama-cls"),
        place / "adapters" / "nli-4",
        9,
        r=2,
        target_modules=["v_proj"],
        task_type="SEQ_CLS",
    )
    recipe = str(place / "eval.yaml")
    overrides = ["seeds=[3, 4]", f"tasks.nli.adapter={place}/adapters/nli-{{seed}}", "joint=false"]
    assert main(["eval", recipe, *overrides, "output.plots=false"]) == 0
    shown = capsys.readouterr().out
    assert "±" in shown
    assert "over 2 seeds" in shown
    found = rows(json.loads((place / "out" / "results.json").read_text()))
    assert [run["seed"] for run in found["TA 0.4"]] == [3, 4]
    losses = [run["losses"]["nli"] for run in found["TA 0.4"]]
    assert losses[0] != losses[1]
    own, labels = reference(place, 0.4, "nli")
    assert losses[0] == pytest.approx(nn.functional.cross_entropy(own, labels).item(), rel=1e-4)


def test_methods_that_look_at_outputs_get_the_heads_of_their_tasks(place, capsys):
    """AdaMerging only those with classes; Fisher all, with a likelihood each."""
    file = place / "data" / "topic-test.safetensors"
    data = load_file(file)
    save_file({**data, "labels": torch.rand(12)}, file)
    save_file({**data, "labels": torch.rand(12)}, place / "data" / "topic-val.safetensors")
    save_file({"weight": torch.randn(1, 32)}, place / "value.safetensors")
    overrides = [
        "joint=false",
        "tasks.topic.metric=l1",
        f"tasks.topic.head={place / 'value.safetensors'}",
        "tasks.topic.pool=last",
    ]
    steps = {"steps": 2, "lr": 0.05}
    change(
        place,
        methods=[{"method": "adamerging", "options": steps}, {"method": "fisher", "options": {"batches": 1}}],
    )
    assert main(["eval", str(place / "eval.yaml"), *overrides, "--json"]) == 0
    assert list(rows(json.loads(capsys.readouterr().out))) == [
        "zero_shot",
        "finetuned",
        "adamerging",
        "fisher",
    ]
    suite_recipe = load_eval_recipe(place / "eval.yaml", overrides)
    suite = RecipeSuite(suite_recipe.at(0))
    found = {row.name: candidate_of(suite, suite_recipe.at(0), row, 0) for row in suite_recipe.rows}
    model = type(build("llama-cls")).from_pretrained(place / "base")
    adapters = {task: place / "adapters" / task for task in ("nli", "topic")}
    heads_given = {task: functools.partial(suite.output, task) for task in adapters}
    batches = suite.calibration()
    by_hand = {
        "adamerging": nsc_merge.merge(
            model, adapters, batches, "adamerging", outputs={"nli": heads_given["nli"]}, **steps
        ),
        "fisher": nsc_merge.merge(
            model,
            adapters,
            batches,
            "fisher",
            outputs=heads_given,
            likelihood={"nli": "categorical", "topic": "gaussian"},
            batches=1,
        ),
    }
    for name, expected in by_hand.items():
        for path in expected.paths:
            torch.testing.assert_close(found[name].delta(path), expected.delta(path), rtol=1e-5, atol=1e-7)
    assert (place / "out" / "coefficients" / "adamerging-seed0" / "losses.png").is_file()


def test_a_row_that_fails_costs_no_other(place, capsys):
    lines = [
        "task_arithmetic",
        {"method": "task_arithmetic", "name": "odd", "options": {"scale": {"nli": 0.3}}},
    ]
    change(place, methods=lines)
    assert main(["eval", str(place / "eval.yaml"), "output.plots=false"]) == 1
    shown = capsys.readouterr()
    assert "odd, seed 0: scale: expected one value for each of ['nli', 'topic'], found ['nli']" in shown.err
    found = rows(json.loads((place / "out" / "results.json").read_text()))
    assert list(found) == ["zero_shot", "finetuned", "task_arithmetic"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=1"], "task: no such key; did you mean tasks?"),
        (["tasks=null"], "tasks: expected at least one task"),
        (["tasks.nli=3"], "tasks.nli: expected keys and values, found 3"),
        (["tasks.nli.metric=f1"], "tasks.nli.metric: expected one of ['accuracy', 'miou'"),
        (["tasks.nli.metric={name: accuracy, tolerance: 2}"], "tasks.nli.metric.tolerance: not an option"),
        (["tasks.nli.metric=cider"], "tasks.nli.generate: metric cider needs true, found false"),
        (["tasks.nli.generate=true"], "tasks.nli.metric: a task that generates has exact_match or cider"),
        (["tasks.nli.adapter=nowhere"], "tasks.nli.adapter: expected a PEFT folder"),
        (["tasks.nli.test=nowhere"], "tasks.nli.test: expected a safetensors file or a folder of them"),
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
        ("float labels", "labels: expected class indices as integers, found torch.float32"),
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


def test_dense_regression_and_generated_tasks_on_their_models(tmp_path, capsys):
    """Images by linear heads on features, captions by the model's own head."""
    vit = build("vit")
    vit.save_pretrained(tmp_path / "vit")
    write_adapter(vit, tmp_path / "depth", 1, r=2, target_modules=["q_proj"])
    generator = torch.Generator().manual_seed(0)
    pixels = KINDS["vit"].inputs(0)["pixel_values"]
    save_file(
        {"pixel_values": pixels, "depth": torch.rand(3, 8, 8, generator=generator)},
        tmp_path / "depth.safetensors",
    )
    save_file({"weight": torch.randn(16, 32, generator=generator)}, tmp_path / "head.safetensors")
    depth = {"adapter": "depth", "test": "depth.safetensors", "labels": "depth", "metric": "rmse"}
    recipe = {
        "model": "vit",
        "tasks": {"depth": {**depth, "head": "head.safetensors", "pool": "image"}},
        "methods": [{"method": "task_arithmetic", "options": {"scale": 0.5}}],
        "output": {"dir": "out-vit", "plots": False},
    }
    (tmp_path / "vit.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["eval", str(tmp_path / "vit.yaml"), "--json"]) == 0
    run = rows(json.loads(capsys.readouterr().out))["task_arithmetic"][0]
    model = copy.deepcopy(vit)
    nsc_merge.merge(model, {"depth": tmp_path / "depth"}, method="task_arithmetic", scale=0.5).apply(model)
    head = heads.read_head(tmp_path / "head.safetensors", model, "image", "head")
    with torch.no_grad():
        error = (
            head(model, {"pixel_values": pixels})[..., 0] - load_file(tmp_path / "depth.safetensors")["depth"]
        )
    assert run["metrics"]["depth"] == pytest.approx(error.square().mean().sqrt().item(), rel=1e-5)

    llama = build("llama")
    llama.save_pretrained(tmp_path / "llama")
    write_adapter(llama, tmp_path / "caption", 1, r=2, target_modules=["q_proj"])
    tokens = {name: value.flip(1) for name, value in KINDS["llama"].inputs(0).items()}
    result = nsc_merge.merge(llama, {"caption": tmp_path / "caption"}, method="finetuned")
    with applied(llama, result.for_task("caption")) as model:
        written = heads.GeneratingHead(3)(model, tokens)
    save_file({**tokens, "labels": written}, tmp_path / "caption.safetensors")
    task = {"adapter": "caption", "test": "caption.safetensors", "generate": True, "metric": "exact_match"}
    recipe = {
        "model": "llama",
        "tasks": {"caption": task, "tokens": {**task, "generate": False, "test": "tokens.safetensors"}},
        "methods": ["ensemble"],
        "output": {"dir": "out-llama", "plots": False},
    }
    labels = KINDS["llama"].inputs(0)["input_ids"].clone()
    save_file({**KINDS["llama"].inputs(0), "labels": labels}, tmp_path / "tokens.safetensors")
    (tmp_path / "llama.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["eval", str(tmp_path / "llama.yaml"), "--json", "tasks.tokens.metric=accuracy"]) == 1
    shown = capsys.readouterr()
    assert "ensemble, seed 0: ensemble: the outputs of caption are tokens, which have no mean" in shown.err
    found = rows(json.loads(shown.out))["finetuned"][0]["metrics"]
    assert found["caption"] == 1.0
    # A causal language model's own head says the next token.
    with applied(llama, result.for_task("caption")) as model, torch.no_grad():
        told = model(**KINDS["llama"].inputs(0)).logits[:, :-1].argmax(-1)
    assert found["tokens"] == pytest.approx((told == labels[:, 1:]).float().mean().item())
