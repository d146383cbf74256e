"""Model Breadcrumbs and DELLA: what stays of an update, by the papers' and mergekit's definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from factor_cases import random_adapters

import nsc_merge
from nsc_merge.methods import METHODS
from nsc_merge.methods.task_vectors import masks
from nsc_merge.methods.task_vectors.draws import key_of
from nsc_merge.methods.task_vectors.masks import between, probabilities


def merged(method, tasks, **options):
    return {path: factor.delta() for path, factor in nsc_merge.merge_factors(tasks, method, **options)}


@pytest.fixture
def tasks():
    return {
        task: {path: (factor.A.float(), factor.B.float(), factor.scaling) for path, factor in adapter.factors.items()}
        for task, adapter in random_adapters((3, 4, 5)).items()
    }


def updates(tasks, path):
    return [(scaling * B) @ A for A, B, scaling in (row[path] for row in tasks.values())]


def without_ends(update, density, outliers):
    """By sorted thresholds, of values that are all different."""
    magnitude = np.sort(np.abs(update.numpy()).ravel())
    n, kept = len(magnitude), int(density * update.numel())
    top = min(int(outliers * n), n - kept)
    held = magnitude[n - top - kept : n - top]
    return torch.where((update.abs() >= held[0]) & (update.abs() <= held[-1]), update, 0.0)


@pytest.mark.parametrize(("density", "outliers"), [(0.143, 0.007), (0.5, 0.1), (0.9, 0.3), (0.3, 0.0)])
def test_breadcrumbs_leave_both_ends_out(tasks, density, outliers):
    found = merged("breadcrumbs", tasks, density=density, outliers=outliers, scale=0.4)
    for path in "xy":
        expected = 0.4 * sum(without_ends(update, density, outliers) for update in updates(tasks, path))
        torch.testing.assert_close(found[path], expected.double(), rtol=1e-5, atol=1e-6)


def test_equal_entries_are_counted():
    stays = between(torch.ones(3, 4), 0.5, 0.25)
    assert stays.flatten().tolist() == [False] * 3 + [True] * 6 + [False] * 3
    assert torch.equal(between(torch.ones(4, 3).t(), 0.5, 0.25), stays)


@pytest.mark.parametrize("block", [1, 10, 1 << 18])
@pytest.mark.parametrize(("density", "outliers"), [(0.143, 0.007), (0.5, 0.1), (0.9, 0.3), (0.002, 0.9), (0.001, 0)])
def test_what_stays_is_a_range_of_all_entries_in_order(density, outliers, block, monkeypatch):
    monkeypatch.setattr(masks, "_BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(31, 17, generator=generator)
    # All different; few values, many zeros; half of them between two neighbours.
    for update in (drawn, (2 * drawn).round(), drawn.sign() * (1 + (drawn > 0) * 2**-23), torch.zeros(31, 17)):
        entries, kept = update.numel(), int(density * update.numel())
        last = entries - min(int(outliers * entries), entries - kept)
        expected = torch.zeros(entries, dtype=torch.bool)
        expected[update.abs().flatten().sort(stable=True).indices[last - kept : last]] = True
        assert torch.equal(between(update, density, outliers), expected.view(31, 17))


def test_breadcrumbs_elect_as_mergekit(tasks):
    """The sign of the weighted sum; the sum of what agrees, divided by its weights."""
    weights = {"0": 0.7, "1": 0.3, "2": 0.5}
    found = merged("breadcrumbs", tasks, density=0.6, outliers=0.05, elect=True, aggregate="weight", weights=weights)
    for path in "xy":
        kept = torch.stack([without_ends(update, 0.6, 0.05) for update in updates(tasks, path)])
        shares = torch.tensor(list(weights.values())).view(-1, 1, 1)
        votes = shares * kept
        agrees = votes.sign() == torch.where(votes.sum(0) >= 0, 1.0, -1.0)
        divisor = (shares * agrees).sum(0)
        expected = (votes * agrees).sum(0) / torch.where(divisor == 0, 1.0, divisor)
        torch.testing.assert_close(found[path], expected.double(), rtol=1e-5, atol=1e-6)


def test_probabilities_grow_with_the_rank_in_a_row():
    update = torch.tensor([[3.0, -1.0, 0.5, 2.0], [0.0, 4.0, -5.0, 1.0]])
    likely = probabilities(update, 0.5, 0.3)
    expected = torch.tensor([[0.8, 0.4, 0.2, 0.6], [0.2, 0.6, 0.8, 0.4]])
    torch.testing.assert_close(likely, expected)
    assert torch.equal(probabilities(torch.ones(2, 1), 0.4, 0.1), torch.full((2, 1), 0.4))


def of_one_task(rows=64, columns=48):
    generator = torch.Generator().manual_seed(3)
    A, B = torch.randn(8, columns, generator=generator), torch.randn(rows, 8, generator=generator)
    return {"one": {"x": (A, B, 1.0)}}, B @ A


def test_della_keeps_as_often_as_it_should_and_is_right_on_average():
    tasks, update = of_one_task()
    draws = 200
    kept, total = torch.zeros_like(update), torch.zeros_like(update)
    for seed in range(draws):
        found = merged("della", tasks, density=0.6, epsilon=0.2, seed=seed)["x"].float()
        kept += found != 0
        total += found
    likely = probabilities(update, 0.6, 0.2)
    spread = (likely * (1 - likely) / draws) ** 0.5
    # Of 3,072 entries the largest deviation is some 3.6 standard deviations.
    assert float(((kept / draws - likely) / spread).abs().max()) < 5
    assert abs(float((kept / draws).mean()) - 0.6) < 4 * float((0.24 / draws / update.numel()) ** 0.5)
    deviation = (update.square() * (1 / likely - 1) / draws).sqrt()
    assert float(((total / draws - update) / deviation).abs().max()) < 5


@pytest.mark.parametrize("block", [1, 100, 1 << 18])
@pytest.mark.parametrize("rescale", ["inverse", "l1", "none"])
def test_della_draws_one_number_for_each_entry_of_a_module_in_turn(rescale, block, monkeypatch):
    monkeypatch.setattr(masks, "_BLOCK", block)
    tasks, update = of_one_task()
    likely = probabilities(update, 0.6, 0.2)
    drawn = torch.rand(update.shape, generator=torch.Generator().manual_seed(key_of(7, "one", "x")))
    expected = torch.where(drawn < likely, update, 0.0)
    if rescale == "inverse":
        expected = expected / likely
    if rescale == "l1":
        expected = expected * (update.abs().sum() / expected.abs().sum())
    for elect in (False, True):
        found = merged("della", tasks, density=0.6, epsilon=0.2, rescale=rescale, seed=7, elect=elect)["x"].float()
        assert torch.equal(found, expected)


@pytest.mark.parametrize("rescale", ["l1", "none"])
def test_della_rescales_as_it_is_told(rescale):
    tasks, update = of_one_task()
    found = merged("della", tasks, density=0.6, epsilon=0.2, rescale=rescale)["x"].float()
    ratio = (found / update)[found != 0]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-4, atol=0)
    if rescale == "l1":
        torch.testing.assert_close(found.abs().sum(), update.abs().sum(), rtol=1e-5, atol=0)
    else:
        torch.testing.assert_close(ratio[0], torch.tensor(1.0))


def test_della_divides_what_agrees_by_its_weights(tasks):
    """As its authors' code, whose weights say how much of a task there is beside the others, and not in all."""
    weights = {"0": 0.7, "1": 0.3, "2": 0.5}
    found = merged("della", tasks, density=1.0, weights=weights)
    for path in "xy":
        shares = torch.tensor(list(weights.values())).view(-1, 1, 1)
        votes = shares * torch.stack(updates(tasks, path))
        agrees = votes.sign() == torch.where(votes.sum(0) >= 0, 1.0, -1.0)
        expected = (votes * agrees).sum(0) / (shares * agrees).sum(0)
        torch.testing.assert_close(found[path], expected.double(), rtol=1e-5, atol=1e-6)


def test_della_is_seeded_by_task_and_module(tasks):
    first, again, other = (merged("della", tasks, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[path], again[path]) for path in "xy")
    assert not torch.equal(first["x"], other["x"])
    alone = {"1": tasks["1"]}
    swapped = {"1": {"x": tasks["1"]["y"], "y": tasks["1"]["x"]}}
    kept, moved = (merged("della", one)["x"] != 0 for one in (alone, swapped))
    assert not torch.equal(kept, moved)


@pytest.mark.parametrize("method", ["breadcrumbs", "della"])
def test_nothing_left_out_is_task_arithmetic(tasks, method):
    found = merged(method, tasks, density=1.0, elect=False, scale=0.3)
    for path in "xy":
        torch.testing.assert_close(found[path], 0.3 * sum(updates(tasks, path)).double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["breadcrumbs", "della"])
def test_updates_that_are_matrices_count_as_products(tasks, method):
    whole = {
        task: {path: (scaling * B) @ A for path, (A, B, scaling) in row.items()} for task, row in tasks.items()
    }
    factors, matrices = merged(method, tasks), merged(method, whole)
    for path in "xy":
        torch.testing.assert_close(factors[path], matrices[path], rtol=1e-5, atol=1e-6)


def test_an_update_of_zero_stays_zero():
    tasks = {"one": {"x": (torch.randn(2, 6), torch.zeros(5, 2), 1.0)}}
    for method, options in (("breadcrumbs", {"rescale": "l1"}), ("della", {"rescale": "l1"}), ("della", {})):
        assert not merged(method, tasks, **options)["x"].any()


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("breadcrumbs", {"density": 0}, "density: expected"),
        ("breadcrumbs", {"outliers": -0.1}, "outliers: expected"),
        ("breadcrumbs", {"rescale": "inverse"}, "rescale: expected one of"),
        ("breadcrumbs", {"elect": "yes"}, "elect: expected one of"),
        ("della", {"density": 0.1}, "epsilon: expected density - epsilon and density"),
        ("della", {"density": 0.9, "epsilon": 0.1}, "epsilon: expected density - epsilon and density"),
        ("della", {"rescale": "l2"}, "rescale: expected one of"),
        ("della", {"aggregate": "median"}, "aggregate: expected one of"),
        ("della", {"seed": -1}, "seed: expected"),
        ("della", {"weights": {"a": "x"}}, "weights"),
    ],
)
def test_bad_options_are_named(method, options, message):
    with pytest.raises(ValueError, match=message):
        METHODS[method].options(**options)
