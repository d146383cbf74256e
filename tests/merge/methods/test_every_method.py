"""What every method's result can do, shown on the references: factors, factors per task, scaling, saving."""

from __future__ import annotations

import copy
import dataclasses
import json
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import nsc_merge
from nsc_merge.adapters import Adapter, Factor
from nsc_merge.adapters.algebra.low_rank import concatenated
from nsc_merge.methods import METHODS, gradient_free
from nsc_merge.methods.scale_tuning import tune_scale


def outputs(model, images):
    with torch.no_grad():
        return model.eval()(pixel_values=images).last_hidden_state


@pytest.fixture
def summed(model, folders):
    return nsc_merge.merge(model, folders, method="task_arithmetic", scale=1.0)


def dense(result):
    """The same update as a method of full rank would give it."""
    no_rank = {path: gradient_free.empty(result.model.get_submodule(path)) for path in result.paths}
    factors = {
        path: dataclasses.replace(factor, dense=result.delta(path).float()) for path, factor in no_rank.items()
    }
    return dataclasses.replace(result, coefficients={}, factors=factors, method="dense")


def test_every_method_is_described():
    for name, method in METHODS.items():
        assert name == method.name
        assert method.needs <= {"data", "gradients", "outputs", "labels"}
        assert method.tuned is None or method.tuned in method.option_names
        documented = method.options.__doc__ or ""
        assert all(f"{option}:" in documented for option in method.option_names), name


# Of a run, and what the model tells.
ELSEWHERE = {"state_to", "resume_from", "recipe", "score_modules", "score_blocks"}
ANY = {"scale", "init", "svd_scale", "cur_scale"}
SIZES = {"lr", "weight_decay", "early_stop", "ridge", "floor", "cut", "pull", "ratio_weight", "atol"}
SHARES = {"alpha", "common", "drop", "epsilon", "off_diagonal", "outliers", "rtol"}
COUNTS = {"exact", "hold_out", "rows", "seed", "warm_up"}
SWITCHES = {"align", "batch_tasks", "cache_prefix", "checkpointing", "compile", "early_exit", "elect", "fold"}
SWITCHES |= {"include_pad", "isotropise", "normalise", "null_directions", "progress", "regmean", "rescale", "ring"}
TAKEN = {float("nan"): set(), "no such": set(), -1: ANY, 1.5: ANY | SIZES}
TAKEN |= {0: ANY | SIZES | SHARES | COUNTS, True: SWITCHES}


@pytest.mark.parametrize("name", METHODS)
def test_every_option_refuses_what_it_has_no_meaning_for(name):
    options = METHODS[name].options
    for option in {field.name for field in dataclasses.fields(options)} - ELSEWHERE:
        for value, takers in TAKEN.items():
            if option not in takers:
                with pytest.raises((TypeError, ValueError), match=rf"\b{option}\b.*: expected"):
                    options(**{option: value})


def test_unknown_options_are_refused_by_name(model, folders):
    with pytest.raises(ValueError, match=r"steps: not an option of method 'task_arithmetic' \(options: scale\)"):
        nsc_merge.merge(model, folders, method="task_arithmetic", steps=3)
    with pytest.raises(ValueError, match=r"lr: not an option of method 'zero_shot' \(options: none\)"):
        nsc_merge.merge(model, folders, method="zero_shot", lr=1.0)


@pytest.mark.parametrize("scale", [float("nan"), "0.3", True, {"plain": 0.1}])
def test_scales_are_checked(model, folders, scale):
    with pytest.raises(ValueError, match="scale: expected"):
        nsc_merge.merge(model, folders, method="task_arithmetic", scale=scale)


def test_task_arithmetic_with_a_scale_per_task(model, folders, summed):
    scales = {"plain": 0.1, "mixed": 0.2, "partial": 0.3}
    result = nsc_merge.merge(model, folders, method="task_arithmetic", scale=scales)
    path = "layers.1.attention.v_proj"
    expected = sum(scales[task] * adapter.factors[path].delta() for task, adapter in summed.adapters.items())
    torch.testing.assert_close(result.delta(path), expected)


def test_zero_shot_changes_nothing(model, folders, images):
    result = nsc_merge.merge(model, folders, method="zero_shot")
    assert torch.equal(outputs(result.apply(copy.deepcopy(model)), images), outputs(model, images))


def test_finetuned_is_each_adapter_alone(model, folders, images):
    result = nsc_merge.merge(model, folders, method="finetuned")
    for task, folder in folders.items():
        expected = outputs(PeftModel.from_pretrained(copy.deepcopy(model), folder), images)
        merged = result.for_task(task).apply(copy.deepcopy(model))
        torch.testing.assert_close(outputs(merged, images), expected, rtol=2e-5, atol=2e-5)


def test_without_a_task_chosen_nothing_is_applied(model, folders, tmp_path):
    result = nsc_merge.merge(model, folders, method="finetuned")
    with pytest.raises(ValueError, match="take one with for_task"):
        result.apply(copy.deepcopy(model))
    with pytest.raises(ValueError, match="task: expected one of .*, found 'other'"):
        result.for_task("other")


def test_scaled_multiplies_coefficients_factors_and_tasks_alike(model, folders, summed):
    path = "layers.0.attention.v_proj"
    half = summed.scaled(0.5)
    assert half.options["scale"] == 0.5
    torch.testing.assert_close(half.delta(path), 0.5 * summed.delta(path))
    torch.testing.assert_close(dense(summed).scaled(0.5).delta(path), 0.5 * dense(summed).delta(path))
    alone = nsc_merge.merge(model, folders, method="finetuned")
    scaled = alone.scaled(2.0).for_task("mixed").delta(path)
    torch.testing.assert_close(scaled, 2.0 * alone.for_task("mixed").delta(path))
    by_task = dataclasses.replace(alone, options={"scale": {"plain": 0.5, "mixed": -1.0}})
    assert by_task.scaled(2.0).options["scale"] == {"plain": 1.0, "mixed": -2.0}
    with pytest.raises(ValueError, match="scale: expected a finite number, found inf"):
        summed.scaled(float("inf"))


def test_every_task_is_saved_into_a_folder_of_its_own(model, folders, images, tmp_path):
    result = nsc_merge.merge(model, folders, method="finetuned")
    out = result.save(tmp_path / "alone", ["lora", "model"])
    assert not (out / "coefficients.json").exists()
    for task, folder in folders.items():
        saved = out / "tasks" / task
        expected = outputs(PeftModel.from_pretrained(copy.deepcopy(model), folder), images)
        reloaded = PeftModel.from_pretrained(copy.deepcopy(model), saved / "lora")
        torch.testing.assert_close(outputs(reloaded, images), expected, rtol=2e-5, atol=2e-5)
        assert (saved / "model" / "model.safetensors").is_file()
    # Modules that a task does not touch are left out, not written with rank 0.
    config = json.loads((out / "tasks" / "partial" / "lora" / "adapter_config.json").read_text())
    assert {path.rsplit(".", 1)[-1] for path in config["target_modules"]} == {"v_proj", "o_proj"}


def test_an_update_of_full_rank_needs_a_rank(summed, tmp_path):
    with pytest.raises(ValueError, match="full rank.*expected a rank to truncate to"):
        dense(summed).save(tmp_path / "out", "lora")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="format 'coefficients': method 'dense' gives none"):
        dense(summed).save(tmp_path / "out", "coefficients")


def test_truncating_a_dense_update_is_truncating_its_factors(summed, tmp_path):
    expected = summed.rank_errors(5)
    found = dense(summed).rank_errors(5)
    assert max(expected.values()) > 0.05
    assert found == pytest.approx(expected, abs=1e-6)
    out = dense(summed).save(tmp_path / "out", "lora", rank=5)
    written = json.loads((out / "truncation.json").read_text())["relative_error"]
    assert written == pytest.approx(expected, abs=1e-6)


WIDE = {
    "close values": lambda drawn: drawn,
    "tall": lambda drawn: drawn.t(),
    "trimmed": lambda drawn: torch.where(drawn.abs() > 1, drawn, 0.0),
    "falling values": lambda drawn: drawn * 0.95 ** torch.arange(260.0).double(),
    "rank 5": lambda drawn: drawn[:, :5] @ drawn[:5],
    "rank 30": lambda drawn: drawn[:, :30] @ drawn[:30],
    "huge": lambda drawn: 1e140 * drawn,
    "tiny": lambda drawn: 1e-200 * drawn,
    "zero": torch.zeros_like,
}


@pytest.mark.parametrize("case", WIDE)
def test_truncating_a_wide_dense_update_is_its_best(case, monkeypatch):
    from nsc_merge.adapters.algebra import low_rank

    drawn = torch.randn(210, 260, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    delta = WIDE[case](drawn)
    expected, _, best = low_rank._low_rank_of_dense(delta, 8)
    monkeypatch.setattr(low_rank, "_SVD_WIDTH", 100)
    A, B, error = low_rank._low_rank_of_dense(delta, 8)
    # Directions of a zero are rounding's.
    assert len(expected) - len(A) in ((0,) if case != "rank 5" else (0, 1, 2, 3))
    assert len(A) == 0 if case == "zero" else len(A) >= 5
    assert error == pytest.approx(best, abs=1e-9)
    left, sigma, right = torch.linalg.svd(delta, full_matrices=False)
    product = (left[:, :8] * sigma[:8]) @ right[:8]
    assert float((B @ A - product).abs().max()) <= 1e-5 * float(product.abs().max())
    repeated = low_rank._low_rank_of_dense(delta, 8)
    assert torch.equal(repeated[0], A)
    assert torch.equal(repeated[1], B)


def test_any_directions_do_where_all_values_are_equal(monkeypatch):
    from nsc_merge.adapters.algebra import low_rank

    monkeypatch.setattr(low_rank, "_SVD_WIDTH", 100)
    delta = torch.linalg.qr(torch.randn(200, 200, generator=torch.Generator().manual_seed(0)).double()).Q
    A, B, error = low_rank._low_rank_of_dense(delta, 8)
    assert len(A) == 8
    assert error == pytest.approx((192 / 200) ** 0.5, abs=1e-9)
    torch.testing.assert_close((B @ A) @ (B @ A).t() @ (B @ A), B @ A)


def test_nothing_to_save(model, folders, tmp_path):
    with pytest.raises(ValueError, match="update of method 'zero_shot' is zero"):
        nsc_merge.merge(model, folders, method="zero_shot").save(tmp_path / "none", "lora")
    assert not (tmp_path / "none").exists()


def test_what_is_no_low_rank_matrix_is_merged_by_task_arithmetic(model, write_adapter):
    """Biases follow ``scale``, divided by the number of tasks for methods that average."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        """scale: of the update."""

        scale: float = 1.0

    def first(adapters, paths, options):
        for path in paths:
            factor = next(iter(gradient_free.present(adapters, path).values()))
            yield path, Factor(factor.A, options.scale * factor.scaling * factor.B, 1.0)

    folders = {name: write_adapter(name, seed, lora_bias=True) for seed, name in enumerate("ab", 1)}
    adapters = {name: nsc_merge.load_adapter(folder, name) for name, folder in folders.items()}
    path = "layers.0.attention.q_proj"
    for averages, share in ((False, 0.5), (True, 0.25)):
        method = gradient_free.gradient_free("first", "", "", Options, first, averages=averages)
        result = method.run(gradient_free.Problem(model, adapters), {"scale": 0.5})
        torch.testing.assert_close(result.delta(path), 0.5 * adapters["a"].factors[path].delta())
        biases = [adapter.factors[path].bias_delta() for adapter in adapters.values()]
        torch.testing.assert_close(result.bias_delta(path), share * sum(biases), rtol=1e-6, atol=1e-7)


LORA, WHOLE = "layers.0.attention.q_proj", "layers.0.mlp.fc1"


def with_the_rest(model, seeds):
    """Adapters with a bias beside their factors, and one linear trained in full."""

    def one(task, seed):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        rows, columns = model.get_submodule(WHOLE).weight.shape
        empty = gradient_free.empty(model.get_submodule(WHOLE))
        lora = Factor(normal(4, 32), normal(32, 4), 1.5, bias=normal(32))
        whole = dataclasses.replace(empty, dense=normal(rows, columns), bias=normal(rows))
        return Adapter(task, {LORA: lora, WHOLE: whole})

    return {task: one(task, seed) for task, seed in seeds.items()}


ALL, NO_DROP = {"density": 1.0, "scale": 1.0}, {"density": 1.0, "scale": 1.0, "drop": 0.0}


@pytest.mark.parametrize(
    ("method", "options", "times"),
    [
        ("core_space", ALL, 1),
        ("core_space", {**ALL, "aggregate": "sum"}, 3),
        ("core_space", {"merge": "sum"}, 3),
        ("core_space", {**NO_DROP, "merge": "dare"}, 3),
        ("core_space", {**NO_DROP, "merge": "dare_ties"}, 1),
        ("lora_lego", {}, 1),
        ("emr_unified", {}, 1),
        ("ties", ALL, 1),
        ("ties", {**ALL, "preset": "mergekit"}, 1),
        ("ties", {**ALL, "preset": "adamerging"}, 3),
        ("ties", {**ALL, "preset": "peft", "trim_scope": "factors"}, 1),
        ("dare", {"drop": 0.0}, 3),
        ("dare_ties", NO_DROP, 1),
        ("dare_ties", {**NO_DROP, "preset": "mergekit"}, 3),
        ("knots_ties", ALL, 1),
        ("knots_ties", {**ALL, "aggregate": "sum"}, 3),
        ("knots_dare_ties", NO_DROP, 1),
        ("knots_dare_ties", {**NO_DROP, "aggregate": "sum"}, 3),
        ("svd", {}, 3),
        ("svd_cur", {"svd_density": 1.0, "cur_density": 1.0}, 1),
        ("fr", {"preset": "nsc", "cut": 0.0, "scale": 1.0}, 3),
        ("magnitude_prune", {"density": 1.0}, 3),
        ("breadcrumbs", {"density": 1.0}, 3),
        ("breadcrumbs", {"density": 1.0, "elect": True, "aggregate": "mean"}, 1),
        ("della", {"density": 1.0}, 1),
        ("della", {"density": 1.0, "elect": False}, 3),
        ("tsv", {}, 1),
        ("wudi", {"ridge": 0.0}, 1),
        ("robustmerge_alg1", {"density": 1.0}, 1),
    ],
)
def test_biases_and_whole_linears_follow_the_factors(model, method, options, times):
    """Three copies of an adapter merge to it or to their sum, and so does what has no factors."""
    adapters = with_the_rest(model, dict.fromkeys("abc", 1))
    result = METHODS[method].run(gradient_free.Problem(model, adapters), options)
    for path, own in adapters["a"].factors.items():
        torch.testing.assert_close(result.delta(path), times * own.delta(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(result.bias_delta(path), times * own.bias_delta(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["ties", "svd", "linear", "core_space", "fr"])
def test_an_update_that_is_not_finite_is_refused(model, folders, method):
    chosen = {"plain": folders["plain"]}
    with pytest.raises(ValueError, match=r"scale: the merged update of layers\..* is not finite with scale=1e\+39"):
        nsc_merge.merge(model, chosen, method=method, scale=1e39)


@pytest.mark.parametrize("part", ["dense", "bias"])
def test_a_part_that_is_not_finite_is_refused(model, part):
    adapters = with_the_rest(model, {"a": 1, "b": 2})
    getattr(adapters["b"].factors[WHOLE], part).fill_(3e38)
    with pytest.raises(ValueError, match=f"scale: the merged update of {WHOLE} is not finite with scale=2"):
        METHODS["svd"].run(gradient_free.Problem(model, adapters), {"scale": 2.0})


@pytest.mark.parametrize("method", ["ties", "svd"])
def test_a_linear_that_one_task_trained_in_full_and_others_did_not_has_both(model, method):
    adapters = with_the_rest(model, {"a": 1, "b": 2, "c": 3})
    rows = len(model.get_submodule(WHOLE).weight)
    for task in "bc":
        adapters[task].factors[WHOLE] = Factor(torch.randn(4, 32), torch.randn(rows, 4), 1.5)
    # Of the first task nothing else, as entries are trimmed over all modules of a task.
    adapters["a"] = Adapter("a", {WHOLE: adapters["a"].factors[WHOLE]})
    factors = {task: adapters[task] for task in "bc"}
    found, without = (
        METHODS[method].run(gradient_free.Problem(model, given), {"scale": 0.5}) for given in (adapters, factors)
    )
    assert without.delta(WHOLE).norm() > 0
    wanted = without.delta(WHOLE) + 0.5 * adapters["a"].factors[WHOLE].delta()
    torch.testing.assert_close(found.delta(WHOLE), wanted, rtol=1e-5, atol=1e-5)


def test_robustmerge_takes_the_mean_of_whole_linears(model):
    adapters = with_the_rest(model, {"a": 1, "b": 2})
    result = METHODS["robustmerge"].run(gradient_free.Problem(model, adapters), {"scale": 0.5})
    mean = (adapters["a"].factors[WHOLE].dense + adapters["b"].factors[WHOLE].dense).double() / 2
    torch.testing.assert_close(result.delta(WHOLE), 0.5 * mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "options", "shares"),
    [
        ("svd", {}, (3.0, -1.0)),
        ("linear", {}, (3.0, -1.0)),
        ("ties", {"scale": 0.5}, (0.75, -0.25)),
        ("ties", {"preset": "mergekit"}, (1.5, -0.5)),
        ("ties", {"preset": "nsc"}, (0.9, -0.3)),
        ("dare_ties", {}, (1.5, -0.5)),
        ("knots_ties", {"scale": 1.0}, (1.5, -0.5)),
        ("knots_dare_ties", {"scale": 1.0, "aggregate": "weight"}, (1.5, -0.5)),
    ],
)
def test_weights_count_for_biases_and_whole_linears(model, method, options, shares):
    adapters = with_the_rest(model, {"a": 1, "b": 2})
    given = {**options, "weights": {"a": 3.0, "b": -1.0}}
    result = METHODS[method].run(gradient_free.Problem(model, adapters), given)
    own = [adapter.factors[WHOLE] for adapter in adapters.values()]
    for found, parts in (
        (result.delta(WHOLE), [factor.delta() for factor in own]),
        (result.bias_delta(WHOLE), [factor.bias_delta() for factor in own]),
    ):
        expected = sum(share * part for share, part in zip(shares, parts, strict=True))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", [(0.1, 0.2, -0.3), (0.5, 0.5, -1.0), (1e-9, 2e-9, -3e-9)])
def test_weights_that_cancel_divide_by_nothing(model, weights):
    """0.1 + 0.2 - 0.3 is 6e-17, not 0."""
    adapters = with_the_rest(model, {"a": 1, "b": 2, "c": 3})
    given = dict(zip("abc", weights, strict=True))
    result = METHODS["ties"].run(gradient_free.Problem(model, adapters), {"preset": "mergekit", "weights": given})
    own = {task: adapter.factors[WHOLE] for task, adapter in adapters.items()}
    for found, part in ((result.delta(WHOLE), Factor.delta), (result.bias_delta(WHOLE), Factor.bias_delta)):
        expected = sum(given[task] * part(factor) for task, factor in own.items())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * max(map(abs, weights)))


def test_small_weights_that_do_not_cancel_average_as_large_ones_do(model):
    adapters = with_the_rest(model, {"a": 1, "b": 2})
    found, expected = (
        METHODS["ties"].run(
            gradient_free.Problem(model, adapters), {"preset": "mergekit", "weights": {"a": size, "b": 3 * size}}
        )
        for size in (1e-12, 1.0)
    )
    torch.testing.assert_close(found.bias_delta(WHOLE), expected.bias_delta(WHOLE))


def test_scores_that_are_nan_are_never_chosen(summed):
    tuned = tune_scale(summed, lambda result: float("nan") if result.options["scale"] < 0.45 else 1.0)
    assert (tuned.scale, tuned.score) == (pytest.approx(0.5), 1.0)


def test_tuning_sweeps_coarsely_then_finely(summed):
    tried = []

    def evaluate(result):
        tried.append(result.options["scale"])
        return -abs(result.options["scale"] - 0.337)

    tuned = tune_scale(summed, evaluate)
    assert tuned.scale == pytest.approx(0.34)
    assert tuned.result.options["scale"] == pytest.approx(0.34)
    assert tried[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert sorted(tried[10:]) == pytest.approx([0.01 * step for step in range(21, 40) if step != 30])
    assert len(tuned.trail) == len(tried)
    with pytest.raises(ValueError, match="coarse: expected at least one scale"):
        tune_scale(summed, evaluate, coarse=())


def test_the_method_that_the_architecture_page_shows(model, folders, summed):
    page = (Path(__file__).parents[3] / "docs" / "architecture.md").read_text(encoding="utf-8")
    code = textwrap.dedent(page.split("```python\n")[1].split("```")[0])
    known = {"dataclass": dataclass, "Factor": Factor, "concatenated": concatenated, "present": gradient_free.present}
    names = {**known, "gradient_free": gradient_free.gradient_free}
    exec(code, names)
    (method,) = names["METHODS"]
    result = method.run(gradient_free.Problem(model, summed.adapters), {})
    for path in result.paths:
        held = gradient_free.present(summed.adapters, path)
        mean = torch.stack([factor.delta() for factor in held.values()]).mean(0)
        torch.testing.assert_close(result.delta(path), mean, rtol=0, atol=1e-6)
