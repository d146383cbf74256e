"""How far a merge moved its objective: measured before and after on the same batches, and never not a number."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from loop_cases import TASKS, adapters_for, llama, text_batches
from transformers import ReformerConfig, ReformerForSequenceClassification
from zoo import write_adapter

from nsc_merge import Adapter, Factor, merge
from nsc_merge.descent.optimisation import COMPARED
from nsc_merge.recipes.saved_result import read_document

METHODS = ["nsc", "adamerging", "match", "distill"]
# Per method a token whose repetition is easy, and one that is hard: between them lies more than all steps change.
EASY_AND_HARD = {"nsc": (48, 18), "adamerging": (42, 0), "match": (24, 30), "distill": (18, 30)}
SETTINGS = {"lr": 1e-2, "weight_decay": 0.0, "steps": 4, "progress": False}


def repeated(token):
    return {"input_ids": torch.full((2, 7), token)}


def with_coefficients(result, coefficients):
    """A float64 copy of the base with the adapters merged into it."""
    return replace(result, coefficients=coefficients).apply(copy.deepcopy(llama()).double())


def only(result, task):
    """The coefficients with which the merge is one task's own model."""
    return {path: {name: float(name == task) for name in row} for path, row in result.coefficients.items()}


def ratio(result, model, task, batch):
    """Eq. 4 of arXiv 2603.26317, from the definition: what of a module's input the row space of A leaves out."""
    seen = {}
    scored = [path for path in result.options["scored"] if path in result.adapters[task].factors]
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(lambda _, args, path=path: seen.update({path: args[0]}))
        for path in scored
    ]
    model(**batch)
    for hook in hooks:
        hook.remove()
    means = []
    for path in scored:
        A, z = result.adapters[task].factors[path].A.double(), seen[path]
        inside = z @ (torch.linalg.pinv(A) @ A)
        means.append(((z - inside).norm(dim=-1) / z.norm(dim=-1)).mean())
    return torch.stack(means).mean()


def loss(result, model, task, batch):
    """What the method minimises for one task and batch, from its definition."""
    if result.method == "nsc":
        return ratio(result, model, task, batch)
    last = model(**batch).logits[:, -1]
    if result.method == "adamerging":
        return torch.distributions.Categorical(logits=last).entropy().mean()
    own = with_coefficients(result, only(result, task))
    if result.method == "match":
        features = [one.model(**batch).last_hidden_state[:, -1] for one in (model, own)]
        return (features[0] - features[1]).square().mean()
    teacher = own(**batch).logits[:, -1].softmax(-1)
    # What both have in common is 1 less their total variation.
    return 1 - torch.minimum(teacher, last.softmax(-1)).sum(-1).mean()


@torch.no_grad()
def directly(result, coefficients, calibration):
    model = with_coefficients(result, coefficients)
    values = [loss(result, model, task, batch) for task in TASKS for batch in calibration[task]]
    return float(torch.stack(values).mean())


def start_of(result, init):
    held = {task: adapter.factors for task, adapter in result.adapters.items()}
    return {path: {t: init if path in held[t] else 0.0 for t in TASKS} for path in result.coefficients}


@pytest.mark.parametrize("method", METHODS)
def test_the_objective_is_compared_on_the_same_batches(method):
    calibration = {task: [repeated(token) for token in EASY_AND_HARD[method]] for task in TASKS}
    result = merge(llama(), adapters_for(llama()), calibration, method=method, **SETTINGS)
    # The batches of the first and of the last step say that it got worse.
    assert result.history[-1]["objective"] > result.history[0]["objective"]
    found = result.objective
    assert found["after"] < found["before"]
    assert found["batches"] == 2
    assert found["before"] == pytest.approx(directly(result, start_of(result, 0.4), calibration), rel=2e-5)
    assert found["after"] == pytest.approx(directly(result, result.coefficients, calibration), rel=2e-5)
    for side in ("before", "after"):
        assert found[side] == pytest.approx(sum(found["tasks"][task][side] for task in TASKS) / len(TASKS))
    assert f"{found['before']:#.4g} -> {found['after']:#.4g} on the same 2 batches of every task" in result.course


def test_no_more_batches_are_compared_on_than_a_few():
    calibration = text_batches(COMPARED + 3)
    result = merge(llama(), adapters_for(llama()), calibration, **{**SETTINGS, "steps": COMPARED + 3})
    first = {task: batches[:COMPARED] for task, batches in calibration.items()}
    assert result.objective["batches"] == COMPARED
    assert result.objective["after"] == pytest.approx(directly(result, result.coefficients, first), rel=2e-5)


def test_a_resumed_run_is_compared_with_its_true_start(tmp_path):
    calibration = text_batches(3)
    state = tmp_path / "state"
    whole = merge(llama(), adapters_for(llama()), calibration, **SETTINGS, state_to=state)
    again = merge(llama(), adapters_for(llama()), calibration, **SETTINGS, resume_from=state)
    assert again.objective == whole.objective
    expected = directly(whole, start_of(whole, 0.4), calibration)
    assert again.objective["before"] == pytest.approx(expected, rel=2e-5)


def test_a_run_that_stops_early_is_compared_too():
    settings = {**SETTINGS, "steps": 60, "lr": 0.0, "early_stop": 1e-6}
    result = merge(llama(), adapters_for(llama()), text_batches(1), **settings)
    assert len(result.history) == 20
    assert result.objective["before"] == result.objective["after"] == pytest.approx(result.history[0]["objective"])
    assert result.course.startswith("20 steps: ")


def test_the_best_coefficients_held_out_are_the_ones_compared():
    settings = {**SETTINGS, "method": "match", "hold_out": 1, "steps": 12}
    calibration = text_batches(3)
    result = merge(llama(), adapters_for(llama()), calibration, **settings)
    rest = {task: batches[1:] for task, batches in calibration.items()}
    assert result.objective["after"] == pytest.approx(directly(result, result.coefficients, rest), rel=2e-5)


def test_a_task_without_an_objective_is_in_no_mean():
    outputs = {task: lambda model, batch: model(**batch).logits for task in ("a", "b")}
    options = {"method": "adamerging", "outputs": outputs, **SETTINGS}
    found = merge(llama(), adapters_for(llama()), text_batches(1), **options).objective
    assert set(found["tasks"]) == {"a", "b"}
    assert found["after"] == pytest.approx(sum(one["after"] for one in found["tasks"].values()) / 2)


def test_the_comparison_is_saved_and_not_that_of_other_coefficients(tmp_path):
    result = merge(llama(), adapters_for(llama()), text_batches(1), **SETTINGS)
    result.save(tmp_path / "out", format="coefficients")
    assert read_document(tmp_path / "out")[0]["objective"] == json.loads(json.dumps(result.objective))
    assert f"{result.course}." in (tmp_path / "out" / "README.md").read_text().splitlines()
    other = result.scaled(0.5)
    assert (other.objective, other.course) == ({}, "")


def test_the_streams_are_drawn_from_once_per_step():
    calibration = text_batches(2)
    started = []

    class Counted(list):
        def __iter__(self):
            started.append(1)
            return super().__iter__()

    merge(llama(), adapters_for(llama()), {task: Counted(one) for task, one in calibration.items()}, **SETTINGS)
    assert len(started) == len(TASKS) * SETTINGS["steps"] / 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("where", ["batch", "later batch", "model", "range"])
def test_an_objective_that_is_not_finite_is_refused(method, where):
    model = llama()
    calibration = {task: [{"input_ids": torch.full((2, 7), token)} for token in (1, 2)] for task in TASKS}
    weights = model.get_input_embeddings().weight.data
    if where == "batch":
        weights[1] = math.nan
    elif where == "later batch":
        weights[2] = math.inf
    elif where == "model":
        model.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.nan
    else:
        # More than float16 holds.
        model = model.half()
        model.model.layers[0].mlp.down_proj.weight.data.fill_(6e4)
        model.model.layers[0].mlp.up_proj.weight.data.mul_(100)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step = {"batch": 0, "later batch": 1, "model": 0, "range": 0}[where]
    with pytest.raises(RuntimeError, match=rf"calibration: at step {step}, the objective of task '[abc]' is (nan|inf)"):
        merge(model, adapters_for(llama()), calibration, method=method, **SETTINGS)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], equal_nan=True)


class Overflowing(torch.autograd.Function):
    """As a backward in float16: what goes forward is a number, its gradient is none."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_that_is_not_finite_is_refused(method):
    model = llama()
    model.model.layers[1].register_forward_hook(lambda _, __, y: Overflowing.apply(y))
    with pytest.raises(RuntimeError, match="calibration: at step 0, the gradient is not finite; expected finite numb"):
        merge(model, adapters_for(llama()), text_batches(1), method=method, **SETTINGS)


@pytest.mark.parametrize("options", [{"hold_out": 1}, {"init": "match"}])
def test_a_choice_by_what_is_not_finite_is_refused(options):
    model = llama()
    model.get_input_embeddings().weight.data[1] = math.nan
    calibration = {task: [repeated(1), repeated(2)] for task in TASKS}
    with pytest.raises(RuntimeError, match="calibration: .* nan.* expected a finite number"):
        merge(model, adapters_for(model), calibration, method="match", **SETTINGS, **options)


@pytest.mark.parametrize("method", METHODS)
def test_steps_that_lead_out_of_all_numbers_are_refused(method):
    with pytest.raises(RuntimeError, match="calibration: at the last step, a coefficient is not finite"):
        options = {"method": method, **SETTINGS, "lr": 1e38, "steps": 1}
        merge(llama(), adapters_for(llama()), text_batches(1), **options)


@pytest.mark.parametrize("method", ["nsc", "adamerging"])
def test_an_objective_that_nothing_moves_is_refused(method):
    model = llama()
    model.get_input_embeddings().weight.data.zero_()
    with pytest.raises(RuntimeError, match="at step 0, the objective depends on no coefficient; expected"):
        merge(model, adapters_for(model), text_batches(1), method=method, **SETTINGS)


def test_an_objective_that_is_flat_where_it_starts_leaves_the_coefficients_there():
    """Signs have no slope, and are others elsewhere: that is no objective that nothing moves."""

    def signs(model, batch):
        logits = model(**batch).logits[:, -1]
        return logits.sign() + 0 * logits

    model, outputs = llama(), dict.fromkeys(TASKS, signs)
    options = {"method": "distill", "likelihood": "gaussian", "outputs": outputs, **SETTINGS}
    result = merge(model, adapters_for(model), text_batches(1), **options)
    held = {task: adapter.factors for task, adapter in result.adapters.items()}
    values = [row[task] for path, row in result.coefficients.items() for task in row if path in held[task]]
    assert values == pytest.approx([0.4] * len(values))
    assert [step["lambda_mean"] for step in result.history] == pytest.approx([0.4] * 4)
    assert result.objective["before"] == result.objective["after"] > 0


@pytest.mark.parametrize("early_exit", [True, False])
def test_what_is_measured_in_front_of_every_adapter_is_refused(early_exit):
    adapters = {task: adapter for task, adapter in adapters_for(llama()).items() if task != "c"}
    calibration = {task: text_batches(1)[task] for task in adapters}
    with pytest.raises(RuntimeError, match="depends on no coefficient"):
        merge(llama(), adapters, calibration, score_blocks=[0], early_exit=early_exit, **SETTINGS)


@pytest.mark.parametrize("method", ["match", "distill", "adamerging"])
def test_what_is_compared_in_front_of_every_adapter_is_refused(method):
    """Such as the last hidden state, where the head alone is adapted; the logits behind it are compared."""
    model = llama()
    torch.manual_seed(0)
    width, tokens = model.lm_head.in_features, model.lm_head.out_features
    factors = [Factor(torch.randn(2, width), torch.randn(tokens, 2), 1.0) for _ in "ab"]
    adapters = {task: Adapter(task, {"lm_head": one}) for task, one in zip("ab", factors, strict=True)}
    data = {task: text_batches(1)[task] for task in adapters}
    if method == "match":
        with pytest.raises(RuntimeError, match="is compared depends on no coefficient; expected something"):
            merge(model, adapters, data, method, **SETTINGS)
        return
    found = merge(model, adapters, data, method, **SETTINGS).coefficients["lm_head"]
    assert found["a"] != found["b"]


def test_a_gradient_that_a_model_loses_is_no_objective_at_its_least(tmp_path):
    """Reformer's reversible layers run again in a backward of their own, whose gradients go to parameters alone."""
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "attention_head_size": 8, "feed_forward_size": 32}
    places = {"axial_pos_shape": (4, 4), "axial_pos_embds_dim": (8, 24), "lsh_attn_chunk_length": 16}
    layers = {"attn_layers": ["local", "local"], "local_attn_chunk_length": 4, "vocab_size": 64}
    torch.manual_seed(0)
    model = ReformerForSequenceClassification(ReformerConfig(**sizes, **places, **layers)).eval()
    targets = {"r": 2, "target_modules": ["query_key", "value", "query", "key"]}
    adapters = {task: write_adapter(model, tmp_path / task, n, **targets) for n, task in enumerate("ab")}
    data = {task: [{"input_ids": torch.randint(64, (2, 16))}] for task in adapters}
    with pytest.raises(RuntimeError, match="its gradient is zero for all of them; expected a model that autograd"):
        merge(model, adapters, data, **SETTINGS)
    with pytest.raises(RuntimeError, match="depends on no coefficient.*unlike the reversible layers"):
        merge(model, adapters, data, "match", **SETTINGS)
