"""TSV-Merge, Iso-C, Iso-CTS and WUDI-Merging: the papers' definitions on dense weights, and identities."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from factor_cases import factor, merged, random_adapters, relative, total

from nsc_merge import Adapter, Factor, merge_factors
from nsc_merge.methods import METHODS
from nsc_merge.methods.low_rank.wudi import least_interference

SHAPE = (24, 30)


def of_full_rank(tasks=3, seed=0):
    """Adapters of as many columns as the layer is wide, whose updates have no singular value of zero, and these."""
    adapters = random_adapters((24,) * tasks, (1.0,) * tasks, SHAPE[1], SHAPE[0], "x", seed=seed)
    return adapters, [adapter.factors["x"].delta() for adapter in adapters.values()]


def polar(matrix):
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def test_tsv_is_algorithm_1_on_dense_weights():
    adapters, updates = of_full_rank()
    kept = 24 // 3
    parts = [torch.linalg.svd(update, full_matrices=False) for update in updates]
    U = polar(torch.cat([left[:, :kept] for left, _, _ in parts], 1))
    V = polar(torch.cat([right[:kept] for _, _, right in parts]))
    sigma = torch.cat([values[:kept] for _, values, _ in parts])
    assert relative(factor("tsv", adapters, scale=0.7).delta(), 0.7 * U @ torch.diag(sigma) @ V) < 1e-10


def test_tsv_keeps_the_share_that_is_asked_for():
    adapters, updates = of_full_rank(2)
    kept = 6
    parts = [torch.linalg.svd(update, full_matrices=False) for update in updates]
    U = polar(torch.cat([left[:, :kept] for left, _, _ in parts], 1))
    V = polar(torch.cat([right[:kept] for _, _, right in parts]))
    sigma = torch.cat([values[:kept] for _, values, _ in parts])
    found = factor("tsv", adapters, share=0.25)
    assert relative(found.delta(), U @ torch.diag(sigma) @ V) < 1e-10
    assert found.rank <= 24


def test_tsv_in_a_core_counts_ranks():
    """Of five directions a task keeps two."""
    adapters = random_adapters((4, 1), (1.0, 1.0), paths="x")
    parts = [torch.linalg.svd(adapter.factors["x"].delta(), full_matrices=False) for adapter in adapters.values()]
    numbers = (2, 1)
    U = polar(torch.cat([left[:, :n] for n, (left, _, _) in zip(numbers, parts, strict=True)], 1))
    V = polar(torch.cat([right[:n] for n, (_, _, right) in zip(numbers, parts, strict=True)]))
    sigma = torch.cat([values[:n] for n, (_, values, _) in zip(numbers, parts, strict=True)])
    assert relative(factor("tsv", adapters, room="core").delta(), U @ torch.diag(sigma) @ V) < 1e-10


def test_tsv_of_updates_that_do_not_meet_is_their_sum():
    adapters = random_adapters((3, 2), (2.0, -1.0), 12, 10, "x")
    adapters["0"].factors["x"].A[:, 6:] = 0
    adapters["0"].factors["x"].B[5:] = 0
    adapters["1"].factors["x"].A[:, :6] = 0
    adapters["1"].factors["x"].B[:5] = 0
    assert relative(merged("tsv", adapters, "x")["x"], total(adapters, "x")) < 1e-10
    assert relative(merged("wudi", adapters, "x", ridge=0.0)["x"], total(adapters, "x")) < 1e-10


@pytest.mark.parametrize(("method", "times"), [("tsv", 1), ("wudi", 1)])
def test_equal_updates_merge_to_that_update(method, times):
    """Which is what their ``averages`` says, so that biases are averaged as well."""
    adapters = random_adapters((4,) * 3, (0.7,) * 3, paths="x")
    for adapter in adapters.values():
        adapter.factors["x"] = adapters["0"].factors["x"]
    options = {"ridge": 0.0} if method == "wudi" else {}
    found = merged(method, adapters, "x", **options)["x"]
    assert relative(found, times * adapters["0"].factors["x"].delta()) < 1e-10
    assert METHODS[method].averages is True


def test_iso_c_is_algorithm_1_on_dense_weights():
    adapters, updates = of_full_rank()
    left, sigma, right = torch.linalg.svd(sum(updates), full_matrices=False)
    assert relative(factor("iso_c", adapters, scale=1.3).delta(), 1.3 * sigma.mean() * left @ right) < 1e-10


def test_iso_c_flattens_the_values_that_there_are():
    adapters = random_adapters()
    found = merged("iso_c", adapters)["x"]
    values = torch.linalg.svdvals(found)
    own = torch.linalg.svdvals(total(adapters, "x"))
    assert torch.allclose(values[:12], own[:12].mean(), rtol=1e-10)
    assert float(values[12:].max()) < 1e-10 * float(values[0])
    assert relative(found, merged("core_space", adapters, merge="sum", isotropise=True)["x"]) < 1e-10


@pytest.mark.parametrize(("method", "options"), [("iso_c", {}), ("core_space", {"merge": "sum", "isotropise": True})])
def test_a_direction_that_cancels_but_for_rounding_is_not_made_like_others(method, options):
    """One adapter has the third of 1.1 in its scaling, the other in its factor, rounded to float32."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(width, 4, generator=generator)).Q for width in (24, 32))
    factors = [
        Factor(v[:, :3].t(), torch.cat([1.1 * u[:, :1], 3 * u[:, 1:3]], 1), 1 / 3),
        Factor(v[:, [0, 3]].t(), torch.cat([-u[:, :1] * (1.1 / 3), u[:, 3:]], 1), 1.0),
    ]
    adapters = {str(k): Adapter(str(k), {"x": one}) for k, one in enumerate(factors)}
    found = factor(method, adapters, **options).delta()
    expected = u[:, 1:] @ v[:, 1:].t()
    assert relative(found, expected.double()) < 1e-5


@pytest.mark.parametrize("common", [0.0, 0.5, 0.8, 1.0])
def test_iso_cts_is_algorithm_2_on_dense_weights(common):
    adapters, updates = of_full_rank()
    own = round((24 - int(24 * common)) / 3)
    shared = 24 - 3 * own
    left, sigma, right = torch.linalg.svd(sum(updates), full_matrices=False)
    U, values, V = [left[:, :shared]], [sigma[:shared]], [right[:shared]]
    for update in updates:
        rest = update - U[0] @ U[0].t() @ update
        one = torch.linalg.svd(rest, full_matrices=False)
        U, values, V = [*U, one[0][:, :own]], [*values, one[1][:own]], [*V, one[2][:own]]
    expected = torch.cat(values).mean() * polar(torch.cat(U, 1)) @ polar(torch.cat(V))
    assert relative(factor("iso_cts", adapters, common=common).delta(), expected) < 1e-9
    if common == 1.0:
        assert relative(factor("iso_cts", adapters, common=common).delta(), factor("iso_c", adapters).delta()) < 1e-10


@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
def test_biases_are_averaged_beside_an_isotropic_update(method):
    """As the authors average what is no matrix, before their coefficient."""
    biases = torch.randn(3, 20, generator=torch.Generator().manual_seed(4))
    adapters = random_adapters()
    tasks = {
        task: {"x": replace(one.factors["x"], bias=bias)}
        for (task, one), bias in zip(adapters.items(), biases, strict=True)
    }
    ((_, found),) = merge_factors(tasks, method, scale=1.3)
    expected = 1.3 * (0.7 * biases[0] + 2.0 * biases[1] + biases[2]) / 3
    torch.testing.assert_close(found.bias, expected, rtol=1e-6, atol=1e-7)


def test_iso_cts_takes_no_direction_from_rounding():
    """Every task lies within what is shared, so nothing of its own is left but rounding."""
    adapters = random_adapters((4,) * 3, (0.7,) * 3, paths="x")
    for adapter in adapters.values():
        adapter.factors["x"] = adapters["0"].factors["x"]
    found = factor("iso_cts", adapters, common=1.0)
    values = torch.linalg.svdvals(found.delta())
    assert torch.allclose(values[:4], values[0], rtol=1e-10)
    assert float(values[4:].max()) < 1e-10 * float(values[0])


@pytest.mark.parametrize("tasks", [1, 2, 5, 7])
@pytest.mark.parametrize("common", [0.0, 0.3, 1.0])
def test_iso_cts_of_few_directions(tasks, common):
    adapters = random_adapters((2,) * tasks, (1.0,) * tasks, 5, 4, "x")
    values = torch.linalg.svdvals(factor("iso_cts", adapters, common=common).delta())
    kept = values[values > 1e-10 * values[0]]
    assert torch.allclose(kept, values[0], rtol=1e-10)


def interference(update, updates):
    return sum(((update - one) @ one.t()).square().sum() / one.square().sum() for one in updates)


@pytest.mark.parametrize("ridge", [0.0, 1e-2, 1.0])
def test_wudi_is_the_least_of_its_objective(ridge):
    adapters = random_adapters((4, 2, 5))
    updates = [adapter.factors["x"].delta() for adapter in adapters.values()]
    gram = sum(one.t() @ one / one.square().sum() for one in updates)
    weight = ridge * torch.linalg.eigvalsh(gram)[-1]
    found = factor("wudi", adapters, ridge=ridge).delta().requires_grad_()
    start = sum(updates)
    loss = interference(found, updates) + weight * (found - start).square().sum()
    (gradient,) = torch.autograd.grad(loss, found)
    assert float(gradient.norm()) < 1e-9 * float(start.norm())
    assert float(loss.detach()) < 0.9 * float(interference(start, updates))


def test_wudi_is_where_descent_from_the_sum_arrives():
    """Gradient descent, which leaves what no task sees as it is in the sum, as the update of least distance does."""
    adapters = random_adapters((2, 3), (1.0, 2.0), 12, 10, "x")
    updates = [adapter.factors["x"].delta() for adapter in adapters.values()]
    update = sum(updates)
    gram = sum(one.t() @ one / one.square().sum() for one in updates)
    rate = 1 / float(torch.linalg.eigvalsh(gram)[-1])
    for _ in range(3000):
        update = update - rate * sum((update - one) @ one.t() @ one / one.square().sum() for one in updates)
    assert relative(factor("wudi", adapters, ridge=0.0).delta(), update) < 1e-6


def test_wudi_interferes_less_than_the_authors_steps():
    """300 steps of Adam from the sum at 1e-5, on weights as small as fine-tuning leaves them."""
    adapters = random_adapters((4, 4, 4), (2e-4,) * 3, paths="x")
    updates = [adapter.factors["x"].delta() for adapter in adapters.values()]
    update = sum(updates).clone().requires_grad_()
    optimizer = torch.optim.Adam([update], lr=1e-5)
    for _ in range(300):
        optimizer.zero_grad()
        interference(update, updates).backward()
        optimizer.step()
    theirs = float(interference(update.detach(), updates))
    assert float(interference(factor("wudi", adapters, ridge=0.0).delta(), updates)) <= theirs
    assert theirs < 0.5 * float(interference(sum(updates), updates))


def test_wudi_with_much_ridge_is_the_sum():
    adapters = random_adapters()
    assert relative(merged("wudi", adapters, ridge=1e12)["x"], total(adapters, "x")) < 1e-10


def test_wudi_is_held_where_adapters_are_nearly_alike():
    """As from one start: what tells them apart is small, and fitting it to the last would make it large."""
    adapters = random_adapters((4, 4), (1.0, 1.0), paths="x")
    first, second = adapters["0"].factors["x"], adapters["1"].factors["x"]
    second.A.copy_(first.A + 1e-4 * second.A)
    norm = float(total(adapters, "x").norm())
    assert float(factor("wudi", adapters, ridge=0.0).delta().norm()) > 100 * norm
    assert float(factor("wudi", adapters).delta().norm()) < norm


@pytest.mark.parametrize("part", ["A", "B"])
@pytest.mark.parametrize(("method", "options"), [("tsv", {}), ("tsv", {"room": "core"}), ("iso_cts", {})])
def test_an_update_of_zero_takes_no_share(method, options, part):
    """A module that one of three tasks did not train is merged as of the other two."""
    adapters = random_adapters((8, 8, 8))
    getattr(adapters["1"].factors["x"], part).zero_()
    others = {task: one for task, one in adapters.items() if task != "1"}
    expected = factor(method, others, **options).delta()
    assert relative(factor(method, adapters, **options).delta(), expected) < 1e-9
    for one in adapters.values():
        one.factors["x"].B.zero_()
    assert not factor(method, adapters, **options).delta().any()


def test_wudi_of_nothing():
    zero = torch.zeros(3, 4, dtype=torch.float64)
    assert torch.equal(least_interference([zero, zero], 0.0), zero)
    one = torch.arange(12.0, dtype=torch.float64).view(3, 4)
    assert relative(least_interference([zero, one], 0.0), one) < 1e-12


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("tsv", {"share": 0.0}, "share: expected"),
        ("tsv", {"share": 1.5}, "share: expected"),
        ("tsv", {"room": "house"}, "room: expected one of"),
        ("tsv", {"scale": "much"}, "scale: expected"),
        ("iso_c", {"scale": float("inf")}, "scale: expected"),
        ("iso_cts", {"common": -0.1}, "common: expected"),
        ("iso_cts", {"common": 2}, "common: expected"),
        ("wudi", {"ridge": -1.0}, "ridge: expected"),
    ],
)
def test_bad_options_are_named(method, options, message):
    with pytest.raises(ValueError, match=message):
        METHODS[method].options(**options)
