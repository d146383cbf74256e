"""RegMean's terms beside the adapters' updates: where they begin, what they gain, and what becomes of the rest."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from own_cases import QUIET, merge, merged, problem_of
from safetensors.torch import load_file

import nsc_merge
from nsc_merge.methods import METHODS
from nsc_merge.methods.closed_form.regmean import RegMeanOptions
from nsc_merge.methods.gradient.regmean_terms import with_terms
from nsc_merge.utils.yaml_text import from_yaml

# Wide enough for the Gram matrices of a few tokens.
GRAMS = {"batches": 2, "ridge": 1e-2}
STILL = {"lr": 0.0, "weight_decay": 0.0, "steps": 1}


def regmean(problem, **options):
    return METHODS["regmean"].run(problem, {**GRAMS, **options})


def copy_of(problem):
    return copy.deepcopy(problem.model).eval()


def summed(problem, scale):
    return METHODS["task_arithmetic"].run(problem, {"scale": scale})


@pytest.mark.parametrize("init", [0.4, {"a": 0.2, "b": 0.7}])
@pytest.mark.parametrize("kind", ["llama", "vit", "llava"])
def test_the_start_is_the_mean_of_task_arithmetic_and_regmean(tmp_path, kind, init):
    problem = problem_of(kind, tmp_path, count=2)
    result = merge(problem, "distill", regmean=GRAMS, init=init, **STILL)
    sum_, closed = summed(problem, init), regmean(problem)
    assert result.coefficients == {}
    assert result.adapters == problem.adapters
    for path in result.paths:
        expected = (sum_.delta(path).double() + closed.delta(path).double()) / 2
        torch.testing.assert_close(result.delta(path).double(), expected, rtol=1e-5, atol=1e-7)
        # Of every task one update, whatever it is made of.
        assert result.factors[path].rank == sum(one.factors[path].rank for one in problem.adapters.values())


def test_the_first_loss_is_the_explicit_distance_of_predictions_from_the_adapters_own(tmp_path):
    problem = problem_of("llama", tmp_path, count=2)
    result = merge(problem, "distill", regmean=GRAMS, **STILL)
    model = result.apply(copy_of(problem))
    for task in problem.tasks:
        batch = problem.calibration[task][0]
        own = merged(problem, {name: float(name == task) for name in problem.tasks})
        rows, last = torch.arange(3), batch["attention_mask"].sum(1) - 1
        with torch.no_grad():
            p, q = ((one(**batch).logits[rows, last].double().softmax(-1)) for one in (own, model))
        expected = (1 - torch.minimum(p, q).sum(-1)).mean()
        assert result.history[0]["loss"][task] == pytest.approx(expected.item(), rel=2e-4)


def test_what_was_minimised_is_what_the_result_holds(tmp_path):
    problem = problem_of("vit", tmp_path, count=2)
    result = merge(problem, "distill", regmean=GRAMS, steps=30, lr=3e-2)
    assert result.objective["after"] < 0.8 * result.objective["before"]
    again = merge(problem, "distill", regmean=GRAMS, steps=30, lr=3e-2)
    model = result.apply(copy_of(problem))
    found = {}
    for task in problem.tasks:
        own = merged(problem, {name: float(name == task) for name in problem.tasks})
        values = []
        for batch in problem.calibration[task]:
            with torch.no_grad():
                p, q = (one(**batch).logits.double().softmax(-1) for one in (own, model))
            values.append((1 - torch.minimum(p, q).sum(-1)).mean().item())
        found[task] = sum(values) / len(values)
    for task, value in found.items():
        assert result.objective["tasks"][task]["after"] == pytest.approx(value, rel=2e-3)
    for path in result.paths:
        assert torch.equal(result.delta(path), again.delta(path))


def test_a_generator_loses_nothing_to_the_gram_matrices(tmp_path):
    problem = problem_of("llama", tmp_path, count=3)
    lists = merge(problem, "distill", regmean=GRAMS, steps=4)
    drawn = dataclasses.replace(problem, calibration={task: iter(one) for task, one in problem.calibration.items()})
    once = merge(drawn, "distill", regmean=GRAMS, steps=4)
    assert [entry["loss"] for entry in once.history] == [entry["loss"] for entry in lists.history]


def test_one_coefficient_for_every_task_and_kind(tmp_path):
    problem = problem_of("vit", tmp_path, count=2)
    result = merge(problem, "distill", regmean=GRAMS, share="task", steps=5, lr=3e-2)
    adapters = with_terms(problem, RegMeanOptions(**GRAMS), 0.4)[0].adapters
    found = []
    for path in result.paths:
        columns = torch.stack([adapter.factors[path].delta().flatten() for adapter in adapters.values()], 1)
        found.append(torch.linalg.lstsq(columns, result.delta(path).double().flatten()[:, None]).solution[:, 0])
    torch.testing.assert_close(torch.stack(found), found[0].expand(len(found), 4), rtol=1e-3, atol=1e-4)
    assert ((found[0] - torch.tensor([0.2, 0.2, 0.5, 0.5])).abs() > 1e-3).all()


def test_dora_begins_at_the_same_mean(tmp_path):
    problem = problem_of("llama", tmp_path, count=2, use_dora=True)
    result = merge(problem, "distill", regmean=GRAMS, **STILL)
    sum_, closed = summed(problem, 0.4), regmean(problem)
    for path in result.paths:
        expected = (sum_.delta(path).double() + closed.delta(path).double()) / 2
        torch.testing.assert_close(result.delta(path).double(), expected, rtol=1e-5, atol=1e-7)


def test_biases_begin_at_the_same_mean(tmp_path):
    problem = problem_of("llama", tmp_path, count=2, lora_bias=True)
    result = merge(problem, "distill", regmean=GRAMS, **STILL)
    sum_, closed = summed(problem, 0.4), regmean(problem)
    for path in result.paths:
        expected = (sum_.bias_delta(path) + closed.bias_delta(path)) / 2
        torch.testing.assert_close(result.bias_delta(path), expected, rtol=1e-5, atol=1e-8)


def test_a_bias_of_one_task_begins_at_the_same_mean(tmp_path):
    """RegMean divides it by all tasks."""
    problem = problem_of("llama", tmp_path, count=2, lora_bias=True)
    path = next(iter(problem.adapters["b"].factors))
    held = problem.adapters["b"].factors[path]
    problem.adapters["b"].factors[path] = dataclasses.replace(held, bias=None)
    result = merge(problem, "distill", regmean=GRAMS, **STILL)
    own = problem.adapters["a"].factors[path].bias_delta()
    torch.testing.assert_close(regmean(problem).bias_delta(path), own / 2, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(result.bias_delta(path), (0.2 + 0.25) * own, rtol=1e-5, atol=1e-8)


def test_a_result_is_saved_as_one_adapter_and_not_as_coefficients(tmp_path):
    problem = problem_of("llama", tmp_path, count=2)
    result = nsc_merge.merge(
        problem.model, problem.adapters, problem.calibration, "distill", regmean=GRAMS, steps=2, **QUIET
    )
    assert METHODS["distill"].gives_with({"regmean": True}) == "low rank"
    assert METHODS["distill"].gives_with({"regmean": {}}) == "low rank"
    assert METHODS["distill"].gives_with({"regmean": False}) == "coefficients"
    with pytest.raises(ValueError, match="format 'coefficients': method 'distill' gives none"):
        result.save(tmp_path / "none", "coefficients")
    assert "coefficients" not in result.course
    out = result.save(tmp_path / "out", "lora", plots=True)
    weights = load_file(out / "adapter_model.safetensors")
    path = result.paths[0]
    A, B = (next(v for k, v in weights.items() if path in k and name in k) for name in ("lora_A", "lora_B"))
    scaling = nsc_merge.load_adapter(out, "merged").factors[path].scaling
    expected = result.delta(path).double()
    torch.testing.assert_close(scaling * (B.double() @ A.double()), expected, atol=1e-6, rtol=1e-4)
    assert from_yaml((out / "recipe.yaml").read_text())["options"]["regmean"] == GRAMS


def test_of_an_embedding_the_term_is_a_share_of_the_mean(tmp_path):
    """It is given numbers of tokens, of which there is no Gram matrix."""
    problem = problem_of("llama", tmp_path, count=2, target_modules=["q_proj", "embed_tokens"])
    result = merge(problem, "distill", regmean=GRAMS, **STILL)
    (embedding,) = (path for path in result.paths if path.endswith("embed_tokens"))
    # 0.4 / 2 of the sum, and half of a mean of two.
    expected = sum((0.2 + 0.25) * one.factors[embedding].delta() for one in problem.adapters.values())
    torch.testing.assert_close(result.delta(embedding).double(), expected, rtol=1e-5, atol=1e-8)


def test_shares_of_adapters_in_half_precision_are_not_rounded_to_it(tmp_path):
    """A third is none of bfloat16's numbers."""
    problem = problem_of("llama", tmp_path, count=2, target_modules=["q_proj", "embed_tokens"])

    def half(adapter):
        rounded = {
            path: dataclasses.replace(factor, A=factor.A.bfloat16(), B=factor.B.bfloat16())
            for path, factor in adapter.factors.items()
        }
        return dataclasses.replace(adapter, factors=rounded)

    tasks = {"a": "a", "b": "b", "c": "a"}
    adapters = {task: half(problem.adapters[other]) for task, other in tasks.items()}
    batches = {task: problem.calibration[other] for task, other in tasks.items()}
    problem = dataclasses.replace(problem, adapters=adapters, calibration=batches)
    result = merge(problem, "distill", regmean=GRAMS, **STILL)
    (embedding,) = (path for path in result.paths if path.endswith("embed_tokens"))
    expected = sum((0.2 + 0.5 / 3) * one.factors[embedding].delta() for one in adapters.values())
    torch.testing.assert_close(result.delta(embedding).double(), expected, rtol=1e-5, atol=1e-8)


def test_modules_trained_in_full_begin_at_the_same_mean_and_shared_ones_stay_as_merged_by_rule(tmp_path):
    for shared in ("lambda", "mean"):
        problem = problem_of("llama", tmp_path / shared, shared, count=2, modules_to_save=["lm_head"])
        result = merge(problem, "distill", regmean=GRAMS, **STILL)
        sum_, closed = summed(problem, 0.4), regmean(problem)
        (whole,) = (path for path in result.paths if result.is_whole(path))
        expected = (sum_.delta(whole).double() + closed.delta(whole).double()) / 2
        torch.testing.assert_close(result.delta(whole).double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regmean": 1}, r"regmean: expected True, False or options of method 'regmean' by name, found 1"),
        ({"regmean": {"scale": 2.0}}, r"regmean: expected some of batches, off_diagonal, .*, found 'scale'"),
        ({"regmean": {"batches": 0}}, r"regmean: batches: expected .*, found 0"),
        ({"regmean": True, "init": {"a": 0.4}}, r"init: expected one value for each of \['a', 'b'\]"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, options, message):
    problem = problem_of("vit", tmp_path)
    with pytest.raises((ValueError, TypeError), match=message):
        merge(problem, "distill", steps=1, **options)


def test_too_few_inputs_for_the_gram_matrices_are_named(tmp_path):
    problem = problem_of("llama", tmp_path, count=1)
    # Inputs of zero, whatever the tokens.
    torch.nn.init.zeros_(problem.model.get_input_embeddings().weight)
    message = "regmean: ridge: the Gram matrix .* is singular; expected more batches or a larger ridge, found batches=1"
    with pytest.raises(ValueError, match=message):
        merge(problem, "distill", regmean={"batches": 1, "ridge": 0.0, "off_diagonal": 1.0}, **STILL)
