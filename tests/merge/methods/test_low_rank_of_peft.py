"""Factor-space merges of adapters that peft wrote: results that peft loads, peft's own merges, and options refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import zoo
from factor_cases import FUNCTIONS, NEED_EQUAL_RANKS, relative
from peft import LoraConfig, PeftModel, get_peft_model

import nsc_merge


def with_two_adapters(model, modules):
    """A copy with random adapters a and b, whose scalings are 1.5 and 0.5."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=modules)
    peft_model = get_peft_model(copy.deepcopy(model), config, adapter_name="a")
    peft_model.add_adapter("b", LoraConfig(r=4, lora_alpha=2, target_modules=modules))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in peft_model.named_parameters():
            if "lora_" in name:
                value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    return peft_model


def test_the_registry_rounds_once_at_the_end(model, folders):
    """Task arithmetic by way of SVD and of Core Space, through ``merge``, to the precision of float32."""
    expected = nsc_merge.merge(model, folders, method="task_arithmetic", scale=0.7)
    for method, options in {"svd": {}, "core_space": {"merge": "sum"}}.items():
        result = nsc_merge.merge(model, folders, method=method, scale=0.7, **options)
        assert result.paths == expected.paths
        for path in result.paths:
            assert result.factors[path].A.dtype == result.factors[path].B.dtype == torch.float32
            assert relative(result.delta(path), expected.delta(path)) < 1e-6


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


@pytest.mark.parametrize("weights", [{"a": 0.5, "b": 1.5}, {"a": -0.5, "b": 2.0}])
@pytest.mark.parametrize("kind", ["svd", "linear", "cat"])
def test_pefts_own_merges(model, kind, weights):
    peft_model = with_two_adapters(model, ["q_proj", "v_proj"])
    extra = {"svd_rank": 3} if kind == "svd" else {}
    peft_model.add_weighted_adapter(list(weights), list(weights.values()), "m", combination_type=kind, **extra)
    adapters = {name: nsc_merge.load_adapter(peft_model, name) for name in weights}
    if kind == "cat":
        result = nsc_merge.merge(model, adapters, method="task_arithmetic", scale=weights)
    else:
        rank = {"rank": 3} if kind == "svd" else {}
        result = nsc_merge.merge(model, adapters, method=kind, weights=weights, **rank)
    expected = nsc_merge.load_adapter(peft_model, "m")
    assert set(expected.factors) == set(result.paths)
    for path, update in expected.factors.items():
        assert relative(result.delta(path), update.delta()) < 1e-5


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("svd", {"rank": 0}, "rank: expected a whole number of at least 1, found 0"),
        ("linear", {"preset": "mergekit"}, "preset: expected one of"),
        ("svd", {"weights": {"plain": 1.0}}, "weights: expected one value for each of"),
        ("linear", {"weights": {"plain": math.inf}}, r"weights\['plain'\]: expected a finite number, found inf"),
        ("svd", {"weights": [1.0]}, r"weights: expected a mapping of tasks to numbers, found \[1.0\]"),
        ("knots_ties", {"weights": {"plain": True}}, r"weights\['plain'\]: expected a finite number, found True"),
        ("lora_lego", {"seed": 2**32}, r"seed: expected a whole number below 2\^32, .*, found 4294967296"),
        ("core_space", {"drop": 1.0}, "drop: expected a probability below 1, found 1"),
        ("svd_cur", {"scale": 10**400}, "scale: expected a finite number, found 1000"),
        ("knots_ties", {"along": "both"}, "along: expected one of"),
        ("knots_ties", {"trim_scope": "factors"}, "trim_scope: expected one of"),
        ("knots_dare_ties", {"vectors": "V"}, "vectors: expected one of"),
        ("knots_ties", {"atol": -1}, "atol: expected a finite number of at least 0"),
        ("knots_ties", {"rtol": 2}, "rtol: expected a finite number of at least 0 and of at most 1"),
        ("core_space", {"bases": "cores"}, "bases: expected one of"),
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


@pytest.mark.parametrize("weights", [{"a": 0.7, "b": -0.4}, {"a": -0.7, "b": -0.4}, {"a": 0.7, "b": 0.4}])
@pytest.mark.parametrize(
    ("kind", "method", "options", "density"),
    [
        ("linear", "linear", {}, None),
        ("ties", "ties", {"preset": "peft", "trim_scope": "factors", "density": 0.5}, 0.5),
        ("magnitude_prune", "magnitude_prune", {"trim_scope": "factors", "density": 0.5}, 0.5),
        ("dare_linear", "dare", {"drop_scope": "factors", "drop": 0.0}, 1.0),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pefts_own_merges_of_embeddings(kind, method, options, density, weights):
    """The sign of a weight goes into PEFT's first factor, which is the other one of an embedding."""
    clean = zoo.build("llama")
    peft_model = with_two_adapters(clean, ["q_proj", "embed_tokens"])
    given = (list(weights), list(weights.values()), "m")
    peft_model.add_weighted_adapter(*given, combination_type=kind, density=density)
    adapters = {name: nsc_merge.load_adapter(peft_model, name) for name in weights}
    result = nsc_merge.merge(clean, adapters, method=method, weights=weights, **options)
    expected = nsc_merge.load_adapter(peft_model, "m")
    assert "model.embed_tokens" in result.paths
    by_factors = {name: adapter.factors for name, adapter in adapters.items()}
    without_a_model = dict(nsc_merge.merge_factors(by_factors, method, weights=weights, **options))
    for path, update in expected.factors.items():
        assert relative(result.delta(path), update.delta()) < 1e-5
        assert relative(without_a_model[path].delta(), update.delta()) < 1e-5
