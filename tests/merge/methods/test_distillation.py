"""Distillation against the explicit distance of predictions."""

from __future__ import annotations

import itertools

import pytest
import torch
from own_cases import merge, merged, problem_of

from nsc_merge.methods import Problem
from nsc_merge.methods.gradient.distillation import DistillOptions, Predictions
from nsc_merge.methods.gradient.variance import Variance, variance_of


@pytest.mark.parametrize(
    ("bounded", "normalise", "likelihood"),
    [
        case
        for case in itertools.product([False, True], ["none", "task", "variance"], ["categorical", "gaussian"])
        if case != (True, "task", "gaussian")
    ],
)
@pytest.mark.parametrize("positions", [None, "last", "all"])
def test_distillation_is_the_explicit_distance_of_predictions(tmp_path, normalise, bounded, likelihood, positions):
    problem = problem_of("llama", tmp_path)
    options = {"normalise": normalise, "likelihood": likelihood, "positions": positions}
    result = merge(problem, "distill", steps=1, distance="bounded" if bounded else "divergence", **options)

    def outputs(model, batch):
        with torch.no_grad():
            logits = model(**batch).logits.double()
        mask = batch["attention_mask"].bool()
        return logits[mask] if positions == "all" else logits[torch.arange(3), mask.sum(1) - 1]

    def distance(found, own):
        p, q = own.softmax(-1), found.softmax(-1)
        if bounded and likelihood == "gaussian":
            square = (found - own).square().mean(-1)
            if normalise == "variance":
                square = square / own.var(0, correction=0).mean()
            return (1 - 1 / (1 + square)).mean()
        if bounded:
            # What both have in common is 1 less their total variation.
            return 1 - torch.minimum(p, q).sum(-1).mean()
        if likelihood == "gaussian":
            return (found - own).square().mean()
        return (p * (p.log() - q.log())).sum(-1).mean()

    both = merged(problem, {"a": 0.4, "b": 0.4})
    for task in ("a", "b"):
        batch = problem.calibration[task][0]
        own = outputs(merged(problem, {"a": float(task == "a"), "b": float(task == "b")}), batch)
        expected = distance(outputs(both, batch), own)
        if normalise == "task":
            expected = expected / distance(outputs(problem.model, batch), own)
        if normalise == "variance" and likelihood == "gaussian" and not bounded:
            expected = expected / own.var(0, correction=0).mean()
        assert result.history[0]["loss"][task] == pytest.approx(expected.item(), rel=2e-4)


def scaled(factor):
    return lambda model, batch: factor * model(**batch).logits


@pytest.mark.parametrize(
    ("normalise", "distance"), [("variance", "divergence"), ("variance", "bounded"), ("none", "divergence")]
)
def test_the_unit_of_values_matters_only_without_their_variance(tmp_path, normalise, distance):
    problem = problem_of("vit", tmp_path, count=2)
    metres, millimetres = (
        merge(
            problem,
            "distill",
            steps=4,
            normalise=normalise,
            distance=distance,
            likelihood={"a": "gaussian", "b": "categorical"},
            outputs={"a": scaled(factor)},
        )
        for factor in (1.0, 1000.0)
    )
    same = [
        value == pytest.approx(millimetres.coefficients[path][task], rel=1e-4)
        for path, row in metres.coefficients.items()
        for task, value in row.items()
    ]
    assert all(same) == (normalise == "variance")


def test_the_variance_is_that_of_all_values_so_far():
    parts = [5 + torch.randn(size, 3, 2, generator=torch.Generator().manual_seed(size)) for size in (1, 4, 2)]
    variance = Variance()
    for number, part in enumerate(parts, 1):
        variance.add(part)
        together = torch.cat(parts[:number]).double().flatten(0, 1)
        torch.testing.assert_close(variance_of([variance.moments]), together.var(0, correction=0).mean())
    flat = Variance()
    flat.add(torch.tensor([1.0, 3.0]))
    assert variance_of([flat.moments]) == 1


def test_values_that_are_all_alike_have_no_variance_to_divide_by(tmp_path):
    outputs = {"b": lambda model, batch: 0 * model(**batch).logits + 0.7}
    options = {"steps": 1, "outputs": outputs, "likelihood": "gaussian"}
    with pytest.raises(ValueError, match="normalise: 'variance' needs outputs that differ .* 'b'"):
        merge(problem_of("vit", tmp_path), "distill", normalise="variance", **options)
    merge(problem_of("vit", tmp_path / "none"), "distill", normalise="none", **options)


def test_a_task_without_an_output_of_its_own_has_the_models(tmp_path):
    """At the last token, as where no task has one."""
    problem = problem_of("llama", tmp_path)
    some = merge(problem, "distill", steps=1, outputs={"a": lambda model, batch: model(**batch).logits[:, 0]})
    none = merge(problem, "distill", steps=1)
    assert some.history[0]["loss"]["b"] == none.history[0]["loss"]["b"]
    assert some.history[0]["loss"]["a"] != none.history[0]["loss"]["a"]


def test_batches_may_hold_more_than_tensors(tmp_path):
    problem = problem_of("vit", tmp_path)
    expected = merge(problem, "distill", steps=1)
    forward = problem.model.forward
    problem.model.forward = lambda sizes, **inputs: forward(**inputs)
    batches = {task: [{**batch, "sizes": [1, 2]} for batch in one] for task, one in problem.calibration.items()}
    found = merge(Problem(problem.model, problem.adapters, batches), "distill", steps=1)
    assert found.coefficients == expected.coefficients


@pytest.mark.parametrize(("distance", "left"), [("divergence", 1e-3), ("bounded", 1e-3**0.5)])
def test_distillation_of_one_adapter_goes_to_one(tmp_path, distance, left):
    """A divergence falls with the square of what is left of the way, the total variation in proportion to it."""
    problem = problem_of("vit", tmp_path)
    one = Problem(problem.model, {"a": problem.adapters["a"]}, {"a": problem.calibration["a"]})
    result = merge(one, "distill", steps=120, lr=4e-2, weight_decay=0.0, schedule="cosine", distance=distance)
    assert result.history[-1]["objective"] < left * result.history[0]["objective"]


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 5, 2)])
def test_what_cannot_be_kept_counts_once(tmp_path, shape):
    """Values with and without components: one position of all is lost, whatever the distance."""
    problem = problem_of("vit", tmp_path)
    predictions = Predictions(problem, DistillOptions(distance="bounded", likelihood="gaussian"))
    own = torch.zeros(shape)
    found = own.clone()
    found[(0,) * own.dim()] = 1e9
    positions = own.numel() if own.dim() == 1 else own[..., 0].numel()
    assert predictions.distance(0, found, own, 2.0) == pytest.approx(1 / positions)
    classes = Predictions(problem, DistillOptions(distance="bounded"))
    certain = torch.tensor([[1e4, 0.0], [0.0, 1e4], [0.0, 1e4]])
    assert classes.distance(0, certain.flip(-1), certain) == 1
    assert classes.distance(0, torch.cat([certain[:1].flip(-1), certain[1:]]), certain) == pytest.approx(1 / 3)
    # Classes are last, however many dimensions positions have.
    diverging = Predictions(problem, DistillOptions(distance="divergence"))
    found, own = torch.randn(2, 2, 3, 4, 5).double()
    p, q = own.exp() / own.exp().sum(-1, keepdim=True), found.exp() / found.exp().sum(-1, keepdim=True)
    assert float(diverging.distance(0, found, own)) == pytest.approx(float((p * (p / q).log()).sum() / 24), rel=1e-6)


def test_distillation_runs_the_model_once_for_tasks_on_the_same_inputs(tmp_path):
    problem = problem_of("vit", tmp_path)
    shared = problem.calibration["a"]
    heads = {
        task: lambda model, batch, sign=sign: sign * model(**batch).logits for task, sign in (("a", 1), ("b", -1))
    }
    together = Problem(problem.model, problem.adapters, {"a": shared, "b": shared})
    apart = Problem(problem.model, problem.adapters, {"a": shared, "b": [dict(shared[0])]})
    calls = []
    hook = problem.model.vit.embeddings.register_forward_hook(lambda *_: calls.append(1))
    first = merge(together, "distill", steps=3, outputs=heads)
    once = len(calls)
    second = merge(apart, "distill", steps=3, outputs=heads)
    hook.remove()
    # Each task's own model once, then one forward a step and end of the comparison, against two.
    assert (once, len(calls) - once) == (2 + 3 + 2, 2 + 6 + 4)
    assert first.history[-1]["objective"] == pytest.approx(second.history[-1]["objective"], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"likelihood": "poisson"}, "likelihood: expected one of"),
        ({"likelihood": {"a": "gaussian"}}, r"likelihood: expected one for each of \['a', 'b'\], found \['a'\]"),
        ({"clamp": 0.5}, "clamp: expected a lower and a higher bound, found 0.5"),
        ({"clamp": ["a", "b"]}, "clamp: expected a lower and a higher bound"),
        ({"seed": 1.5}, "seed: expected a whole number"),
        ({"progress": "x"}, "progress: expected one of"),
        ({"positions": "first"}, "positions: expected one of"),
        ({"distance": "unbounded"}, "distance: expected one of"),
        ({"normalise": "scale"}, "normalise: expected one of"),
        (
            {"normalise": "task", "likelihood": {"a": "categorical", "b": "gaussian"}},
            r"normalise: 'task' comes after the bound, and differences of the values of \['b'\]",
        ),
        ({"outputs": {"c": len}}, "outputs: expected functions for some of"),
    ],
)
def test_distillation_names_what_is_wrong(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        merge(problem_of("vit", tmp_path), "distill", steps=1, **options)
