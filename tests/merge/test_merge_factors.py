"""Merging without a model: every method that needs none gives what it gives with one, and dense deltas are factored."""

from __future__ import annotations

import inspect
import runpy
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

import nsc_merge
from nsc_merge.adapters import Adapter, Factor
from nsc_merge.adapters.algebra import factoring
from nsc_merge.adapters.algebra.factoring import as_product, factored
from nsc_merge.methods import METHODS

WITHOUT_DATA = [name for name, method in METHODS.items() if method.updates]
# A and B are merged, not their product, so that equal ranks are needed and the factorisation matters.
ON_FACTORS = {"linear", "lora_lego", "robustmerge", "robustmerge_alg1", "core_space"}
EXAMPLE = Path(__file__).parents[2] / "examples" / "integrations" / "merge_factors.py"
SHAPES = {"q": (20, 30), "v": (13, 30), "o": (30, 20)}


def normal(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def triples(rank=4, tasks="abc"):
    return {
        task: {
            path: (normal(rank, d_in, seed=7 * k + n), normal(d_out, rank, seed=90 + 7 * k + n), 0.5 + k)
            for n, (path, (d_out, d_in)) in enumerate(SHAPES.items())
            if (task, path) != ("b", "o")
        }
        for k, task in enumerate(tasks)
    }


def deltas(adapters):
    return {
        task: {path: scaling * (B.double() @ A.double()).float() for path, (A, B, scaling) in updates.items()}
        for task, updates in adapters.items()
    }


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", WITHOUT_DATA)
def test_every_method_gives_what_it_gives_with_a_model(name):
    adapters = triples()
    model = nn.ModuleDict({path: nn.Linear(d_in, d_out, bias=False) for path, (d_out, d_in) in SHAPES.items()})
    loaded = {
        task: Adapter(task, {path: Factor(*update) for path, update in updates.items()})
        for task, updates in adapters.items()
    }
    result = nsc_merge.merge(model, loaded, method=name)
    merged = dict(nsc_merge.merge_factors(adapters, name))
    assert list(merged) == list(SHAPES)
    for path, factor in merged.items():
        assert factor.scaling == 1.0
        torch.testing.assert_close(factor.delta(), result.delta(path), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in WITHOUT_DATA if "rank" in METHODS[name].option_names])
@pytest.mark.parametrize("rank", [2, 6])
def test_a_rank_is_the_method_s_own_where_it_has_one(name, rank):
    """Less and more than the adapters' own, which is 4."""
    adapters = triples()
    model = nn.ModuleDict({path: nn.Linear(d_in, d_out, bias=False) for path, (d_out, d_in) in SHAPES.items()})
    loaded = {
        task: Adapter(task, {path: Factor(*update) for path, update in updates.items()})
        for task, updates in adapters.items()
    }
    result = nsc_merge.merge(model, loaded, method=name, rank=rank)
    for path, factor in nsc_merge.merge_factors(adapters, name, rank=rank):
        assert factor.rank == result.factors[path].rank == rank
        torch.testing.assert_close(factor.delta(), result.delta(path), rtol=1e-6, atol=1e-6)


def test_no_option_of_a_method_is_hidden_by_an_argument():
    """``rank`` is handed on."""
    arguments = set(inspect.signature(nsc_merge.merge_factors).parameters) - {"options", "rank"}
    for name in WITHOUT_DATA:
        assert not arguments & set(METHODS[name].option_names)


@pytest.mark.parametrize("name", sorted(set(WITHOUT_DATA) - ON_FACTORS))
def test_dense_deltas_merge_as_their_factors_do(name):
    # Entries that only rounding tells apart may be trimmed in one and not in the other; with density 1 none are.
    options = {"density": 1.0} if "density" in METHODS[name].option_names else {}
    by_factors = dict(nsc_merge.merge_factors(triples(), name, **options))
    by_deltas = dict(nsc_merge.merge_factors(deltas(triples()), name, **options))
    for path, factor in by_deltas.items():
        assert distance(factor.delta(), by_factors[path].delta()) < 1e-5


@pytest.mark.parametrize("name", sorted(set(WITHOUT_DATA) - ON_FACTORS))
def test_deltas_of_full_rank_are_merged_whole(name):
    """The definitions on matrices, against the same matrices as products with an identity."""
    options = {"density": 1.0} if "density" in METHODS[name].option_names else {}
    dense = {
        task: {path: normal(*shape, seed=31 * k + n) for n, (path, shape) in enumerate(SHAPES.items())}
        for k, task in enumerate("ab")
    }
    as_products = {
        task: {path: as_product(factored(delta)) for path, delta in updates.items()} for task, updates in dense.items()
    }
    assert {factor.rank for factor in as_products["a"].values()} == {20, 13}
    expected = dict(nsc_merge.merge_factors(as_products, name, **options))
    for path, factor in nsc_merge.merge_factors(dense, name, **options):
        assert distance(factor.delta(), expected[path].delta()) < 1e-5
    if name == "task_arithmetic":
        torch.testing.assert_close(expected["q"].delta(), 0.4 * (dense["a"]["q"] + dense["b"]["q"]).double())


IN_FACTORS = [(name, dict([option])) for name in WITHOUT_DATA for option in METHODS[name].low_rank_with.items()]
OTHER_OPTIONS = [*IN_FACTORS, ("core_space", {"bases": "updates"}), ("core_space", {"merge": "sum"})]


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in WITHOUT_DATA), *OTHER_OPTIONS])
def test_a_method_says_whether_it_depends_on_the_factors(name, options):
    """The same products by other factors."""

    def mixed(task, A, B, scaling):
        mixing = normal(len(A), len(A), seed=ord(task), dtype=torch.float64) + 3 * torch.eye(len(A)).double()
        return torch.linalg.solve(mixing, A.double()), B.double() @ mixing, scaling

    adapters = triples()
    other = {task: {path: mixed(task, *one) for path, one in updates.items()} for task, updates in adapters.items()}
    first, second = (dict(nsc_merge.merge_factors(one, name, **options)) for one in (adapters, other))
    apart = max(distance(second[path].delta(), first[path].delta()) for path in SHAPES)
    depends = METHODS[name].of_factors_with(METHODS[name].resolved(options, list(adapters)))
    assert depends == ((name in ON_FACTORS and not options) or (name, options) in IN_FACTORS)
    # Rounding may move single entries across a threshold.
    assert (apart > 0.1) if depends else (apart < 0.02)


def test_a_delta_that_is_merged_by_its_factors_is_named():
    held = deltas(triples())
    with pytest.warns(UserWarning, match=r"'lora_lego' depends on how .* which adapters\['a'\]\['q'\] does not say"):
        merged = nsc_merge.merge_factors({"d": triples()["c"], **held}, "lora_lego")
    assert list(dict(merged)) == list(SHAPES)
    whole = {path: Factor(torch.empty(0, 30), torch.empty(len(one), 0), 1.0, dense=one)
             for path, one in held["a"].items() if path != "o"}  # fmt: skip
    with pytest.warns(UserWarning, match=r"; give the adapter's own, or trim_scope other than 'factors'"):
        nsc_merge.merge_factors({"a": whole}, "ties", trim_scope="factors")


@settings(max_examples=40, deadline=None)
@given(
    d_out=st.integers(1, 300), d_in=st.integers(1, 300), rank=st.integers(0, 40), exponent=st.integers(-20, 15),
    dtype=st.sampled_from([torch.float32, torch.float64]), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_delta_is_factored_to_rounding_or_kept_whole(d_out, d_in, rank, exponent, dtype, seed):
    wide = torch.float64
    product = normal(d_out, rank, seed=seed, dtype=wide) @ normal(rank, d_in, seed=seed + 1, dtype=wide)
    delta = (10.0**exponent * product).to(dtype)
    found = factored(delta)
    if found.dense is not None:
        assert found.dense is delta
        assert rank > d_out * d_in // (d_out + d_in)
    elif delta.any():
        assert found.rank <= rank
        assert distance(found.delta(), delta.double()) < 64 * torch.finfo(dtype).eps
        # float32 holds no more than its own rounding of the product.
        assert found.A.dtype == dtype
    else:
        assert found.rank == 0


def test_a_wide_delta_of_low_rank_is_found_and_the_same_each_time():
    delta = normal(700, 24, seed=1) @ normal(24, 1500, seed=2)
    once, again = factored(delta), factored(delta.clone())
    assert once.rank == 24
    assert torch.equal(once.A, again.A)
    assert torch.equal(once.B, again.B)
    assert factored(delta.t().contiguous()).rank == 24


def test_a_rank_that_no_part_shows_is_found_with_more_columns(monkeypatch):
    delta = torch.zeros(900, 900)
    for seed, place in enumerate(range(0, 900, 75)):
        rows = slice(place, place + 75)
        delta[rows, rows] = normal(75, 12, seed=seed) @ normal(12, 75, seed=seed + 50)
    found = factored(delta)
    assert found.rank == 144
    assert distance(found.delta(), delta.double()) < 1e-6
    # In few rows and columns, of which any part has but some.
    few = torch.zeros(900, 900)
    few[10:870:5, 3:863:5] = normal(172, 172, seed=1)
    guesses = []
    whole = factoring._in_range
    monkeypatch.setattr(factoring, "_in_range", lambda *given: guesses.append(given[1]) or whole(*given))
    found = factored(few)
    assert (found.rank, guesses) == (172, [128, 256])
    assert distance(found.delta(), few.double()) < 1e-6
    few[10:870:3, 3:863:3] = normal(287, 287, seed=2)
    assert factored(few).dense is few
    assert guesses[2:] == [256]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in WITHOUT_DATA),
        ("ties", {"preset": "peft", "trim_scope": "factors"}),
        ("dare", {"drop_scope": "factors"}),
        ("dare_ties", {"preset": "peft", "trim_scope": "factors"}),
        ("magnitude_prune", {"trim_scope": "factors"}),
    ],
)
def test_factors_of_bfloat16_are_merged_as_the_same_numbers_of_float32(name, options):
    half = {
        task: {path: (A.bfloat16(), B.bfloat16(), scaling) for path, (A, B, scaling) in updates.items()}
        for task, updates in triples().items()
    }
    single = {
        task: {path: (A.float(), B.float(), scaling) for path, (A, B, scaling) in updates.items()}
        for task, updates in half.items()
    }
    expected = dict(nsc_merge.merge_factors(single, name, **options))
    for path, found in nsc_merge.merge_factors(half, name, **options):
        assert found.A.dtype == expected[path].A.dtype == torch.float32
        assert distance(found.delta(), expected[path].delta()) < 1e-6


def test_differences_of_checkpoints_have_the_rank_that_was_trained():
    """Weights as large as the update, or more, leave rounding that has all ranks."""
    update = 0.01 * normal(512, 8, seed=1) @ normal(8, 512, seed=2)
    base = normal(512, 512, seed=3)
    assert factored((base + update) - base).rank == 8
    small = (base + 0.01 * update) - base
    assert factored(small).dense is not None
    assert factored(small, tolerance=1e-3).rank == 8
    half = (base + update).bfloat16().float() - base.bfloat16().float()
    assert factored(half).dense is not None
    assert factored(update.bfloat16()).dense is not None
    rough = factored(update.bfloat16(), tolerance=0.005)
    assert rough.rank == 8
    assert distance(rough.delta(), update.bfloat16().double()) < 0.005


def test_rank_truncates_to_the_best_approximation():
    for path, factor in nsc_merge.merge_factors(triples(), "ties", rank=5):
        whole = dict(nsc_merge.merge_factors(triples(), "ties"))[path].delta()
        sigma = torch.linalg.svdvals(whole)
        assert factor.rank == 5
        assert float((factor.delta() - whole).norm()) == pytest.approx(float(sigma[5:].norm()), rel=1e-4)
    (_, exact), *_ = nsc_merge.merge_factors(triples(), "task_arithmetic", rank=100)
    assert exact.rank == 12


def test_updates_are_read_once_and_merged_ones_computed_when_asked_for():
    asked = []

    class Lazy(Mapping):
        def __init__(self, updates):
            self.updates = updates

        def __getitem__(self, path):
            asked.append(path)
            return self.updates[path]

        def __iter__(self):
            return iter(self.updates)

        def __len__(self):
            return len(self.updates)

    merged = nsc_merge.merge_factors({task: Lazy(held) for task, held in deltas(triples()).items()}, "svd", rank=2)
    assert len(asked) == 8
    path, factor = next(merged)
    assert (path, factor.rank) == ("q", 2)
    assert [path for path, _ in merged] == ["v", "o"]
    assert len(asked) == 8


def test_a_scaling_may_be_a_tensor_of_one_number():
    """As some packages keep it beside the factors."""
    plain = triples()
    kept = {
        task: {path: (A, B, torch.tensor([scaling])) for path, (A, B, scaling) in updates.items()}
        for task, updates in plain.items()
    }
    found, wanted = (dict(nsc_merge.merge_factors(one, "ties")) for one in (kept, plain))
    for path, factor in wanted.items():
        assert torch.equal(found[path].delta(), factor.delta())


@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "knots_ties"])
def test_numbers_kept_in_float8_are_computed_with_in_float32(name):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 6), (5, 2), (5, 6))
    A, B, delta = (torch.randn(shape, generator=generator).to(torch.float8_e4m3fn) for shape in shapes)
    kept = {"a": {"q": (A, B, 2.0)}, "b": {"q": delta}}
    wide = {"a": {"q": (A.float(), B.float(), 2.0)}, "b": {"q": delta.float()}}
    ((_, found),), ((_, expected),) = (nsc_merge.merge_factors(tasks, name) for tasks in (kept, wide))
    assert torch.equal(found.delta(), expected.delta())


def test_factors_of_a_folder_and_what_is_zero(tmp_path: Path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 9))
    peft = get_peft_model(model, LoraConfig(r=3, lora_alpha=12, target_modules=["0", "1"], lora_bias=True))
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    adapter = nsc_merge.load_adapter(peft, "t")
    merged = dict(nsc_merge.merge_factors({"t": adapter.factors, "u": {"0": torch.zeros(9, 12)}}, scale=0.5))
    for path, factor in merged.items():
        own = adapter.factors[path]
        torch.testing.assert_close(factor.delta(), 0.5 * own.delta(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(factor.bias.double(), 0.5 * own.bias_delta(), rtol=1e-6, atol=1e-6)
    (path, nothing), = nsc_merge.merge_factors({"u": {"0": torch.zeros(9, 12)}}, "ties")
    assert (path, nothing.rank, nothing.delta().shape) == ("0", 0, (9, 12))


@pytest.mark.skipif(not EXAMPLE.exists(), reason="needs the source tree")
@pytest.mark.parametrize(
    ("chosen", "keys"),
    [(["ties", "density=0.5"], {"delta"}), (["svd"], {"A", "B"}), (["ties", "--rank", "2"], {"A", "B"})],
)
def test_the_example_writes_what_is_merged(chosen, keys, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    folders = []
    for task in "ab":
        peft = get_peft_model(nn.Sequential(nn.Linear(12, 9)), LoraConfig(r=3, target_modules=["0"]))
        nn.init.normal_(peft.base_model.model[0].lora_B["default"].weight)
        peft.save_pretrained(tmp_path / task)
        folders.append(f"{task}={tmp_path / task}")
    out = tmp_path / "merged.safetensors"
    monkeypatch.setattr("sys.argv", ["merge_factors", *folders, "--out", str(out), "--method", *chosen])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    found = load_file(out)
    assert {key.rsplit(".", 1)[-1] for key in found} == keys
    assert f"{len(found)} tensors by {chosen[0]}" in capsys.readouterr().out
    tasks = {task: nsc_merge.load_adapter(tmp_path / task, task).factors for task in "ab"}
    options = {"density": 0.5} if "density=0.5" in chosen else {}
    ((_, expected),) = nsc_merge.merge_factors(tasks, chosen[0], rank=2 if "--rank" in chosen else None, **options)
    delta = found["0.delta"] if keys == {"delta"} else found["0.B"] @ found["0.A"]
    torch.testing.assert_close(delta.double(), expected.delta(), rtol=1e-5, atol=1e-6)


A, B = torch.ones(2, 5), torch.ones(3, 2)
ONE = {"a": {"q": (A, B, 1.0)}}
BAD = {
    "no mapping": ([("a", {})], {}, TypeError, "adapters: expected a mapping from task"),
    "nothing": ({}, {}, TypeError, "with at least one entry"),
    "no updates": ({"a": {}}, {}, ValueError, r"found none in any of \['a'\]"),
    "an adapter": ({"a": Adapter("a", {})}, {}, TypeError, "of an adapter, give its .factors"),
    "two of three": ({"a": {"q": (A, B)}}, {}, TypeError, r"\['q'\]: expected \(A .* found tuple of 2"),
    "text": ({"a": {"q": "folder"}}, {}, TypeError, "found 'folder'"),
    "no tensor": ({"a": {"q": (A, [1.0], 1.0)}}, {}, TypeError, "expected B to be a tensor, found list"),
    "ranks": ({"a": {"q": (A, B.t(), 1.0)}}, {}, ValueError, r"of one rank, found A \[2, 5\] and B \[2, 3\]"),
    "scaling": ({"a": {"q": (A, B, float("nan"))}}, {}, ValueError, "scaling: expected a finite number"),
    "not finite": ({"a": {"q": (A * torch.inf, B, 1.0)}}, {}, ValueError, "A: expected finite numbers"),
    "whole numbers": ({"a": {"q": A.int()}}, {}, ValueError, r"floating point, found \[2, 5\] of torch.int32"),
    "a shape alone": ({"a": {"q": (A.to("meta"), B, 1.0)}}, {}, ValueError, r"A: .*all its numbers, .* meta device"),
    "sparse": ({"a": {"q": A.to_sparse()}}, {}, ValueError, r"\['q'\]: .*all its numbers, .*torch.sparse_coo"),
    "a vector": ({"a": {"q": A[0]}}, {}, ValueError, "flatten a convolution"),
    "shapes": (
        {"a": {"q": (A, B, 1.0)}, "b": {"q": torch.ones(5, 3)}}, {}, ValueError,
        r"adapters\['b'\]\['q'\]: expected an update of \[3, 5\] as 'a' has, found one of \[5, 3\]",
    ),
    "DoRA": ({"a": {"q": Factor(A, B, 1.0, magnitude=torch.ones(3))}}, {}, ValueError, "is DoRA"),
    "both": ({"a": {"q": Factor(A, B, 1.0, dense=torch.ones(3, 5))}}, {}, ValueError, "found both; add them up"),
    "data": (ONE, {"method": "nsc"}, ValueError, "'nsc' needs data and gradients: nsc_merge.merge"),
    "per task": (ONE, {"method": "emr"}, ValueError, "'emr' gives no update for all tasks"),
    "unknown": (ONE, {"method": "tie"}, ValueError, "did you mean ties"),
    "option": (ONE, {"densty": 1}, ValueError, "densty: not an option of method"),
    "rank": (ONE, {"rank": 0}, ValueError, "rank: expected a whole number of at least 1"),
    "tolerance": (ONE, {"tolerance": -1}, ValueError, "tolerance: expected a finite number"),
    "weights": (
        ONE, {"method": "ties", "weights": {"b": 1.0}}, ValueError, r"weights: .*\['a'\], found \['b'\]"
    ),
    "scales": (ONE, {"scale": {"b": 1.0}}, ValueError, r"scale: .*\['a'\], found \['b'\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_iterated(case):
    adapters, options, kind, words = BAD[case]
    with pytest.raises(kind, match=words):
        nsc_merge.merge_factors(adapters, **options)


@pytest.mark.parametrize("method", ["linear", "robustmerge"])
def test_unequal_ranks_are_refused_before_the_first_update(method):
    unequal = {"a": {"q": (A, B, 1.0), "v": (A, B, 1.0)}, "b": {"q": (A, B, 1.0), "v": (A[:1], B[:, :1], 1.0)}}
    with pytest.raises(ValueError, match=r"equal ranks in a module, found {'a': 2, 'b': 1} at v; task_arithmetic"):
        next(nsc_merge.merge_factors(unequal, method))


def test_updates_too_large_for_float32_are_refused():
    huge = {"a": {"q": (A * 1e30, B * 1e30, 1.0)}}
    with pytest.raises(ValueError, match="not finite"):
        list(nsc_merge.merge_factors(huge, "ties"))
