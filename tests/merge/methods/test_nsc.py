"""Algorithm 1: objective, optimisation, coefficients without a gradient, options."""

from __future__ import annotations

import copy

import pytest
import torch

import nsc_merge
from nsc_merge.methods import METHODS

BLOCKS = 4
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def run(model, folders, calibration, **options):
    return nsc_merge.merge(model, folders, calibration, **{"steps": 3, "progress": False, **options})


def explicit_ratio(model, adapters, task, batch, paths):
    """Eq. 3 and 4 with projectors, on a densely merged model at 0.4."""
    model = nsc_merge.merge(model, adapters, method="task_arithmetic", scale=0.4).apply(copy.deepcopy(model))
    inputs = {}
    for path in paths:
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: inputs.update({path: args[0]})
        )
    with torch.no_grad():
        model(**batch)
    values = []
    for path in paths:
        A, z = nsc_merge.load_adapter(adapters[task], task).factors[path].A.double(), inputs[path].double()
        null = torch.eye(A.shape[1], dtype=torch.float64) - torch.linalg.pinv(A) @ A
        values.append(((z @ null).norm(dim=-1) / z.norm(dim=-1)).mean())
    return torch.stack(values).mean().item()


def test_first_objective_is_the_mean_of_explicit_projections(model, folders, calibration):
    result = run(model, folders, calibration, steps=1, score_blocks=2)
    paths = [f"layers.{block}.attention.o_proj" for block in (2, 3)]
    assert result.options["scored"] == paths
    entry = result.history[0]
    for task in folders:
        expected = explicit_ratio(model, folders, task, calibration[task][0], paths)
        assert entry["omega"][task] == pytest.approx(expected, abs=2e-5)
    assert entry["objective"] == pytest.approx(sum(entry["omega"].values()) / 3)


def test_ratio_falls_and_only_live_coefficients_move(model, folders, calibration):
    result = run(model, folders, calibration, steps=30, lr=1e-2)
    objectives = [entry["objective"] for entry in result.history]
    # Two batches per task alternate, so steps are compared with steps on the same batches.
    assert objectives[-2] < objectives[0] - 1e-3
    assert objectives[-1] < objectives[1] - 1e-3
    for path, values in result.coefficients.items():
        for task, value in values.items():
            if task == "partial" and path.endswith(("q_proj", "k_proj")):
                assert value == 0.0
            elif task in result.dead.get(path, ()):
                assert value == pytest.approx(0.4, abs=1e-7)
            else:
                assert abs(value - 0.4) > 1e-4


@pytest.mark.parametrize(
    ("options", "dead"),
    [
        ({}, {3: {"o_proj"}}),
        ({"score_modules": ["v_proj"]}, {3: set(PROJECTIONS)}),
        ({"score_blocks": [1]}, {1: {"o_proj"}, 2: set(PROJECTIONS), 3: set(PROJECTIONS)}),
    ],
)
def test_dead_coefficients_are_those_at_and_after_the_last_measurement(model, write_adapter, options, dead):
    folders = {name: write_adapter(name, seed) for seed, name in enumerate("ab", 1)}
    batches = [{"pixel_values": torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))}]
    result = run(model, folders, dict.fromkeys(folders, batches), **options)
    expected = {
        f"layers.{block}.attention.{name}": ["a", "b"] for block, names in dead.items() for name in names
    }
    assert result.dead == expected


def test_a_dead_coefficient_without_one_of_its_name_before_follows_the_last(model, write_adapter, calibration):
    folder = write_adapter("a", 1, target_modules=r"layers\.\d\.attention\.q_proj|layers\.3\.attention\.(k|v|o)_proj")
    result = run(model, {"a": folder}, {"a": calibration["plain"]}, dead="tie_previous", init=0.4)
    (path,) = result.dead
    assert path == "layers.3.attention.o_proj"
    before = [one for one in result.coefficients if one != path][-1]
    assert result.coefficients[path] == result.coefficients[before] != {"a": pytest.approx(0.4, abs=1e-5)}


def test_an_untrained_adapter_has_no_live_coefficient(model, write_adapter, calibration, folders):
    blank = nsc_merge.load_adapter(folders["plain"], "plain")
    for factor in blank.factors.values():
        factor.B.zero_()
    result = run(model, {**folders, "plain": blank}, calibration)
    assert all("plain" in tasks for tasks in result.dead.values())
    assert len(result.dead) == 4 * BLOCKS


def test_equal_seeds_give_equal_coefficients_and_nothing_leaks(model, folders, calibration):
    model.train()
    weights = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    first, second = (run(model, folders, calibration, seed=4) for _ in range(2))
    assert first.coefficients == second.coefficients
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_calibration_cycles_over_lists_and_iterators_alike(model, folders, calibration):
    lists = run(model, folders, calibration, steps=5)
    iterators = run(model, folders, {task: iter(batches) for task, batches in calibration.items()}, steps=5)
    assert lists.coefficients == iterators.coefficients


def test_tasks_that_share_a_batch_share_the_pass_and_nothing_else(model, folders, calibration):
    batches = calibration["plain"]
    copies = {task: [dict(batch) for batch in batches] for task in folders}
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    apart = run(model, folders, copies, steps=4, batch_tasks=False)
    # The steps, and two batches of every task at either end of the comparison.
    assert len(calls) == 12 + 2 * 6
    together = run(model, folders, dict.fromkeys(folders, batches), steps=4)
    assert len(calls) == 24 + 4 + 2 * 2
    for path, values in apart.coefficients.items():
        assert together.coefficients[path] == pytest.approx(values, abs=1e-5)


def test_recipe_paper_supp_cannot_leave_its_start(model, folders, calibration):
    result = run(model, folders, calibration, recipe="paper-supp", steps=10)
    assert result.options["optimizer"] == "adam"
    assert result.options["lr"] == 1e-4
    moved = [
        abs(value - 0.4) for values in result.coefficients.values() for value in values.values() if value
    ]
    assert max(moved) <= 10 * 1e-4 * 1.01


def test_initial_coefficients_per_task(model, folders, calibration):
    result = run(
        model, folders, calibration, steps=1, lr=0.0, init={"plain": 0.1, "mixed": 0.2, "partial": 0.3}
    )
    assert result.coefficients["layers.0.attention.v_proj"] == pytest.approx(
        {"plain": 0.1, "mixed": 0.2, "partial": 0.3}
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 1.0}, "temperature: not an option of method 'nsc'"),
        ({"steps": 0}, "steps: expected a whole number of at least 1, found 0"),
        ({"lr": -1.0}, "lr: expected a finite number of at least 0 and of at most .*, found -1.0"),
        ({"recipe": "best"}, r"recipe: expected one of .*'vlm'.*, found 'best'"),
        ({"init": {"plain": 0.1}}, "init: expected one value for each of"),
        ({"init": float("nan")}, "init: expected a finite number of at least .*, found nan"),
        ({"dead": "drop"}, r"dead: expected one of \['init', 'tie_previous', 'zero'\], found 'drop'"),
        ({"schedule": "step"}, r"schedule: expected one of \['constant', 'cosine', 'linear'\], found 'step'"),
        ({"early_stop": -0.1}, "early_stop: expected a finite number of at least 0, found -0.1"),
        ({"state_every": 0}, "state_every: expected a whole number of at least 1, found 0"),
        ({"batch_tasks": 1}, "batch_tasks: expected one of .*, found 1"),
        ({"score_modules": ["fc1"]}, r"score_modules: no adapter touches \['fc1'\] .* other blocks by score_blocks"),
        (
            {"score_modules": ["q_proj"]},
            r"score_modules: the adapters of \['partial'\] touch none .* touch somewhere: \['o_proj', 'v_proj'\]",
        ),
        ({"score_modules": 3}, "score_modules: expected a list of names, found 3"),
        ({"recipe": [1]}, r"recipe: expected one of .*, found \[1\]"),
        ({"score_blocks": [[1]]}, r"score_blocks: expected block numbers from 0 to 3, found \[\[1\]\]"),
        ({"score_blocks": [True]}, "score_blocks: expected block numbers from 0 to 3"),
        ({"seed": "x"}, "seed: expected a whole number of at least 0, found 'x'"),
        ({"seed": 1.5}, "seed: expected a whole number of at least 0, found 1.5"),
        ({"seed": 2**64}, "seed: expected a whole number below"),
        ({"score_blocks": 9}, "score_blocks: expected 1 to 4 last blocks, found 9"),
        ({"score_blocks": [7]}, "score_blocks: expected block numbers from 0 to 3"),
        ({"method": "magic"}, "method: expected one of"),
        ({"method": "task_arithmetic"}, "steps: not an option of method 'task_arithmetic'"),
    ],
)
def test_bad_options_are_refused_by_name(model, folders, calibration, options, message):
    with pytest.raises(ValueError, match=message):
        nsc_merge.merge(model, folders, calibration, **{"steps": 3, **options})


def test_adapters_of_other_blocks_are_measured_in_the_blocks_that_the_message_asks_for(
    model, calibration, write_adapter
):
    targets = {"early": r".*\b0\..*_proj", "late": r".*\b3\..*_proj"}
    folders = {task: write_adapter(task, 1, target_modules=pattern) for task, pattern in targets.items()}
    drawn = {"early": calibration["plain"], "late": calibration["mixed"]}
    with pytest.raises(ValueError, match=r"of \['early'\] touch none .* blocks \(score_blocks\) of which every"):
        nsc_merge.merge(model, folders, drawn, steps=1)
    found = nsc_merge.merge(model, folders, drawn, steps=1, progress=False, score_blocks=[0, 3])
    assert {path.split(".")[1] for path in found.options["scored"]} == {"0", "3"}


def test_bad_calibration_and_models_are_refused(model, folders, calibration):
    with pytest.raises(ValueError, match="calibration: expected batches for each of"):
        run(model, folders, {"plain": calibration["plain"]})
    with pytest.raises(ValueError, match=r"calibration\['plain'\]: expected at least one batch"):
        run(model, folders, {**calibration, "plain": []})
    with pytest.raises(ValueError, match=r"calibration\['plain'\]: expected dictionaries of model inputs"):
        run(model, folders, {**calibration, "plain": [torch.zeros(1)]})
    with pytest.raises(ValueError, match=r"calibration\['plain'\]: .* found str; of one batch alone make a list"):
        run(model, folders, {**calibration, "plain": {"pixel_values": torch.zeros(1)}})
    broken = [{"pixel_values": torch.full((2, 1, 8, 8), float("nan"))}]
    with pytest.raises(RuntimeError, match="at step 0, the objective of task 'plain' is nan; expected finite"):
        run(model, folders, {**calibration, "plain": broken})
    with pytest.raises(ValueError, match="adapted modules are not in Sequential"):
        run(torch.nn.Sequential(), folders, calibration)
    with pytest.raises(ValueError, match="adapters: expected a mapping"):
        nsc_merge.merge(model, {}, calibration)


@pytest.mark.parametrize("recipe", [0, False, "", [], {}])
def test_recipes_that_are_none_are_refused_by_name(recipe):
    with pytest.raises(ValueError, match="recipe: expected one of"):
        METHODS["nsc"].resolved({"recipe": recipe}, ["a"])
    assert METHODS["nsc"].resolved({"recipe": None}, ["a"]).recipe == "vision"
