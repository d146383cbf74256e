"""SVD, linear, KnOTS, Core Space, CUR, LoRA-LEGO and RobustMerge: identities, and dense definitions."""

from __future__ import annotations

import math

import pytest
import torch
from factor_cases import (
    FLATTENING,
    FUNCTIONS,
    INVARIANT,
    NEED_EQUAL_RANKS,
    factor,
    merged,
    random_adapters,
    relative,
    total,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from nsc_merge.adapters import Adapter, Factor
from nsc_merge.methods import METHODS
from nsc_merge.methods.low_rank import core_space, knots, svd_and_linear, svd_cur
from nsc_merge.methods.low_rank.common_bases import cores


def summing(source, tasks):
    for path, row in tasks.items():
        yield path, torch.stack([source(path, task) for task in row]).sum(0)


def dense_ties(stack, density):
    """TIES-Merging of vectors ``[K, n]`` as its authors define it, for values that do not cancel."""
    # What differs by rounding only, as the coefficients of columns that CUR keeps, is equally large.
    magnitudes = stack.abs().float()
    least = magnitudes.kthvalue(stack.shape[1] - int(stack.shape[1] * density), dim=1, keepdim=True).values
    kept = torch.where(magnitudes >= least, stack, 0.0)
    agrees = (kept != 0) & (kept.sign() == kept.sum(0).sign())
    return (kept * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def of_x(adapters):
    return {task: adapter.factors["x"] for task, adapter in adapters.items()}


@st.composite
def families(draw):
    """Adapters of one module with any shapes, ranks, scalings, and factors of deficient rank."""
    ranks = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    scalings = [draw(st.sampled_from([0.5, 2.0, -1.0])) for _ in ranks]
    d_in, d_out = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    adapters = random_adapters(ranks, scalings, d_in, d_out, "x", seed=draw(st.integers(0, 9)))
    for adapter in adapters.values():
        factor = adapter.factors["x"]
        deficient = draw(st.sampled_from(["no", "A", "B", "zero"]))
        if deficient == "A":
            factor.A[-1] = factor.A[0]
        elif deficient == "B":
            factor.B[:, -1] = 2 * factor.B[:, 0]
        elif deficient == "zero":
            factor.B.zero_()
    return adapters


@settings(max_examples=40, deadline=None, derandomize=True)
@given(families(), st.sampled_from(knots.ALONG), st.sampled_from(knots.VECTORS), st.sampled_from(core_space.BASES))
def test_sums_in_any_bases_are_task_arithmetic(adapters, along, vectors, bases):
    """KnOTS and Core Space without TIES, SVD without truncation, and every column of CUR: none loses anything."""
    expected = total(adapters, "x")
    ranks = sum(adapter.factors["x"].rank for adapter in adapters.values())
    options = knots.KnotsTiesOptions(along=along, vectors=vectors, atol=1e-12, scale=1.0)
    found = {
        "knots": dict(knots.knots(adapters, ["x"], options, summing))["x"],
        "core_space": factor("core_space", adapters, merge="sum", bases=bases),
        "svd": factor("svd", adapters),
    }
    for name, update in found.items():
        assert update.rank <= ranks, name
        torch.testing.assert_close(update.delta(), expected, rtol=1e-10, atol=1e-10, msg=name)
    columns = svd_cur.decompose(of_x(adapters), svd_cur.SVDCUROptions(columns=10_000))
    for task, adapter in adapters.items():
        rebuilt = columns.U @ columns.C @ columns.coefficients[task]
        torch.testing.assert_close(rebuilt, adapter.factors["x"].delta(), rtol=1e-8, atol=1e-8)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(families())
def test_bases_are_orthonormal_and_as_large_as_the_rank(adapters):
    factors = of_x(adapters)
    ups = torch.cat([f.scaling * f.B for f in factors.values()], 1)
    downs = torch.cat([f.A for f in factors.values()])
    for common in (cores(factors), cores(factors).by_updates()):
        p, q = common.U.shape[1], common.V.shape[0]
        torch.testing.assert_close(common.U.t() @ common.U, torch.eye(p).double(), rtol=0, atol=1e-12)
        torch.testing.assert_close(common.V @ common.V.t(), torch.eye(q).double(), rtol=0, atol=1e-12)
        for task, f in factors.items():
            torch.testing.assert_close(common.U @ common.M[task] @ common.V, f.delta(), rtol=1e-10, atol=1e-10)
    assert cores(factors).U.shape[1] == torch.linalg.matrix_rank(ups)
    assert cores(factors).V.shape[0] == torch.linalg.matrix_rank(downs)
    updates = [f.delta() for f in factors.values()]
    assert cores(factors).by_updates().U.shape[1] == torch.linalg.matrix_rank(torch.cat(updates, 1))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(families(), st.sampled_from([m for m in FUNCTIONS if m not in NEED_EQUAL_RANKS]))
def test_every_method_takes_any_shapes(adapters, method):
    update = factor(method, adapters)
    assert update.delta().shape == total(adapters, "x").shape
    assert torch.isfinite(update.delta()).all()
    assert update.rank <= sum(adapter.factors["x"].rank for adapter in adapters.values())


def test_svd_truncates_best():
    adapters = random_adapters()
    left, sigma, right = torch.linalg.svd(total(adapters, "x"))
    best = (left[:, :5] * sigma[:5]) @ right[:5]
    found = factor("svd", adapters, rank=5)
    assert found.rank == 5
    assert relative(found.delta(), best) < 1e-12


@pytest.mark.parametrize("preset", svd_and_linear.PRESETS)
def test_linear_adds_factors(preset):
    adapters = random_adapters()
    weights = {"0": 0.5, "1": -1.0, "2": 2.0}
    shares = {task: weights[task] * adapter.factors["x"].scaling for task, adapter in adapters.items()}
    A = B = 0
    for task, adapter in adapters.items():
        root = math.sqrt(abs(shares[task]))
        A = A + adapter.factors["x"].A * (math.copysign(root, shares[task]) if preset == "peft" else 1.0)
        B = B + adapter.factors["x"].B * (root if preset == "peft" else shares[task])
    found = factor("linear", adapters, weights=weights, preset=preset, scale=0.3)
    assert found.rank == 4
    assert relative(found.delta(), 0.3 * B @ A) < 1e-12


@pytest.mark.parametrize("method", [method for method in FUNCTIONS if method not in FLATTENING])
def test_one_adapter_is_reproduced(method):
    """By every method that neither drops nor clusters, once told to keep everything."""
    options = {
        "knots_ties": {"density": 1.0, "scale": 1.0},
        "knots_dare_ties": {"density": 1.0, "scale": 1.0, "drop": 0.0},
        "core_space": {"density": 1.0},
        "svd_cur": {"svd_density": 1.0, "cur_density": 1.0},
        "robustmerge": {"density": 1.0, "scale": 0.25},
        "robustmerge_alg1": {"density": 1.0},
    }.get(method, {})
    adapters = random_adapters((4,), (0.7,))
    for path, update in merged(method, adapters, **options).items():
        assert relative(update, total(adapters, path)) < 1e-10


@pytest.mark.parametrize("method", FUNCTIONS)
def test_absent_tasks_count_for_nothing(method):
    """A module that only two of three tasks touch is merged as if there were only these two."""
    keep_all = {
        "knots_ties": {"density": 1.0},
        "knots_dare_ties": {"density": 1.0},
        "svd_cur": {"svd_density": 1.0, "cur_density": 1.0},
    }.get(method, {})
    adapters = random_adapters()
    del adapters["1"].factors["x"]
    expected = merged(method, {task: adapters[task] for task in "02"}, "x", **keep_all)["x"]
    assert relative(merged(method, adapters, **keep_all)["x"], expected) < 1e-12


@pytest.mark.parametrize("along", knots.ALONG)
@pytest.mark.parametrize("vectors", knots.VECTORS)
def test_knots_is_its_definition(along, vectors):
    """Against the dense SVD of all updates next to one another, and TIES over the aligned vectors of all modules."""
    adapters = random_adapters((4, 2, 5))
    bases, parts = [], []
    for path in "xy":
        updates = [adapter.factors[path].delta() for adapter in adapters.values()]
        if along == "rows":
            updates = [update.t() for update in updates]
        left, sigma, right = torch.linalg.svd(torch.cat(updates, 1), full_matrices=False)
        kept = sigma > 1e-5
        onto = sigma[kept] if vectors == "scaled" else torch.ones_like(sigma[kept])
        bases.append(left[:, kept] * (sigma[kept] / onto))
        parts.append(torch.stack((onto[:, None] * right[kept]).split(updates[0].shape[1], 1)))
    flat = dense_ties(torch.cat([part.flatten(1) for part in parts], 1), 0.2).split([p[0].numel() for p in parts])
    found = merged("knots_ties", adapters, along=along, vectors=vectors, density=0.2, scale=0.6)
    for path, basis, part, values in zip("xy", bases, parts, flat, strict=True):
        expected = 0.6 * basis @ values.view_as(part[0])
        assert relative(found[path], expected if along == "columns" else expected.t()) < 1e-9


def test_knots_drops_small_singular_values_by_either_rule():
    adapters = random_adapters((2,), (1.0,))
    f = adapters["0"].factors["x"]
    q, p = torch.linalg.qr(f.A.t())[0].t(), torch.linalg.qr(f.B)[0]
    f.A.copy_(q)
    f.B.copy_(p * torch.tensor([3e-3, 6e-6]).double())

    def rank(**options):
        return factor("knots_ties", adapters, density=1.0, **options).rank

    assert rank() == 1
    assert rank(atol=0.0) == rank(atol=0.0, rtol=1e-3) == 2
    assert rank(atol=0.0, rtol=3e-3) == 1
    # Relative to the largest, not to all of them.
    f.B.copy_(p * torch.tensor([3.0, 2.0]).double())
    assert rank(atol=0.0, rtol=0.5) == 2
    assert rank(atol=0.0, rtol=0.7) == 1


def test_knots_makes_no_vector_of_rounding():
    """Of bounds of zero, too: plain vectors of it are as long as the others, and were counted in trimming."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    factors = {task: Factor(drawn(rank, 4), drawn(12, rank), 1.0) for task, rank in (("a", 2), ("b", 6), ("c", 1))}
    aligned = knots.align(factors, "plain", atol=0.0, rtol=0.0)
    # Two of the columns of the second one's B lead nowhere, as its A has rank 4.
    assert aligned.basis.shape == (12, 2 + 4 + 1)
    for task, part in aligned.parts.items():
        assert relative(aligned.basis @ part, factors[task].delta()) < 1e-12


def test_knots_dare_ties_is_knots_on_thinned_vectors():
    """Nothing dropped and nothing trimmed: a mean of those that agree, as with TIES at density 1."""
    adapters = random_adapters()
    expected = merged("knots_ties", adapters, density=1.0, scale=1.0)
    found = merged("knots_dare_ties", adapters, drop=0.0, scale=1.0)
    thinned = merged("knots_dare_ties", adapters, drop=0.5, scale=1.0)
    for path in "xy":
        assert relative(found[path], expected[path]) < 1e-12
        assert relative(thinned[path], expected[path]) > 0.1


@pytest.mark.parametrize("isotropise", [False, True])
@pytest.mark.parametrize("bases", core_space.BASES)
def test_core_space_is_its_definition(bases, isotropise):
    adapters = random_adapters((4, 2, 5))
    factors = [adapter.factors["x"] for adapter in adapters.values()]
    if bases == "factors":
        beside, stacked = torch.cat([f.scaling * f.B for f in factors], 1), torch.cat([f.A for f in factors])
    else:
        beside, stacked = torch.cat([f.delta() for f in factors], 1), torch.cat([f.delta() for f in factors])
    left = torch.linalg.svd(beside, full_matrices=False).U[:, :11]
    right = torch.linalg.svd(stacked, full_matrices=False).Vh[:11]
    parts = torch.stack([left.t() @ f.delta() @ right.t() for f in factors])
    core = dense_ties(parts.flatten(1), 0.3).view(11, 11)
    if isotropise:
        u, sigma, v = torch.linalg.svd(core)
        core = sigma.mean() * u @ v
    found = factor("core_space", adapters, bases=bases, isotropise=isotropise)
    assert found.rank == 11
    assert relative(found.delta(), left @ core @ right) < 1e-8


def doubled(adapters):
    """The same updates by factors of twice the rank."""
    return {
        task: Adapter(
            task,
            {
                path: Factor(torch.cat([factor.A, factor.A]), torch.cat([factor.B, factor.B], 1) / 2, factor.scaling)
                for path, factor in adapter.factors.items()
            },
        )
        for task, adapter in adapters.items()
    }


def test_a_sum_of_cores_depends_on_the_factors_only_where_null_directions_are_isotropised():
    adapters = random_adapters()
    for isotropise, null in ((True, True), (True, False), (False, True)):
        options = {"merge": "sum", "isotropise": isotropise, "null_directions": null}
        first, second = (merged("core_space", one, **options)["x"] for one in (adapters, doubled(adapters)))
        depends = METHODS["core_space"].of_factors_with(core_space.CoreSpaceOptions(**options))
        assert depends == (isotropise and null)
        assert (relative(second, first) > 0.1) if depends else (relative(second, first) < 1e-9)


def test_isotropising_adds_no_directions():
    """An adapter of deficient rank keeps that rank."""
    adapters = random_adapters((4,), (1.0,))
    adapters["0"].factors["x"].A[3] = adapters["0"].factors["x"].A[0]
    sigma = torch.linalg.svdvals(factor("core_space", adapters, merge="sum", isotropise=True).delta())
    mean = torch.linalg.svdvals(total(adapters, "x"))[:3].mean()
    torch.testing.assert_close(sigma[:3], mean.expand(3), rtol=1e-10, atol=0)
    assert sigma[3] < 1e-10


def test_core_space_dare_sums_thinned_cores():
    adapters = random_adapters()
    kept = merged("core_space", adapters, merge="dare", drop=0.0)["x"]
    assert relative(kept, total(adapters, "x")) < 1e-10
    draws = [merged("core_space", adapters, merge="dare", drop=0.5, seed=n)["x"] for n in range(400)]
    assert relative(torch.stack(draws).mean(0), total(adapters, "x")) < 0.15
    assert relative(draws[0], total(adapters, "x")) > 0.3


@pytest.mark.parametrize("options", [{}, {"rows": 12}, {"choice": "pivoted"}, {"choice": "pivoted", "rows": 20}])
def test_cur_with_enough_columns_reproduces_the_updates(options):
    adapters = random_adapters()
    columns = None if "choice" in options else 90
    found = svd_cur.decompose(of_x(adapters), svd_cur.SVDCUROptions(columns=columns, **options))
    for task, adapter in adapters.items():
        assert relative(found.U @ found.C @ found.coefficients[task], adapter.factors["x"].delta()) < 1e-8


def test_cur_keeps_actual_columns_and_solves_for_the_best_coefficients():
    adapters = random_adapters()
    dense = torch.cat([adapter.factors["x"].delta() for adapter in adapters.values()], 1)
    found = svd_cur.decompose(of_x(adapters), svd_cur.SVDCUROptions(columns=5))
    chosen = dense[:, dense.norm(dim=0).topk(5).indices]
    assert relative(found.U @ found.C, chosen) < 1e-10
    for task, adapter in adapters.items():
        best = torch.linalg.lstsq(chosen, adapter.factors["x"].delta()).solution
        assert relative(found.coefficients[task], best) < 1e-8


def test_cur_keeps_as_many_columns_as_the_ranks_add_up_to():
    """Also where the adapters share A, whose rank is less."""
    adapters = random_adapters()
    for adapter in adapters.values():
        adapter.factors["x"].A.copy_(adapters["0"].factors["x"].A)
    assert svd_cur.decompose(of_x(adapters), svd_cur.SVDCUROptions()).C.shape[1] == 12
    narrow = random_adapters(d_in=3)
    assert svd_cur.decompose(of_x(narrow), svd_cur.SVDCUROptions()).C.shape[1] == 9


@pytest.mark.parametrize("options", [{}, {"choice": "pivoted"}, {"choice": "pivoted", "rows": 3}, {"alpha": 0.0}])
def test_cur_counts_the_ranks_of_updates_and_not_of_their_factors(options):
    """The same updates of rank 4 by factors of rank 8, twice the same ones and mixed ones that float32 rounds."""
    adapters = {
        task: Adapter(task, {p: Factor(f.A.float(), f.B.float(), f.scaling) for p, f in adapter.factors.items()})
        for task, adapter in random_adapters().items()
    }
    generator = torch.Generator().manual_seed(1)
    mixed = {}
    for task, adapter in adapters.items():
        mixed[task] = Adapter(task, {})
        for path, f in adapter.factors.items():
            mixing = torch.randn(8, 4, generator=generator, dtype=torch.float64)
            A, B = mixing @ f.A.double(), f.B.double() @ torch.linalg.pinv(mixing)
            mixed[task].factors[path] = Factor(A.float(), B.float(), f.scaling)
    expected = merged("svd_cur", adapters, **options)
    for other in (doubled(adapters), mixed):
        for path, update in merged("svd_cur", other, **options).items():
            assert relative(update, expected[path]) < 1e-5


def test_pivoted_columns_are_no_more_than_span_the_updates():
    """Two tasks of one update: beyond its rank, columns would be chosen by the rounding of another factorisation."""
    adapters = random_adapters((4, 4), (1.0, 1.0))
    adapters["1"] = Adapter("1", adapters["0"].factors)
    assert svd_cur.decompose(of_x(adapters), svd_cur.SVDCUROptions(choice="pivoted")).C.shape[1] == 4
    assert svd_cur.decompose(of_x(adapters), svd_cur.SVDCUROptions(choice="pivoted", columns=6)).C.shape[1] == 4
    assert svd_cur.decompose(of_x(adapters), svd_cur.SVDCUROptions()).C.shape[1] == 8
    first, second = (merged("svd_cur", one, choice="pivoted")["x"] for one in (adapters, refactored(adapters)))
    assert relative(second, first) < 1e-9


def test_svd_cur_blends_by_magnitude():
    adapters = random_adapters()
    first = merged("svd_cur", adapters, alpha=1.0)["x"]
    second = merged("svd_cur", adapters, alpha=0.0)["x"]
    assert relative(first, merged("knots_ties", adapters, preset="canonical")["x"]) < 1e-10
    alpha = float(first.norm() / (first.norm() + second.norm()))
    assert 0.1 < alpha < 0.9
    assert relative(merged("svd_cur", adapters)["x"], alpha * first + (1 - alpha) * second) < 1e-10
    assert factor("svd_cur", adapters).rank == 12


@pytest.mark.parametrize("size", [1e-9, 1e-6, 1e6])
@pytest.mark.parametrize("method", FUNCTIONS)
def test_updates_of_any_size_are_merged_alike(method, size):
    """Of adapters that are all so many times as large, the merge is. KnOTS' own bound is absolute, and a choice."""
    adapters = random_adapters()
    sized = random_adapters(scalings=[size * one for one in (0.7, 2.0, 1.0)])
    options = {"atol": 0.0} if method.startswith("knots") else {}
    expected, found = (merged(method, one, **options) for one in (adapters, sized))
    for path in "xy":
        assert relative(found[path], size * expected[path]) < 1e-7


@pytest.mark.parametrize("method", ["knots_ties", "knots_dare_ties"])
def test_knots_refuses_updates_of_which_nothing_is_left(method):
    with pytest.raises(ValueError, match="atol: no singular value of any module, such as x, is above 1e-05"):
        merged(method, random_adapters(scalings=(7e-9, 2e-8, 1e-8)))
    # One update that is too small is enough, also where a factor has entries that are zero.
    alone = random_adapters(scalings=(0.0, 2e-8, 0.0))
    alone["1"].factors["x"].A[0], alone["1"].factors["x"].B[0] = 0.0, 0.0
    with pytest.raises(ValueError, match="atol: no singular value of any module, such as x, is above 1e-05"):
        merged(method, alone)
    assert not merged(method, random_adapters(scalings=(0.0, 0.0, 0.0)))["x"].any()
    for part in "AB":
        zero = random_adapters()
        for adapter in zero.values():
            for factor_ in adapter.factors.values():
                getattr(factor_, part).zero_()
        assert not merged(method, zero)["x"].any()


@pytest.mark.parametrize("name", ["svd_scale", "cur_scale"])
def test_a_scale_of_a_branch_is_refused_by_its_own_name(name):
    with pytest.raises(ValueError, match=rf"{name}: the branch of x is not finite with {name}=1e\+300; expected"):
        merged("svd_cur", random_adapters(), **{name: 1e300})


def test_cur_branch_is_ties_on_the_coefficients():
    adapters = random_adapters()
    updates = [adapter.factors["x"].delta() for adapter in adapters.values()]
    dense = torch.cat(updates, 1)
    C = dense[:, dense.norm(dim=0).topk(12).indices]
    coefficients = torch.stack([torch.linalg.pinv(C) @ update for update in updates])
    expected = 0.4 * C @ dense_ties(coefficients.flatten(1), 0.2).view_as(coefficients[0])
    assert relative(merged("svd_cur", adapters, "x", alpha=0.0, cur_scale=0.4)["x"], expected) < 1e-8


def test_lego_puts_equal_units_together():
    """Three copies of one adapter, their units in other orders: every centre is a unit."""
    base = random_adapters((4,), (0.7,))["0"]
    adapters = {}
    for name, order in {"a": [0, 1, 2, 3], "b": [2, 0, 3, 1], "c": [3, 2, 1, 0]}.items():
        factors = {p: Factor(f.A[order], f.B[:, order], f.scaling) for p, f in base.factors.items()}
        adapters[name] = Adapter(name, factors)
    for path, update in merged("lora_lego", adapters).items():
        assert relative(update, base.factors[path].delta()) < 1e-6


@pytest.mark.parametrize("rank", [None, 2, 3, 4, 6])
@pytest.mark.parametrize("copies", [1, 2, 3])
def test_lego_reweights_by_the_clusters_that_it_finds(copies, rank):
    """Copies of one adapter of rank 2 have two different units, however many are asked for, and merge to it."""
    one = random_adapters((2,), (0.7,))["0"]
    found = factor("lora_lego", {str(k): Adapter(str(k), one.factors) for k in range(copies)}, rank=rank)
    assert found.rank == 2
    assert relative(found.delta(), one.factors["x"].delta()) < 1e-6


def test_lego_by_hand():
    """Two clear clusters, of the units 1 and 3 and of unit 2 alone."""
    A = torch.tensor([[4.0, 0.0, 0.0], [0.0, 0.0, 1.0], [2.0, 1.0, 0.0]]).double()
    B = torch.tensor([[2.0, 0.0], [0.0, -1.0], [1.0, 0.5]]).double().t()
    found = factor("lora_lego", {"a": Adapter("a", {"x": Factor(A, B, 4.0)})}, rank=2)
    down, up = 2 * (A[0] + A[2]) / 2, 2 * (B[:, 0] + B[:, 2]) / 2
    # The largest entries of the two are 8 and 4, the centre's is 6: there is nothing to rescale.
    expected = torch.outer(up, down) + 4 * torch.outer(B[:, 1], A[1])
    torch.testing.assert_close(found.delta(), math.sqrt(3 / 2) * expected)


def test_lego_rescales_what_averaging_shrinks():
    A = torch.tensor([[1.0, 0.2, 0.0], [0.2, 1.0, 0.0], [0.0, 0.0, 1.0]]).double()
    B = torch.tensor([[0.5, 0.0], [0.5, 0.0], [0.0, 0.5]]).double().t()
    adapters = {"a": Adapter("a", {"x": Factor(A, B, 1.0)})}
    shrunk = torch.outer(B[:, 0], (A[0] + A[1]) / 2)
    expected = shrunk / 0.6**2 + torch.outer(B[:, 2], A[2])
    torch.testing.assert_close(factor("lora_lego", adapters, rank=2).delta(), math.sqrt(3 / 2) * expected)
    plain = factor("lora_lego", adapters, rank=2, rescale=False).delta()
    torch.testing.assert_close(plain, math.sqrt(3 / 2) * (shrunk + torch.outer(B[:, 2], A[2])))


def test_lego_is_seeded_and_of_the_rank_asked_for():
    adapters = random_adapters((4, 2, 5))
    first, again, other = (factor("lora_lego", adapters, rank=3, seed=seed) for seed in (0, 0, 1))
    assert first.rank == other.rank == 3
    assert torch.equal(first.A, again.A)
    assert not torch.equal(first.A, other.A)
    assert factor("lora_lego", adapters).rank == 5


def test_robustmerge_by_hand():
    A = torch.tensor([[3.0, 1.0], [1.0, 2.0]])
    adapters = {"a": Adapter("a", {"x": Factor(A, torch.eye(2), 1.0)})}
    # A quarter of A's entries and one more: 3 and 2, so that rows lost 1 of 4 and 1 of 3; B keeps its ones.
    alg1 = merged("robustmerge_alg1", adapters, "x", density=0.25)["x"]
    torch.testing.assert_close(alg1.float(), torch.tensor([[3.0, 0.0], [0.0, 2.0]]))
    pair = {**adapters, "b": Adapter("b", {"x": Factor(A.flip(0), torch.eye(2), 1.0)})}
    found = merged("robustmerge_alg1", pair, "x", density=0.25)["x"]
    shares = torch.tensor([4 / 3, 3 / 2])
    weight = shares / (shares + shares.flip(0))
    expected = torch.diag(weight) @ torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    expected += torch.diag(weight.flip(0)) @ torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    torch.testing.assert_close(found.float(), expected)


def test_robustmerge_is_what_its_code_does():
    """Factors on top of one another; each task's shares raised to the order statistic at 0.8 of its own rows."""
    adapters = random_adapters((6, 6, 6), (0.5, 2.0, 1.0))
    factors = [adapter.factors["x"] for adapter in adapters.values()]
    sides = torch.stack([f.A for f in factors]), torch.stack([f.scaling * f.B for f in factors])
    trimmed = []
    for side in sides:
        flat = side.flatten(1).abs()
        least = flat.kthvalue(int(flat.shape[1] * (1 - 0.2)), dim=1).values
        trimmed.append(torch.where(side.abs() >= least[:, None, None], side, 0.0))
    shares = sides[0].abs().sum(2) / trimmed[0].abs().sum(2)
    for row in shares:
        row.clamp_(min=float(row.sort().values[4]))
    B = (2 * trimmed[1] * shares[:, None]).sum(0) / shares.sum(0)
    assert relative(merged("robustmerge", adapters, "x")["x"], B @ (2 * trimmed[0]).sum(0)) < 1e-12


def refactored(adapters):
    generator = torch.Generator().manual_seed(5)
    mixings = {
        task: torch.randn(adapter.factors["x"].rank, adapter.factors["x"].rank, generator=generator).double()
        for task, adapter in adapters.items()
    }
    return {
        task: Adapter(
            task,
            {
                p: Factor(torch.linalg.solve(mixings[task], f.A), 2 * f.B @ mixings[task], f.scaling / 2)
                for p, f in adapter.factors.items()
            },
        )
        for task, adapter in adapters.items()
    }


@pytest.mark.parametrize("method", FUNCTIONS)
def test_refactoring_the_updates(method):
    adapters = random_adapters()
    first, second = (merged(method, one)["x"] for one in (adapters, refactored(adapters)))
    if method in INVARIANT:
        assert relative(second, first) < 1e-9
    else:
        assert relative(second, first) > 0.05


@pytest.mark.parametrize("merge", core_space.MERGES)
def test_core_space_is_invariant_with_bases_of_updates(merge):
    adapters = random_adapters()
    first, second = (
        merged("core_space", one, merge=merge, bases="updates")["x"] for one in (adapters, refactored(adapters))
    )
    assert relative(second, first) < 1e-9


@pytest.mark.parametrize("method", FUNCTIONS)
def test_deficient_factors(method):
    """Repeated rows of A, zero columns of B, and an update of zero."""
    adapters = random_adapters()
    factor = adapters["0"].factors["x"]
    factor.A[1] = factor.A[0]
    factor.B[:, 2] = 0
    adapters["1"].factors["x"].B.zero_()
    assert all(torch.isfinite(update).all() for update in merged(method, adapters).values())


@pytest.mark.parametrize("zero", ["A", "B"])
@pytest.mark.parametrize("method", FUNCTIONS)
def test_a_module_that_no_adapter_trained(method, zero):
    """B starts at zero, so that an update of zero by every adapter is common; A of zero is the other way to it."""
    adapters = random_adapters()
    for adapter in adapters.values():
        getattr(adapter.factors["x"], zero).zero_()
    variants = {
        "knots_ties": ({}, {"along": "rows", "vectors": "plain"}),
        "core_space": ({}, {"bases": "updates", "isotropise": True}),
        "svd_cur": ({}, {"choice": "pivoted", "rows": 3}),
    }
    for options in variants.get(method, ({},)):
        found = merged(method, adapters, **options)
        assert found["x"].shape == (20, 30)
        assert not found["x"].any()
        assert found["y"].any()
