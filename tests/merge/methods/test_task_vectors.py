"""TIES, DARE, EMR and FR: hand-computed cases, peft's own functions, expectations, and streaming."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.utils import merge_utils

import nsc_merge
from nsc_merge.adapters import Adapter, Factor
from nsc_merge.methods import METHODS
from nsc_merge.methods.task_vectors import dare, emr, fr_merging, ties
from nsc_merge.methods.task_vectors import elementwise as ew

ELEMENTWISE = ("ties", "dare", "dare_ties", "emr_unified", "fr")


def adapters_of(tensors):
    """Task -> path -> matrix, as adapters whose update is that matrix exactly."""
    return {
        task: Adapter(task, {path: Factor(torch.eye(x.shape[1]), x, 1.0) for path, x in row.items()})
        for task, row in tensors.items()
    }


def random_adapters(tasks="abc", paths="xyz", rank=4, scaling=0.7, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return {t: Adapter(t, {p: Factor(normal(rank, 30), normal(20, rank), scaling) for p in paths}) for t in tasks}


def merged(method, adapters, paths, **options):
    kind = METHODS[method]
    function = {"ties": ties.ties, "dare": dare.dare, "dare_ties": dare.dare_ties}.get(
        method, {"emr_unified": emr.emr_unified, "fr": fr_merging.fr}.get(method)
    )
    return {path: factor.delta() for path, factor in function(adapters, list(paths), kind.options(**options))}


# Two tasks on one module of four entries.
HAND = {"a": {"x": torch.tensor([[4.0, -1.0, 3.0, 0.5]])}, "b": {"x": torch.tensor([[2.0, 3.0, -5.0, 0.25]])}}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Half of four entries each, and one more: both drop their last.
        ({"preset": "canonical", "density": 0.5}, [3.0, 3.0, -5.0, 0.0]),
        ({"preset": "canonical", "density": 0.5, "scale": 0.5}, [1.5, 1.5, -2.5, 0.0]),
        # Half of them and no more: a keeps 4 and 3, b keeps 3 and -5.
        ({"preset": "peft", "density": 0.5}, [4.0, 3.0, -5.0, 0.0]),
        ({"preset": "nsc", "density": 0.5}, [1.2, 0.9, 0.9, 0.0]),
        ({"preset": "peft", "density": 1.0}, [3.0, 3.0, -5.0, 0.375]),
        # 3 (-1) + 1 (3) is a tie and so positive: b's 3 alone agrees with that.
        ({"preset": "mergekit", "weights": {"a": 3.0, "b": 1.0}}, [3.5, 3.0, 3.0, 0.4375]),
        # Weighted, a is -4, 1, -3, -0.5 and b is 4, 6, -10, 0.5: two ties, and both agree in between.
        ({"preset": "mergekit", "weights": {"a": -1.0, "b": 2.0}}, [2.0, 7.0, -13.0, 0.25]),
        ({"preset": "adamerging", "density": 1.0, "scale": 1.0}, [6.0, 3.0, -5.0, 0.75]),
        # One vote each, and a tie is positive.
        ({"preset": "nsc", "density": 1.0, "scale": 1.0}, [6.0, 3.0, 3.0, 0.75]),
        ({"preset": "knots", "density": 1.0}, [0.9, 0.9, -1.5, 0.1125]),
    ],
)
def test_ties_by_hand(options, expected):
    found = merged("ties", adapters_of(HAND), "x", **options)["x"]
    torch.testing.assert_close(found.float(), torch.tensor([expected]))


def test_ties_sign_of_a_cancellation():
    cancelling = {"a": {"x": torch.tensor([[1.0, -1.0, -2.0]])}, "b": {"x": torch.tensor([[-1.0, -3.0, -2.0]])}}
    for zero, expected in (("positive", 1.0), ("negative", -1.0), ("majority", -1.0)):
        found = merged("ties", adapters_of(cancelling), "x", density=1.0, zero=zero)["x"]
        assert found[0].tolist() == [expected, -2.0, -2.0]


def test_ties_trims_over_all_modules_or_in_each():
    tensors = {"a": {"x": torch.tensor([[1.0, 2.0]]), "y": torch.tensor([[30.0, 40.0]])}}
    everywhere = merged("ties", adapters_of(tensors), "xy", density=0.5, keep="floor")
    assert everywhere["x"].tolist() == [[0.0, 0.0]]
    assert everywhere["y"].tolist() == [[30.0, 40.0]]
    each = merged("ties", adapters_of(tensors), "xy", density=0.5, keep="floor", trim_scope="tensor")
    assert (each["x"].tolist(), each["y"].tolist()) == ([[0.0, 2.0]], [[0.0, 40.0]])


def test_an_absent_task_has_no_vote_and_does_not_dilute_the_mean():
    tensors = {**HAND, "c": {"y": torch.tensor([[1.0, 1.0, 1.0, 1.0]])}}
    assert torch.equal(merged("ties", adapters_of(tensors), "xy")["x"], merged("ties", adapters_of(HAND), "x")["x"])


WEIGHTS = {"a": 0.3, "b": -1.0, "c": 2.0}


@pytest.mark.parametrize(("sign", "name"), [("sum", "total"), ("count", "frequency")])
def test_ties_is_pefts(sign, name):
    adapters = random_adapters()
    updates = [ew.dense_update(adapter.factors["x"]) for adapter in adapters.values()]
    expected = merge_utils.ties(updates, torch.tensor(list(WEIGHTS.values())), 0.3, name)
    found = merged("ties", adapters, "xyz", preset="peft", density=0.3, sign=sign, weights=WEIGHTS)["x"]
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-5)


def test_dare_is_pefts_with_the_same_draws(monkeypatch):
    adapters = random_adapters()
    updates = {task: ew.dense_update(adapter.factors["x"]) for task, adapter in adapters.items()}
    masks = [dare.sparsify(torch.ones_like(update), 0.7, "none", 5, task, "x") for task, update in updates.items()]
    for theirs, ours, options in (
        (merge_utils.dare_ties, "dare_ties", {"preset": "peft", "weights": WEIGHTS}),
        (merge_utils.dare_linear, "dare", {}),
    ):
        drawn = iter(masks)
        monkeypatch.setattr(torch, "bernoulli", lambda shares, drawn=drawn: next(drawn))
        weights = torch.tensor(list(WEIGHTS.values()) if options else [1.0, 1.0, 1.0])
        expected = theirs(list(updates.values()), weights, 1 - 0.7)
        found = merged(ours, adapters, "xyz", drop=0.7, seed=5, **options)["x"]
        torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("scope", "kind"), [("factors", "ties"), ("tensor", "ties_svd")])
def test_ties_is_that_of_pefts_models(model, scope, kind):
    """add_weighted_adapter on a real PeftModel; its SVD at full rank loses nothing."""
    targets = ["q_proj", "v_proj"]
    configs = {"a": {"lora_alpha": 6}, "b": {"lora_alpha": 3, "use_rslora": True}}
    peft_model = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules=targets, **configs["a"]), "a")
    peft_model.add_adapter("b", LoraConfig(r=4, target_modules=targets, **configs["b"]))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in peft_model.named_parameters():
            if "lora_" in name:
                value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    weights = {"a": -0.5, "b": 2.0}
    more = {"svd_rank": 32} if kind == "ties_svd" else {}
    peft_model.add_weighted_adapter(
        list(weights), list(weights.values()), "m", combination_type=kind, density=0.4, **more
    )
    adapters = {name: nsc_merge.load_adapter(peft_model, name) for name in "ab"}
    result = nsc_merge.merge(
        model, adapters, method="ties", preset="peft", trim_scope=scope, density=0.4, weights=weights
    )
    # peft 0.19 to 0.21 gives an adapter merged from rsLoRA ones the scaling of rsLoRA; its factors are right.
    expected = nsc_merge.load_adapter(peft_model, "m")
    for path, factor in expected.factors.items():
        torch.testing.assert_close(result.delta(path), factor.B.double() @ factor.A.double(), rtol=1e-4, atol=1e-5)


def test_modules_are_asked_for_one_at_a_time():
    adapters = random_adapters()
    asked = []

    def source(path, task):
        asked.append(path)
        return ew.dense_update(adapters[task].factors[path])

    tasks = ew.tasks_by_path(adapters, "xyz")
    found = dict(ew.ties_merge(source, tasks, ew.Ties(0.2, "global", "next", "sum", "majority", "mean")))
    assert asked == [path for _ in range(3) for path in "xyz" for _ in "abc"]
    torch.testing.assert_close(found["y"].double(), merged("ties", adapters, "xyz")["y"])


def test_dare_keeps_the_expectation_and_what_it_is_told_to():
    tensor = torch.full((400, 400), 2.0)
    kept = dare.sparsify(tensor, 0.9, "inverse", 0, "a")
    assert float((kept != 0).float().mean()) == pytest.approx(0.1, abs=0.005)
    assert float(kept.mean()) == pytest.approx(2.0, rel=0.03)
    assert kept.unique().tolist() == pytest.approx([0.0, 20.0])
    assert float(dare.sparsify(tensor, 0.9, "l1", 0, "a").abs().sum()) == pytest.approx(float(tensor.sum()), rel=1e-5)
    assert set(dare.sparsify(tensor, 0.9, "none", 0, "a").unique().tolist()) == {0.0, 2.0}
    assert torch.equal(dare.sparsify(tensor, 0.0, "inverse", 0, "a"), tensor)


def test_dare_draws_by_seed_task_and_module_and_not_by_order():
    adapters = random_adapters()
    first = merged("dare_ties", adapters, "xyz")
    assert torch.equal(merged("dare_ties", adapters, "zyx")["x"], first["x"])
    assert not torch.equal(merged("dare_ties", adapters, "xyz", seed=1)["x"], first["x"])
    same = torch.ones(50, 50)
    assert not torch.equal(dare.sparsify(same, 0.5, "none", 0, "a", "x"), dare.sparsify(same, 0.5, "none", 0, "b", "x"))


@pytest.mark.parametrize("preset", dare.PRESETS)
def test_dare_ties_without_dropping_is_ties(preset):
    adapters = random_adapters()
    steps = {name: value for name, value in dare.PRESETS[preset].items() if name in ties.PRESETS["canonical"]}
    expected = merged("ties", adapters, "xyz", **steps)["x"]
    torch.testing.assert_close(merged("dare_ties", adapters, "xyz", preset=preset, drop=0.0)["x"], expected)


def test_trimming_before_dropping_keeps_only_the_largest():
    adapters = random_adapters("a", "x")
    found = merged("dare_ties", adapters, "x", preset="nsc", drop=0.5, scale=1.0, aggregate="sum")["x"]
    update = adapters["a"].factors["x"].delta()
    least = update.abs().flatten().sort(descending=True).values[int(0.2 * update.numel()) - 1]
    assert bool((update.abs()[found != 0] >= least * (1 - 1e-6)).all())
    assert 0 < int((found != 0).sum()) < 0.2 * update.numel()


def test_emr_by_hand():
    tensors = {"a": {"x": torch.tensor([[4.0, -1.0, 3.0]])}, "b": {"x": torch.tensor([[2.0, 3.0, -5.0]])}}
    adapters = adapters_of(tensors)
    assert merged("emr_unified", adapters, "x")["x"].tolist() == [[4.0, 3.0, -5.0]]
    rescale = emr.rescaling(adapters, ["x"])
    updates = {
        task: emr.Modulated(task, emr.UnifiedUpdates(adapters), adapter.factors, rescale[task])["x"].delta().float()
        for task, adapter in adapters.items()
    }
    # a agrees at the first entry only, b everywhere; both are scaled to their own mean magnitude.
    torch.testing.assert_close(updates["a"], torch.tensor([[8.0, 0.0, 0.0]]))
    torch.testing.assert_close(updates["b"], torch.tensor([[4.0, 3.0, -5.0]]) * (10 / 12))


def test_emr_rescales_over_all_modules_that_a_task_touches():
    tensors = {
        "a": {"x": torch.tensor([[1.0, -1.0]]), "y": torch.tensor([[2.0, 2.0]])},
        "b": {"x": torch.tensor([[3.0, 3.0]])},
    }
    # In x the unified update is [3, 3] and a keeps one of two entries; in y it is a's own.
    rescale = emr.rescaling(adapters_of(tensors), ["x", "y"])
    assert rescale == {"a": pytest.approx((1 + 2) / (1.5 + 2)), "b": pytest.approx(1.0)}


def test_emr_where_the_mean_is_zero_is_negative():
    tensors = {"a": {"x": torch.tensor([[1.0, 0.0]])}, "b": {"x": torch.tensor([[-1.0, 0.0]])}}
    assert merged("emr_unified", adapters_of(tensors), "x")["x"].tolist() == [[-1.0, 0.0]]


def test_emr_of_one_task_is_the_task(model, folders):
    result = nsc_merge.merge(model, {"plain": folders["plain"]}, method="emr").for_task("plain")
    alone = nsc_merge.merge(model, {"plain": folders["plain"]}, method="finetuned").for_task("plain")
    for path in result.paths:
        torch.testing.assert_close(result.delta(path), alone.delta(path), rtol=1e-5, atol=1e-6)


def test_emr_leaves_absent_modules_alone_and_keeps_biases(model, write_adapter, tmp_path):
    folders = {
        "a": write_adapter("a", 1, lora_bias=True),
        "b": write_adapter("b", 2, target_modules=["v_proj"], lora_bias=True),
    }
    result = nsc_merge.merge(model, folders, method="emr")
    one = result.for_task("b")
    assert not one.delta("layers.0.attention.q_proj").any()
    path = "layers.0.attention.v_proj"
    torch.testing.assert_close(one.bias_delta(path), result.adapters["b"].factors[path].bias_delta())
    out = result.save(tmp_path / "out", "lora", rank=8)
    saved = nsc_merge.load_adapter(out / "tasks" / "a", "a").factors[path]
    best = torch.linalg.svdvals(result.for_task("a").delta(path))[8:].norm()
    assert float((saved.delta() - result.for_task("a").delta(path)).norm()) == pytest.approx(float(best), rel=1e-3)


KEEP_EVERYTHING = {
    "ties": {"density": 1.0},
    "dare": {"drop": 0.0},
    "dare_ties": {"density": 1.0, "drop": 0.0},
    "emr_unified": {},
    "fr": {"drop": "near", "cut": 0.0, "ring": False, "scale": 1.0},
}


@pytest.mark.parametrize("method", ELEMENTWISE)
def test_one_task_is_reproduced(method):
    adapters = random_adapters("a")
    for path, update in merged(method, adapters, "xyz", **KEEP_EVERYTHING[method]).items():
        torch.testing.assert_close(update, adapters["a"].factors[path].delta(), rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.sampled_from(ELEMENTWISE),
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.integers(0, 100),
)
def test_every_method_takes_any_shapes(method, ranks, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    adapters = {}
    for index, rank in enumerate(ranks):
        A, B = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
        adapters[str(index)] = Adapter(str(index), {"x": Factor(A, B, (-1.5) ** index)})
    update = merged(method, adapters, "x")["x"]
    assert update.shape == shape
    assert torch.isfinite(update).all()
    largest = sum(adapter.factors["x"].delta().abs().max() for adapter in adapters.values())
    if method in ("ties", "emr_unified"):
        assert float(update.abs().max()) <= float(largest) * (1 + 1e-5)


@pytest.mark.parametrize(
    ("preset", "shape", "dropped"),
    [
        ("original", (768, 768), 0.0002),
        ("original", (768, 3072), 0.68),
        ("nsc", (768, 768), 0.031),
        ("shifted", (768, 768), 0.031),
    ],
)
def test_fr_drops_as_much_of_the_spectrum_as_documented(preset, shape, dropped):
    kept = fr_merging.kept_frequencies(shape, fr_merging.FROptions(preset=preset))
    assert float((kept == 0).double().mean()) == pytest.approx(dropped, rel=0.05)
    # Frequency zero goes in the original and the shifted form, the highest one in NSC's.
    assert bool(kept[0, 0]) == (preset == "nsc")
    assert bool(kept[shape[0] // 2, shape[1] // 2]) == (preset != "nsc")


@pytest.mark.parametrize("shape", [(6, 8), (7, 8), (6, 5), (7, 5), (1, 1)])
@pytest.mark.parametrize("preset", fr_merging.PRESETS)
def test_fr_filters_the_full_spectrum(shape, preset):
    """Of odd and even sides, as by a complex transform of which the real part is taken."""
    update = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    adapters = adapters_of({"a": {"x": update}})
    kept = fr_merging.kept_frequencies(shape, fr_merging.FROptions(preset=preset, cut=0.5))
    expected = torch.fft.ifft2(torch.fft.fft2(update.double()) * kept).real
    found = merged("fr", adapters, "x", preset=preset, cut=0.5, align=False, scale=1.0)["x"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_fr_keeps_what_it_does_not_filter():
    adapters = random_adapters()
    everything = {"drop": "far", "cut": 10.0, "ring": False, "align": False, "scale": 1.0}
    expected = sum(adapter.factors["x"].delta() for adapter in adapters.values())
    torch.testing.assert_close(merged("fr", adapters, "xyz", **everything)["x"], expected, rtol=1e-5, atol=1e-5)
    high = merged("fr", random_adapters("a", "x"), "x", preset="shifted", scale=1.0)["x"]
    assert abs(float(high.mean())) < 1e-6


@pytest.mark.parametrize("method", ELEMENTWISE)
def test_refactoring_an_update_changes_nothing(method):
    adapters = random_adapters()
    mixing = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)) + 3 * torch.eye(4)

    def other(factor):
        return Factor(torch.linalg.solve(mixing, factor.A), 2.0 * factor.B @ mixing, factor.scaling / 2)

    again = {t: Adapter(t, {p: other(f) for p, f in adapter.factors.items()}) for t, adapter in adapters.items()}
    for path, update in merged(method, adapters, "xyz").items():
        found = merged(method, again, "xyz")[path]
        close = torch.isclose(found, update, rtol=1e-3, atol=1e-4)
        # Rounding may move an entry across a threshold.
        assert float(close.double().mean()) > 0.99


def test_ties_on_factors_depends_on_the_factors():
    adapters = random_adapters()
    mixing = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)) + 3 * torch.eye(4)
    again = {
        task: Adapter(
            task, {p: Factor(torch.linalg.solve(mixing, f.A), f.B @ mixing, f.scaling) for p, f in one.factors.items()}
        )
        for task, one in adapters.items()
    }
    first, second = (merged("ties", one, "x", trim_scope="factors")["x"] for one in (adapters, again))
    assert float((first - second).norm() / first.norm()) > 0.1


@pytest.mark.parametrize("method", ["ties", "dare", "dare_ties", "emr", "emr_unified", "fr"])
def test_every_method_takes_unequal_ranks_absent_modules_and_other_scalings(model, folders, method):
    result = nsc_merge.merge(model, folders, method=method)
    results = [result.for_task(task) for task in folders] if result.per_task else [result]
    for one in results:
        assert set(one.paths) == set(result.paths)
        assert all(torch.isfinite(one.delta(path)).all() for path in one.paths)
        one.apply(copy.deepcopy(model))


def test_scaling_the_result_is_the_option_scale(model, folders):
    for method in ELEMENTWISE:
        unscaled, half = (nsc_merge.merge(model, folders, method=method, scale=scale) for scale in (1.0, 0.5))
        path = unscaled.paths[0]
        torch.testing.assert_close(unscaled.scaled(0.5).delta(path), half.delta(path))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("ties", {"preset": "best"}, r"preset: expected one of \['canonical', .*, found 'best'"),
        ("ties", {"density": 0.0}, "density: expected a finite number above 0 and of at most 1, found 0.0"),
        ("ties", {"density": 1.5}, "density: expected .*, found 1.5"),
        ("ties", {"trim_scope": "layer"}, "trim_scope: expected one of"),
        ("ties", {"keep": "ceil"}, "keep: expected one of"),
        ("ties", {"aggregate": "max"}, "aggregate: expected one of"),
        ("ties", {"weights": {"plain": 1.0}}, "weights: expected one value for each of"),
        ("ties", {"weights": {1: 1.0, "plain": 1.0}}, r"weights: expected one value .*, found \[1, 'plain'\]"),
        ("task_arithmetic", {"scale": {"plain": float("nan")}}, r"scale\['plain'\]: expected .*, found nan"),
        ("ties", {"trim_scope": "factors"}, "trim_scope='factors' adds factors and needs equal ranks in"),
        ("dare", {"drop": 1.0}, "drop: expected a probability below 1, found 1"),
        ("dare", {"drop": -0.1}, "drop: expected a finite number of at least 0 and of at most 1, found -0.1"),
        ("dare", {"seed": -1}, "seed: expected a whole number of at least 0, found -1"),
        ("dare_ties", {"rescale": "l2"}, "rescale: expected one of"),
        ("dare_ties", {"order": "both"}, "order: expected one of"),
        ("emr_unified", {"scale": float("nan")}, "scale: expected a finite number, found nan"),
        ("fr", {"centre": "middle"}, "centre: expected one of"),
        ("fr", {"ring": 1}, "ring: expected one of"),
        ("fr", {"cut": -1.0}, "cut: expected a finite number of at least 0, found -1.0"),
    ],
)
def test_bad_options_are_named(model, folders, method, options, message):
    with pytest.raises(ValueError, match=message):
        nsc_merge.merge(model, folders, method=method, **options)
