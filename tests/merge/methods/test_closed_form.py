"""RegMean and Fisher merging against explicit computations on dense weights."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from data_cases import Dense, alone, llama, problem_of
from torch.func import functional_call
from zoo import build, images_and_text, write_adapter

import nsc_merge
from nsc_merge.methods import Problem
from nsc_merge.methods.closed_form import fisher


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


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_a_bias_of_one_task_is_averaged_over_all(model, folders, calibration, outputs, method):
    """Also over a task without the module, whose inputs count in its weight, too."""
    options = {"outputs": outputs} if method == "fisher" else {}
    adapters = {task: nsc_merge.load_adapter(folder, task) for task, folder in folders.items()}
    path = "layers.0.attention.q_proj"
    held = adapters["plain"].factors[path]
    bias = torch.arange(len(held.B)) + 1.0
    adapters["plain"].factors[path] = replace(held, bias=bias)
    assert len(adapters) == 3
    assert path not in adapters["partial"].factors
    result = nsc_merge.merge(model, adapters, calibration, method, batches=2, scale=0.5, **options)
    expected = 0.5 * adapters["plain"].factors[path].bias_delta() / 3
    torch.testing.assert_close(result.bias_delta(path), expected, rtol=1e-6, atol=1e-7)


def test_regmean_names_the_ridge_where_inputs_are_too_few(model, folders, calibration):
    with pytest.raises(ValueError, match="ridge: the Gram matrix .* is singular; expected more batches"):
        few = {task: [{"pixel_values": torch.zeros(1, 1, 8, 8)}] for task in folders}
        nsc_merge.merge(model, folders, few, "regmean", batches=1, ridge=0.0, off_diagonal=1.0)


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


def test_fisher_of_modules_that_do_not_run_is_refused(tmp_path):
    model = build("llava")
    settings = {"r": 2, "target_modules": r".*vision_tower.*q_proj"}
    folders = {task: write_adapter(model, tmp_path / task, seed, **settings) for seed, task in enumerate("ab")}
    words = {"input_ids": torch.randint(6, 60, (2, 5))}
    with pytest.raises(ValueError, match=r"calibration\['a'\]: none of the adapted modules runs on these inputs"):
        nsc_merge.merge(model, folders, {task: [words] for task in folders}, "fisher")


def test_regmean_takes_texts_beside_images_where_the_vision_tower_is_adapted(tmp_path):
    model = build("llava")
    both = r".*(vision_tower|language_model).*q_proj"
    folders = {
        "images": write_adapter(model, tmp_path / "images", 1, r=2, target_modules=both),
        "texts": write_adapter(model, tmp_path / "texts", 2, r=2, target_modules=r".*language_model.*q_proj"),
    }
    images, words = images_and_text(3), {"input_ids": torch.randint(6, 60, (2, 5))}
    result = nsc_merge.merge(model, folders, {"images": [images], "texts": [words]}, "regmean", batches=1, ridge=1e-9)
    for path in result.paths:
        if "vision_tower" in path:
            alone = result.adapters["images"].factors[path].delta()
            torch.testing.assert_close(result.delta(path).double(), alone, rtol=1e-3, atol=1e-5)
    with pytest.raises(RuntimeError, match=r"calibration\['images'\]: the forward never reached .*vision_tower"):
        nsc_merge.merge(model, folders, {"images": [words], "texts": [words]}, "regmean", batches=1)
