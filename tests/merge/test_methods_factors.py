"""SVD, linear, KnOTS, Core Space, CUR, LoRA-LEGO and RobustMerge: identities, dense definitions, and peft."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model

import nsc_merge
from nsc_merge.adapters import Adapter, Factor
from nsc_merge.methods import METHODS, core_space, cur, knots, lego, robust, svd
from nsc_merge.methods import elementwise as ew
from nsc_merge.methods.factors import cores

FUNCTIONS = {
    "svd": svd.svd,
    "linear": svd.linear,
    "knots_ties": knots.knots_ties,
    "knots_dare_ties": knots.knots_dare_ties,
    "core_space": core_space.core_space,
    "svd_cur": cur.svd_cur,
    "lora_lego": lego.lora_lego,
    "robustmerge": robust.robustmerge,
    "robustmerge_alg1": robust.robustmerge_alg1,
}
NEED_EQUAL_RANKS = ("linear", "robustmerge")
# Methods that see the updates only, and not how they are factored.
INVARIANT = ("svd", "knots_ties", "knots_dare_ties", "svd_cur")


def random_adapters(ranks=(4, 4, 4), scalings=(0.7, 2.0, 1.0), d_in=30, d_out=20, paths="xy", seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        str(k): Adapter(str(k), {p: Factor(normal(r, d_in), normal(d_out, r), s) for p in paths})
        for k, (r, s) in enumerate(zip(ranks, scalings, strict=True))
    }


def merged(method, adapters, paths="xy", **options):
    chosen = METHODS[method].options(**options)
    return {path: factor.delta() for path, factor in FUNCTIONS[method](adapters, list(paths), chosen)}


def total(adapters, path):
    return sum(adapter.factors[path].delta() for adapter in adapters.values())


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def summing(source, tasks):
    for path, row in tasks.items():
        yield path, torch.stack([source(path, task) for task in row]).sum(0)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.integers(1, 20),
    st.integers(1, 20),
    st.sampled_from(knots.ALONG),
    st.sampled_from(knots.VECTORS),
)
def test_summed_cores_and_summed_knots_are_task_arithmetic(ranks, d_in, d_out, along, vectors):
    """In float64, of any shape and rank, also where the ranks add up to more than a width."""
    adapters = random_adapters(ranks, [0.5] * len(ranks), d_in, d_out, "x")
    expected = total(adapters, "x")
    common = cores({task: adapter.factors["x"] for task, adapter in adapters.items()})
    for task, adapter in adapters.items():
        rebuilt = common.U @ common.M[task] @ common.V
        torch.testing.assert_close(rebuilt, adapter.factors["x"].delta(), rtol=1e-10, atol=1e-10)
    options = knots.KnotsTiesOptions(along=along, vectors=vectors, atol=0.0, scale=1.0)
    factor = dict(knots.knots(adapters, ["x"], options, summing))["x"]
    assert factor.rank <= sum(ranks)
    torch.testing.assert_close(factor.delta(), expected, rtol=1e-9, atol=1e-9)


def test_svd_of_full_rank_and_summed_core_space_are_task_arithmetic():
    adapters = random_adapters((4, 2, 5))
    for path, update in merged("svd", adapters).items():
        assert relative(update, total(adapters, path)) < 1e-6
    for path, update in merged("core_space", adapters, merge="sum").items():
        assert relative(update, total(adapters, path)) < 1e-6


def test_svd_truncates_best():
    adapters = random_adapters()
    left, sigma, right = torch.linalg.svd(total(adapters, "x"))
    best = (left[:, :5] * sigma[:5]) @ right[:5]
    factor = dict(svd.svd(adapters, ["x"], svd.SVDOptions(rank=5)))["x"]
    assert factor.rank == 5
    assert relative(factor.delta(), best) < 1e-6


@pytest.mark.parametrize("method", FUNCTIONS)
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
        assert relative(update, total(adapters, path)) < 1e-6


@pytest.mark.parametrize("vectors", knots.VECTORS)
def test_knots_is_its_definition(vectors):
    """Against the dense SVD of all updates next to one another, with the same TIES on the aligned vectors."""
    adapters = random_adapters()
    aligned, bases = {}, {}
    for path in "xy":
        dense = torch.cat([adapter.factors[path].delta() for adapter in adapters.values()], 1)
        left, sigma, right = torch.linalg.svd(dense, full_matrices=False)
        kept = sigma > 1e-5
        left, sigma, right = left[:, kept], sigma[kept], right[kept]
        weights = sigma if vectors == "scaled" else torch.ones_like(sigma)
        bases[path] = left if vectors == "scaled" else left * sigma
        aligned[path] = dict(zip(adapters, (weights[:, None] * right).split(30, 1), strict=True))
    steps = ew.Ties(0.2, "global", "sum", "majority", "mean")
    tasks = {path: list(adapters) for path in "xy"}
    expected = {p: bases[p] @ m for p, m in ew.ties_merge(lambda path, task: aligned[path][task], tasks, steps)}
    found = merged("knots_ties", adapters, vectors=vectors, scale=1.0)
    for path in "xy":
        assert relative(found[path], expected[path]) < 1e-5


def test_core_space_is_its_definition():
    adapters = random_adapters((4, 2, 5))
    ups = torch.cat([adapter.factors["x"].scaling * adapter.factors["x"].B for adapter in adapters.values()], 1)
    downs = torch.cat([adapter.factors["x"].A for adapter in adapters.values()])
    left = torch.linalg.svd(ups, full_matrices=False).U
    right = torch.linalg.svd(downs, full_matrices=False).Vh
    parts = {task: left.t() @ adapter.factors["x"].delta() @ right.t() for task, adapter in adapters.items()}
    steps = ew.Ties(0.3, "tensor", "sum", "majority", "mean")
    expected = left @ dict(ew.ties_merge(lambda _, task: parts[task], {"x": list(parts)}, steps))["x"] @ right
    assert relative(merged("core_space", adapters)["x"], expected) < 1e-5
    sigma = torch.linalg.svdvals(merged("core_space", adapters, isotropise=True)["x"])
    assert torch.allclose(sigma[:11], sigma[0], rtol=1e-5)
    assert float(sigma[11]) < 1e-4


@pytest.mark.parametrize("options", [{}, {"rows": 12}, {"choice": "pivoted"}, {"choice": "pivoted", "rows": 20}])
def test_cur_with_enough_columns_reproduces_the_updates(options):
    adapters = random_adapters()
    common = cores({task: adapter.factors["x"] for task, adapter in adapters.items()})
    found = cur.decompose(common, cur.SVDCUROptions(columns=None if "choice" in options else 90, **options))
    for task, adapter in adapters.items():
        assert relative(found.U @ found.C @ found.coefficients[task], adapter.factors["x"].delta()) < 1e-8


def test_cur_keeps_actual_columns_and_solves_for_the_best_coefficients():
    adapters = random_adapters()
    dense = torch.cat([adapter.factors["x"].delta() for adapter in adapters.values()], 1)
    common = cores({task: adapter.factors["x"] for task, adapter in adapters.items()})
    found = cur.decompose(common, cur.SVDCUROptions(columns=5))
    chosen = dense[:, dense.norm(dim=0).topk(5).indices]
    assert relative(found.U @ found.C, chosen) < 1e-10
    for task, adapter in adapters.items():
        best = torch.linalg.lstsq(chosen, adapter.factors["x"].delta()).solution
        assert relative(found.coefficients[task], best) < 1e-8


def test_svd_cur_blends_by_magnitude():
    adapters = random_adapters()
    first = merged("svd_cur", adapters, alpha=1.0)["x"]
    second = merged("svd_cur", adapters, alpha=0.0)["x"]
    assert relative(first, merged("knots_ties", adapters, preset="canonical")["x"]) < 1e-5
    alpha = float(first.norm() / (first.norm() + second.norm()))
    assert 0.1 < alpha < 0.9
    assert relative(merged("svd_cur", adapters)["x"], alpha * first + (1 - alpha) * second) < 1e-5


def test_lego_puts_equal_units_together():
    """Three copies of one adapter, their units in other orders: every centre is a unit."""
    base = random_adapters((4,), (0.7,))["0"]
    adapters = {}
    for name, order in {"a": [0, 1, 2, 3], "b": [2, 0, 3, 1], "c": [3, 2, 1, 0]}.items():
        factors = {p: Factor(f.A[order], f.B[:, order], f.scaling) for p, f in base.factors.items()}
        adapters[name] = Adapter(name, factors)
    for path, update in merged("lora_lego", adapters).items():
        assert relative(update, base.factors[path].delta()) < 1e-6


def test_lego_is_seeded_and_of_the_rank_asked_for():
    adapters = random_adapters((4, 2, 5))
    factors = [dict(lego.lora_lego(adapters, ["x"], lego.LegoOptions(rank=3, seed=seed)))["x"] for seed in (0, 0, 1)]
    assert [factor.rank for factor in factors] == [3, 3, 3]
    assert torch.equal(factors[0].A, factors[1].A)
    default = dict(lego.lora_lego(adapters, ["x"], lego.LegoOptions()))["x"]
    assert default.rank == 5


def test_robustmerge_by_hand():
    A = torch.tensor([[3.0, 1.0], [1.0, 2.0]])
    adapters = {"a": Adapter("a", {"x": Factor(A, torch.eye(2), 1.0)})}
    # Half of A's entries: 3 and 2, so that rows lost 1 of 4 and 1 of 3; B keeps its ones.
    alg1 = merged("robustmerge_alg1", adapters, "x", density=0.5)["x"]
    torch.testing.assert_close(alg1.float(), torch.tensor([[3.0, 0.0], [0.0, 2.0]]))
    pair = {**adapters, "b": Adapter("b", {"x": Factor(A.flip(0), torch.eye(2), 1.0)})}
    found = merged("robustmerge_alg1", pair, "x", density=0.5)["x"]
    shares = torch.tensor([4 / 3, 3 / 2])
    weight = shares / (shares + shares.flip(0))
    expected = torch.diag(weight) @ torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    expected += torch.diag(weight.flip(0)) @ torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    torch.testing.assert_close(found.float(), expected)
    code = merged("robustmerge", pair, "x", density=0.5)["x"]
    shares = torch.stack([shares, shares.flip(0)]).clamp(min=float(torch.quantile(torch.cat([shares, shares]), 0.8)))
    down = 2 * torch.tensor([[3.0, 2.0], [3.0, 2.0]])
    torch.testing.assert_close(code.float(), 2 * torch.eye(2) @ torch.diag(shares.sum(0) / shares.sum(0)) @ down)


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
        assert relative(second, first) < 1e-4
    else:
        assert relative(second, first) > 0.05


def test_core_space_sum_is_invariant():
    adapters = random_adapters()
    first, second = (merged("core_space", one, merge="sum")["x"] for one in (adapters, refactored(adapters)))
    assert relative(second, first) < 1e-6


@pytest.mark.parametrize("method", FUNCTIONS)
def test_deficient_factors(method):
    """Repeated rows of A, zero columns of B, and an update of zero."""
    adapters = random_adapters()
    factor = adapters["0"].factors["x"]
    factor.A[1] = factor.A[0]
    factor.B[:, 2] = 0
    adapters["1"].factors["x"].B.zero_()
    assert all(torch.isfinite(update).all() for update in merged(method, adapters).values())


@pytest.mark.parametrize("method", FUNCTIONS)
def test_results_are_adapters(model, write_adapter, images, method, tmp_path):
    """alpha other than r, unequal ranks and absent modules; saved exactly, reloaded by peft."""
    folders = {
        "a": write_adapter("a", 1, r=4, lora_alpha=6),
        "b": write_adapter("b", 2, r=4, lora_alpha=3, use_rslora=True, target_modules=["v_proj", "o_proj"]),
    }
    if method not in NEED_EQUAL_RANKS:
        folders["c"] = write_adapter("c", 3, r=2, lora_alpha=8)
    result = nsc_merge.merge(model, folders, method=method)
    out = result.save(tmp_path / "out", "lora")
    with torch.no_grad():
        expected = result.apply(copy.deepcopy(model))(pixel_values=images).last_hidden_state
        found = PeftModel.from_pretrained(copy.deepcopy(model), out).eval()(pixel_values=images).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", NEED_EQUAL_RANKS)
def test_unequal_ranks_are_refused_where_factors_are_added(model, folders, method):
    with pytest.raises(ValueError, match=f"method '{method}' adds factors and needs equal ranks in a module, found"):
        nsc_merge.merge(model, folders, method=method)


@pytest.mark.parametrize("kind", ["svd", "linear", "cat"])
def test_pefts_own_merges(model, kind):
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    peft_model = get_peft_model(copy.deepcopy(model), config, adapter_name="a")
    peft_model.add_adapter("b", LoraConfig(r=4, lora_alpha=2, target_modules=["q_proj", "v_proj"]))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in peft_model.named_parameters():
            if "lora_" in name:
                value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    weights = {"a": 0.5, "b": 1.5}
    extra = {"svd_rank": 3} if kind == "svd" else {}
    peft_model.add_weighted_adapter(list(weights), list(weights.values()), "m", combination_type=kind, **extra)
    adapters = {name: nsc_merge.load_adapter(peft_model, name) for name in weights}
    if kind == "linear":
        result = nsc_merge.merge(model, adapters, method="linear", weights=weights)
    elif kind == "cat":
        result = nsc_merge.merge(model, adapters, method="task_arithmetic", scale=weights)
    else:
        scaled = {
            name: Adapter(name, {p: Factor(f.A, f.B, weights[name] * f.scaling) for p, f in adapter.factors.items()})
            for name, adapter in adapters.items()
        }
        result = nsc_merge.merge(model, scaled, method="svd", rank=3)
    expected = nsc_merge.load_adapter(peft_model, "m")
    for path, factor in expected.factors.items():
        assert relative(result.delta(path), factor.delta()) < 1e-4


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("svd", {"rank": 0}, "rank: expected a whole number of at least 1, found 0"),
        ("linear", {"preset": "mergekit"}, "preset: expected one of"),
        ("linear", {"weights": {"plain": math.inf}}, "weights: expected a finite number"),
        ("knots_ties", {"along": "both"}, "along: expected one of"),
        ("knots_ties", {"trim_scope": "factors"}, "trim_scope: expected one of"),
        ("knots_dare_ties", {"vectors": "V"}, "vectors: expected one of"),
        ("core_space", {"merge": "mean"}, "merge: expected one of"),
        ("svd_cur", {"alpha": "energy"}, "alpha: expected one of"),
        ("svd_cur", {"alpha": 1.5}, "alpha: expected a finite number of at least 0 and of at most 1"),
        ("svd_cur", {"columns": 0}, "columns: expected a whole number"),
        ("lora_lego", {"rank": -1}, "rank: expected a whole number"),
        ("robustmerge", {"density": 0}, "density: expected a finite number above 0"),
        ("robustmerge_alg1", {"scale": None}, "scale: expected a finite number"),
    ],
)
def test_bad_options_are_named(model, folders, method, options, message):
    with pytest.raises(ValueError, match=message):
        nsc_merge.merge(model, folders, method=method, **options)
