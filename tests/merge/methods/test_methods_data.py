"""AdaMerging, RegMean, Fisher merging and feature matching against explicit computations on dense weights."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zoo
from torch.func import functional_call

import nsc_merge
from nsc_merge.calibration.forward_passes import one_by_one
from nsc_merge.methods import Problem
from nsc_merge.methods.closed_form import fisher
from nsc_merge.methods.gradient import feature_matching
from nsc_merge.methods.gradient.learned_coefficients import attached, presence
from nsc_merge.methods.gradient.task_models import OwnModels
from nsc_merge.models.fitting import fit

CLASSES = {"plain": 5, "mixed": 3, "partial": 4}


def problem_of(model, folders, calibration=None) -> Problem:
    loaded = {task: nsc_merge.load_adapter(folder, task) for task, folder in folders.items()}
    return Problem(model, fit(loaded, model, "lambda"), calibration)


def heads():
    generator = torch.Generator().manual_seed(3)
    return {task: torch.randn(32, count, generator=generator) for task, count in CLASSES.items()}


def pooled(model, batch):
    return model(**batch).last_hidden_state.mean(1)


@pytest.fixture
def outputs():
    return {task: lambda model, batch, head=head: pooled(model, batch) @ head for task, head in heads().items()}


def dense_weights(problem, lam):
    """Parameters with ``lam [modules, K]`` times every update added, differentiable in lam."""
    weights = dict(problem.model.named_parameters())
    paths = sorted({path for adapter in problem.adapters.values() for path in adapter.factors})
    order = [path for path in dict(problem.model.named_modules()) if path in paths]
    for row, path in enumerate(order):
        for number, adapter in enumerate(problem.adapters.values()):
            if path in adapter.factors:
                name = f"{path}.weight"
                weights[name] = weights[name] + lam[row, number] * adapter.factors[path].delta().to(weights[name])
    return weights


class Dense:
    """Behaves as the model with other weights."""

    def __init__(self, model, weights):
        self.model, self.weights = model, weights

    def __call__(self, **batch):
        return functional_call(self.model, self.weights, (), batch)


def alone(problem, task):
    lam = torch.zeros(len(presence(problem)), len(problem.tasks))
    lam[:, problem.tasks.index(task)] = 1
    with torch.no_grad():
        return {name: value.detach() for name, value in dense_weights(problem, lam).items()}


def test_adamerging_objective_and_gradient(model, folders, calibration, outputs):
    problem = problem_of(model, folders, calibration)
    result = nsc_merge.merge(
        model,
        folders,
        calibration,
        "adamerging",
        outputs=outputs,
        steps=1,
        optimizer="adam",
        weight_decay=0.0,
        lr=1e-3,
        init=0.4,
        progress=False,
    )
    lam = (0.4 * presence(problem)).requires_grad_()
    dense = Dense(model, dense_weights(problem, lam))
    losses = {}
    for task in folders:
        p = outputs[task](dense, calibration[task][0]).softmax(-1)
        losses[task] = -(p * p.log()).sum(-1).mean()
    (grad,) = torch.autograd.grad(sum(losses.values()) / 3, lam)
    for task, loss in losses.items():
        assert result.history[0]["loss"][task] == pytest.approx(loss.item(), rel=1e-5)
    moved = torch.tensor([list(row.values()) for row in result.coefficients.values()]) - 0.4 * presence(problem)
    # Adam's first step is -lr times the sign of the gradient.
    live = presence(problem) & (grad.abs() > 1e-6)
    torch.testing.assert_close(moved[live], (-1e-3 * grad.sign())[live], rtol=1e-2, atol=1e-6)
    assert live.sum() > 20


def test_adamerging_task_share_moves_by_the_summed_gradient(model, folders, calibration, outputs):
    result = nsc_merge.merge(
        model, folders, calibration, "adamerging", outputs=outputs, steps=3, share="task", progress=False
    )
    for task in folders:
        values = {row[task] for path, row in result.coefficients.items() if path in result.adapters[task].factors}
        assert max(values) - min(values) < 1e-6
        assert abs(max(values) - 0.4) > 1e-4


def llama(tmp_path: Path, kind="llama"):
    model = zoo.build(kind)
    folders = {
        str(seed): zoo.write_adapter(
            model,
            tmp_path / str(seed),
            seed,
            r=2,
            lora_alpha=4,
            target_modules=["q_proj", "v_proj"],
            **({"task_type": "CAUSAL_LM"} if kind == "llama" else {}),
        )
        for seed in (1, 2)
    }
    return model, folders, {name: [zoo.text(10 + int(name))] for name in folders}


def test_single_token_entropy_is_at_the_last_real_token(tmp_path):
    model, folders, calibration = llama(tmp_path)
    problem = problem_of(model, folders, calibration)
    result = nsc_merge.merge(model, folders, calibration, "adamerging", steps=1, tokens="single", progress=False)
    weights = dense_weights(problem, 0.4 * presence(problem))
    for task in folders:
        batch = calibration[task][0]
        values = []
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            logits = functional_call(model, weights, (), {"input_ids": ids[mask.bool()][None]}).logits[0, -1]
            p = logits.softmax(-1)
            values.append(-(p * p.log()).sum())
        assert result.history[0]["loss"][task] == pytest.approx(torch.stack(values).mean().item(), rel=1e-4)


def test_full_is_the_entropy_along_greedy_decoding(tmp_path):
    model, folders, calibration = llama(tmp_path)
    problem = problem_of(model, folders, calibration)
    result = nsc_merge.merge(
        model, folders, calibration, "adamerging", steps=1, tokens="full", new_tokens=4, progress=False
    )
    weights = dense_weights(problem, 0.4 * presence(problem))
    for task in folders:
        batch, total = calibration[task][0], 0.0
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            ids = ids[mask.bool()]
            for _ in range(4):
                p = functional_call(model, weights, (), {"input_ids": ids[None]}).logits[0, -1].softmax(-1)
                total += -(p * p.log()).sum().item() / 3
                ids = torch.cat([ids, p.argmax()[None]])
                if ids[-1] == 2:
                    break
        assert result.history[0]["loss"][task] == pytest.approx(total, rel=1e-4)


def test_adamerging_on_a_decoder_with_a_classification_head(tmp_path):
    model, folders, calibration = llama(tmp_path, "llama-cls")
    model.config.pad_token_id = 0
    problem = problem_of(model, folders, calibration)
    result = nsc_merge.merge(model, folders, calibration, "adamerging", steps=1, progress=False)
    weights = dense_weights(problem, 0.4 * presence(problem))
    for task in folders:
        p = functional_call(model, weights, (), calibration[task][0]).logits.softmax(-1)
        assert result.history[0]["loss"][task] == pytest.approx(-(p * p.log()).sum(-1).mean().item(), rel=1e-4)


def test_decoding_refuses_other_inputs_of_every_token(tmp_path):
    model, folders, calibration = llama(tmp_path)
    for batches in calibration.values():
        batches[0]["position_ids"] = torch.arange(7).expand(3, 7)
    with pytest.raises(ValueError, match="decodes from input_ids and attention_mask alone, found position_ids"):
        nsc_merge.merge(model, folders, calibration, "adamerging", steps=1, tokens="full", progress=False)


def test_class_entropy_leaves_out_padding(tmp_path):
    model, folders, calibration = llama(tmp_path)
    options = {"steps": 1, "tokens": "class", "progress": False}
    first = nsc_merge.merge(model, folders, calibration, "adamerging", **options)
    for batches in calibration.values():
        batches[0]["input_ids"][1, 5:] = 40
    second = nsc_merge.merge(model, folders, calibration, "adamerging", **options)
    assert second.history[0]["loss"] == pytest.approx(first.history[0]["loss"], rel=1e-5)


def test_tasks_without_logits_have_no_entropy(model, folders, calibration, outputs):
    some = {task: outputs[task] for task in ("plain", "mixed")}
    result = nsc_merge.merge(model, folders, calibration, "adamerging", outputs=some, steps=2, progress=False)
    entry = result.history[0]
    assert set(entry["loss"]) == set(some)
    assert entry["objective"] == pytest.approx(sum(entry["loss"].values()) / 2)


@pytest.mark.parametrize("off_diagonal", [0.9, 1.0])
def test_regmean_is_the_dense_form(model, folders, calibration, off_diagonal):
    problem = problem_of(model, folders, calibration)
    ridge = 1e-3
    result = nsc_merge.merge(model, folders, calibration, "regmean", batches=2, off_diagonal=off_diagonal, ridge=ridge)
    for path in ["layers.0.attention.q_proj", "layers.3.attention.o_proj"]:
        base = model.get_submodule(path).weight.double()
        above, below = 0, 0
        for task in folders:
            weights, seen = alone(problem, task), []
            module = model.get_submodule(path)
            hook = module.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
            with torch.no_grad():
                for batch in calibration[task]:
                    functional_call(model, weights, (), batch)
            hook.remove()
            x = torch.cat(seen).flatten(0, 1).double()
            gram = x.T @ x / len(x)
            gram = off_diagonal * gram + (1 - off_diagonal) * torch.diag(gram.diagonal())
            above, below = above + weights[f"{path}.weight"].double() @ gram, below + gram
        regular = ridge * below.diagonal().mean() * torch.eye(len(below), dtype=torch.float64)
        # The ridge draws the merged weight to the base's, not to zero: that is the delta form.
        expected = (above + base @ regular) @ (below + regular).inverse() - base
        torch.testing.assert_close(result.delta(path).double(), expected, rtol=1e-3, atol=1e-5)


def test_regmean_streams_to_the_same_result_and_leaves_out_padding(tmp_path):
    model, folders, calibration = llama(tmp_path)
    options = {"batches": 1, "ridge": 1e-2}
    whole = nsc_merge.merge(model, folders, calibration, "regmean", **options)
    grouped = nsc_merge.merge(model, folders, calibration, "regmean", modules_at_once=2, **options)
    changed = copy.deepcopy(calibration)
    for batches in changed.values():
        batches[0]["input_ids"][1, 5:] = 40
    padded = nsc_merge.merge(model, folders, changed, "regmean", **options)
    for path in whole.paths:
        assert torch.equal(whole.delta(path), grouped.delta(path))
        torch.testing.assert_close(whole.delta(path), padded.delta(path), rtol=1e-5, atol=1e-7)


def test_regmean_of_one_adapter_is_the_adapter(model, folders, calibration):
    one = {"plain": folders["plain"]}
    result = nsc_merge.merge(model, one, {"plain": calibration["plain"]}, "regmean", batches=2, ridge=1e-9)
    for path in result.paths:
        torch.testing.assert_close(
            result.delta(path),
            result.adapters["plain"].factors[path].delta().to(result.delta(path)),
            rtol=1e-4,
            atol=1e-5,
        )


def explicit_fisher(problem, task, batches, output, paths):
    weights = alone(problem, task)
    held = {f"{path}.weight": weights[f"{path}.weight"].clone().requires_grad_() for path in paths}
    sums = {name: torch.zeros_like(value) for name, value in held.items()}
    count = 0
    for batch in batches:
        for n in range(len(next(iter(batch.values())))):
            one = {name: value[n : n + 1] for name, value in batch.items()}
            log_p = output(Dense(problem.model, {**weights, **held}), one).log_softmax(-1)[0]
            for label in range(len(log_p)):
                found = torch.autograd.grad(log_p[label], list(held.values()), retain_graph=True)
                for name, value in zip(held, found, strict=True):
                    sums[name] += log_p[label].exp().detach() * value.square()
            count += 1
    return {path: sums[f"{path}.weight"] / count for path in paths}


def test_fisher_is_per_example_and_exact(model, folders, calibration, outputs):
    problem = problem_of(model, folders, calibration)
    paths = ["layers.0.attention.q_proj", "layers.2.attention.v_proj", "layers.3.attention.o_proj"]
    options = fisher.FisherOptions(outputs=outputs)
    for task in folders:
        found = fisher.information(problem, task, paths, calibration[task], options)
        expected = explicit_fisher(problem, task, calibration[task], outputs[task], paths)
        for path in paths:
            torch.testing.assert_close(found[path], expected[path], rtol=2e-3, atol=1e-6 * expected[path].max())


def test_drawn_labels_approach_the_exact_expectation(model, folders, calibration, outputs):
    problem = problem_of(model, folders, calibration)
    path, task = "layers.3.attention.o_proj", "plain"
    exact = fisher.information(problem, task, [path], calibration[task], fisher.FisherOptions(outputs=outputs))[path]
    drawn = torch.stack(
        [
            fisher.information(
                problem, task, [path], calibration[task], fisher.FisherOptions(outputs=outputs, exact=0, seed=seed)
            )[path]
            for seed in range(40)
        ]
    )
    error = (drawn.mean(0).sum() - exact.sum()) / exact.sum()
    spread = drawn.sum((1, 2)).std() / exact.sum() / 40**0.5
    assert abs(error) < 4 * spread < 0.8


def test_gaussian_information_is_the_squared_jacobian(model, folders, calibration, outputs):
    problem = problem_of(model, folders, calibration)
    path, task = "layers.3.attention.o_proj", "plain"
    options = [fisher.FisherOptions(outputs=outputs, likelihood="gaussian", seed=seed) for seed in range(40)]
    drawn = torch.stack(
        [fisher.information(problem, task, [path], calibration[task], one)[path].sum() for one in options]
    )
    weights, total, count = alone(problem, task), 0.0, 0
    held = weights[f"{path}.weight"].clone().requires_grad_()
    for batch in calibration[task]:
        for n in range(4):
            one = {name: value[n : n + 1] for name, value in batch.items()}
            values = outputs[task](Dense(model, {**weights, f"{path}.weight": held}), one)[0]
            for value in values:
                (found,) = torch.autograd.grad(value, held, retain_graph=True)
                total += found.square().sum().item()
            count += 1
    assert abs(drawn.mean().item() - total / count) < 4 * drawn.std().item() / 40**0.5


def test_fisher_merge_is_the_dense_average(model, folders, calibration, outputs):
    problem = problem_of(model, folders, calibration)
    result = nsc_merge.merge(
        model, folders, calibration, "fisher", batches=2, outputs=outputs, normalise=False, floor=1e-6
    )
    path = "layers.1.attention.q_proj"
    above, below = 0, 0
    for task in folders:
        weight = explicit_fisher(problem, task, calibration[task], outputs[task], [path])[path].clamp(min=1e-6)
        above, below = above + weight * alone(problem, task)[f"{path}.weight"], below + weight
    expected = above / below - model.get_submodule(path).weight
    torch.testing.assert_close(result.delta(path).float(), expected.detach(), rtol=1e-2, atol=1e-4)


def test_match_objective_is_the_explicit_distance(tmp_path):
    model, folders, calibration = llama(tmp_path)
    problem = problem_of(model, folders, calibration)
    for normalise in feature_matching.NORMALISATIONS:
        result = nsc_merge.merge(
            model, folders, calibration, "match", steps=1, normalise=normalise, positions="all", progress=False
        )
        weights = dense_weights(problem, 0.4 * presence(problem))

        def hidden(weights, batch):
            trunk = {name.removeprefix("model."): value for name, value in weights.items() if name != "lm_head.weight"}
            with torch.no_grad():
                found = functional_call(model.base_model, trunk, (), batch).last_hidden_state
            return found[batch["attention_mask"].bool()]

        for task in folders:
            batch = calibration[task][0]
            ours, own = hidden(weights, batch), hidden(alone(problem, task), batch)
            expected = (ours - own).square().mean()
            if normalise == "scale":
                expected = expected / own.square().mean()
            if normalise == "task":
                expected = expected / (own - hidden(dict(model.named_parameters()), batch)).square().mean()
            assert result.history[0]["loss"][task] == pytest.approx(expected.item(), rel=1e-4)


def test_match_gradient_by_finite_differences(model, folders, calibration):
    problem = problem_of(model, folders, calibration)
    options = feature_matching.MatchOptions(steps=1)
    watcher = feature_matching.Watcher(problem, options.features, options.positions)
    present = presence(problem)
    with attached(problem, options) as coefficients:
        targets = feature_matching.Targets(watcher, OwnModels(problem, coefficients, present), "task")
        drawn = [calibration[task][0] for task in folders]

        def value():
            total = 0
            for one in one_by_one(drawn, torch.device("cpu")):
                for number in one.tasks[0]:
                    targets.prepare(number, one)
                coefficients.spread()
                found = watcher.see(one.inputs).features
                total = total + sum(targets.distance(number, one, found) for number in one.tasks[0])
            return total

        (grad,) = torch.autograd.grad(value(), coefficients.flat)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            direction = torch.randn(grad.shape, generator=generator) * present
            with torch.no_grad():
                coefficients.flat += 1e-2 * direction
                up = value()
                coefficients.flat -= 2e-2 * direction
                down = value()
                coefficients.flat += 1e-2 * direction
            assert (grad * direction).sum().item() == pytest.approx(((up - down) / 2e-2).item(), rel=2e-2, abs=1e-3)


def test_match_of_one_adapter_goes_to_one(model, folders, calibration):
    one = {"plain": folders["plain"]}, {"plain": calibration["plain"]}
    result = nsc_merge.merge(
        model, *one, "match", steps=120, lr=4e-2, weight_decay=0.0, schedule="cosine", progress=False
    )
    lam = torch.tensor([row["plain"] for path, row in result.coefficients.items() if path not in result.dead])
    assert result.history[-1]["objective"] < 1e-2 * result.history[0]["objective"]
    assert float((lam - 1).abs().mean()) < 0.15


def test_match_holds_out_its_first_batches_and_keeps_the_best(model, folders, calibration):
    """With a learning rate that only does harm, the start is what is kept."""
    result = nsc_merge.merge(
        model, folders, calibration, "match", steps=12, lr=5.0, hold_out=1, init=0.4, progress=False
    )
    values = [value for row in result.coefficients.values() for value in row.values()]
    assert all(value in (0.0, pytest.approx(0.4)) for value in values)
    assert len(result.history) == 12


def test_warm_up_shares_coefficients_and_then_lets_go(model, folders, calibration):
    def values(steps):
        result = nsc_merge.merge(
            model, folders, calibration, "match", steps=steps, warm_up=4, optimizer="adam", weight_decay=0.0,
            progress=False,
        )  # fmt: skip
        return [row["plain"] for path, row in result.coefficients.items() if path not in result.dead]

    assert max(values(4)) - min(values(4)) < 1e-6
    assert max(values(6)) - min(values(6)) > 1e-4


def test_match_initial_scale_of_one_adapter_is_one(model, folders, calibration):
    problem = problem_of(model, {"plain": folders["plain"]}, {"plain": calibration["plain"]})
    assert feature_matching.best_scale(problem, feature_matching.MatchOptions(init="match")) == 1.0


@pytest.mark.parametrize("method", ["adamerging", "regmean", "fisher", "match"])
def test_same_seed_same_result_and_model_left_alone(model, folders, calibration, outputs, method):
    options = {
        "adamerging": {"outputs": outputs, "steps": 3, "progress": False},
        "regmean": {"batches": 1},
        "fisher": {"outputs": outputs, "batches": 1, "exact": 0},
        "match": {"steps": 3, "progress": False},
    }[method]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    one, two = (nsc_merge.merge(model, folders, calibration, method, **options) for _ in range(2))
    for path in one.paths:
        assert torch.equal(one.delta(path), two.delta(path))
    assert flags == [p.requires_grad for p in model.parameters()]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("method", ["adamerging", "regmean", "fisher", "match"])
@pytest.mark.parametrize("bad", [None, {}, "partial", "empty"])
def test_calibration_errors(model, folders, calibration, outputs, method, bad):
    if bad == "partial":
        bad = {"plain": calibration["plain"]}
    if bad == "empty":
        bad = {**calibration, "mixed": []}
    options = {"outputs": outputs} if method in ("adamerging", "fisher") else {}
    with pytest.raises(ValueError, match="calibration"):
        nsc_merge.merge(model, folders, bad, method, **options)


@pytest.mark.parametrize("options", [{"lr": "x"}, {"steps": 0}, {"share": "layer"}, {"clamp": (1, 0)}, {"steps": -1}])
def test_options_are_checked_also_with_a_matched_init(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
        feature_matching.MatchOptions(init="match", **options)


def test_regmean_names_the_ridge_where_inputs_are_too_few(model, folders, calibration):
    with pytest.raises(ValueError, match="ridge: the Gram matrix .* is singular; expected more batches"):
        few = {task: [{"pixel_values": torch.zeros(1, 1, 8, 8)}] for task in folders}
        nsc_merge.merge(model, folders, few, "regmean", batches=1, ridge=0.0, off_diagonal=1.0)


def test_match_needs_no_family_where_modules_are_named(model, folders, calibration):
    model.config.model_type = "unheard-of"
    nsc_merge.merge(model, folders, calibration, "match", steps=1, features=["layers.3"], progress=False)


def test_a_module_that_runs_twice_counts_both_uses_in_fisher(model, folders, calibration, outputs):
    problem = problem_of(model, {"partial": folders["partial"]}, calibration)
    adapter = problem.adapters["partial"]
    kept = {path: factor for path, factor in adapter.factors.items() if not path.startswith("layers.1.")}
    model.layers[1] = model.layers[0]
    problem = Problem(model, {"partial": replace(adapter, factors=kept)}, calibration)
    path = "layers.0.attention.v_proj"
    options = fisher.FisherOptions(outputs=outputs)
    found = fisher.information(problem, "partial", [path], calibration["partial"], options)[path]
    expected = explicit_fisher(problem, "partial", calibration["partial"], outputs["partial"], [path])[path]
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-6 * expected.max().item())
