"""Merging of adapters that are loaded in a PEFT model, against PEFT's own forward and ``add_weighted_adapter``."""

from __future__ import annotations

import copy
import inspect
import runpy
import typing
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import AdaLoraConfig, IA3Config, LoraConfig, LoraModel, PeftModel, get_peft_model
from peft.tuners.lora import Linear

import nsc_merge
from nsc_merge.integrations.combinations import COMBINATIONS
from nsc_merge.integrations.peft import merge
from peft_cases import NAMES, build, inputs, lora_layers

EXAMPLE = Path(__file__).parents[3] / "examples" / "integrations" / "peft_adapters.py"
# Of equal ranks, which merges of A and B apart need.
ALIKE = {"r": 4, "lora_alpha": 6, "use_rslora": False, "rank_pattern": {}}


@pytest.fixture
def batch():
    return inputs()


def data():
    generator = torch.Generator().manual_seed(3)
    return {name: [{"input_ids": torch.randint(0, 64, (2, 7), generator=generator)}] for name in NAMES}


@pytest.mark.parametrize("lora_bias", [False, True])
def test_merge_registers_an_exact_adapter(batch, lora_bias):
    model = build(lora_bias=lora_bias)
    model.base_model.set_adapter("a")
    objects = {name: id(module) for name, module in model.named_modules()}
    merged = merge(model, NAMES, data=data(), steps=3, lr=1e-2, progress=False)
    coefficients = merged.coefficients
    assert merged.adapter_name == "merged"
    assert set(merged.errors.values()) == {0.0}
    assert {id(module) for module in model.modules()} > set(objects.values())
    assert model.active_adapters == ["a"]
    assert not any(value.requires_grad for key, value in model.named_parameters() if "merged" in key)
    assert len({value for row in coefficients.values() for value in row.values()}) > 10
    for path, layer in ((path, m) for path, m in model.get_base_model().named_modules() if isinstance(m, Linear)):
        assert layer.scaling["merged"] == 1.0
        assert layer.r["merged"] == sum(layer.r[name] for name in NAMES if name in layer.lora_A)
        for name in NAMES:
            if name in layer.lora_A:
                layer.scaling[name] *= coefficients[path][name]
    with torch.no_grad():
        model.set_adapter("merged")
        found = model(**batch).logits
        model.base_model.set_adapter(NAMES)
        torch.testing.assert_close(found, model(**batch).logits, rtol=2e-5, atol=2e-5)


def test_merge_of_a_subset_ignores_the_others_and_can_be_saved(batch, tmp_path):
    model = build()
    options = {"method": "task_arithmetic", "scale": 0.5}
    coefficients = merge(model, ["a", "c"], adapter_name="sum", **options).coefficients
    assert {value for row in coefficients.values() for value in row.values()} == {0.0, 0.5}
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    model.set_adapter("sum")
    with torch.no_grad():
        expected = model(**batch).logits
        model.load_adapter(tmp_path / "sum", "again")
        model.set_adapter("again")
        assert torch.equal(model(**batch).logits, expected)


def lora_paths(model):
    return [(path, one) for path, one in model.get_base_model().named_modules() if isinstance(one, Linear)]


def test_merge_refuses_wrong_names():
    model = build()
    for wrong in (["a", "x"], ["a", "a"], [], "ab"):
        with pytest.raises(ValueError, match=r"adapters: expected different names among \['a', 'b', 'c'\], found"):
            merge(model, wrong, data=data(), adapter_name="merged")
    with pytest.raises(ValueError, match="adapter_name: 'b' is already loaded"):
        merge(model, ["a"], data=data(), adapter_name="b")
    for wrong in ("x.y", "", "keys", 3):
        with pytest.raises(ValueError, match=f"adapter_name: expected a name that PEFT takes, found {wrong!r}"):
            merge(model, ["a"], data=data(), adapter_name=wrong)
    with pytest.raises(TypeError, match="model: expected a PeftModel or a model with adapters in it, found Linear"):
        merge(torch.nn.Linear(2, 2), ["a"], adapter_name="merged")
    dora = build(use_dora=True)
    with pytest.raises(ValueError, match="DoRA"):
        merge(dora, NAMES, data=data(), adapter_name="merged")
    assert list(dora.peft_config) == NAMES
    other = get_peft_model(build().unload(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "a")
    with pytest.raises(ValueError, match=r"adapters\['a'\]: peft_type: expected 'LORA', found 'IA3'"):
        merge(other, ["a"], method="task_arithmetic")
    allocated = get_peft_model(build().unload(), AdaLoraConfig(target_modules=["q_proj"], total_step=9), "a")
    with pytest.raises(ValueError, match=r"adapters: \['a'\] are AdaLoRA, .* nsc_merge.merge takes them"):
        merge(allocated, ["a"], method="task_arithmetic")


def test_a_model_that_torch_compile_wrapped_gets_the_adapter(batch):
    model, plain = build(), build()
    compiled = torch.compile(model, backend="eager")
    merge(plain, NAMES, data=data(), steps=2, progress=False)
    with torch.no_grad():
        compiled(**batch)
        merge(compiled, NAMES, data=data(), steps=2, progress=False)
        for one in (plain, model):
            one.set_adapter("merged")
        torch.testing.assert_close(compiled(**batch).logits, plain(**batch).logits)


def test_merge_refuses_a_model_with_adapters_in_its_weights():
    model = build()
    model.merge_adapter(["c"])
    with pytest.raises(
        ValueError, match=r"model: \['c'\] are merged into its weights.* call unmerge_adapter\(\) first"
    ):
        merge(model, ["a", "b"], method="task_arithmetic")
    assert list(model.peft_config) == NAMES
    model.unmerge_adapter()
    assert merge(model, ["a", "b"], method="task_arithmetic").adapter_name == "merged"


def update_of(model, path, name):
    layer = model.get_base_model().get_submodule(path)
    return layer.get_delta_weight(name) if name in layer.lora_A else 0.0


@pytest.mark.parametrize("combination_type", ["cat", "svd"])
def test_what_add_weighted_adapter_takes_gives_what_it_gives(combination_type):
    model = build()
    arguments = (NAMES, [0.7, -0.2, 0.5])
    model.add_weighted_adapter(*arguments, "theirs", combination_type, svd_rank=5)
    merged = merge(model, *arguments, "ours", combination_type, 5 if combination_type == "svd" else None)
    assert merged.adapter_name == "ours"
    for path, row in merged.coefficients.items():
        present = [name for name in NAMES if name in model.get_base_model().get_submodule(path).lora_A]
        assert {name: row[name] for name in present} == {
            name: weight for name, weight in zip(*arguments, strict=True) if name in present
        }
        exact = sum(row[name] * update_of(model, path, name) for name in present)
        ours, theirs = update_of(model, path, "ours"), update_of(model, path, "theirs")
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        error = float((ours - exact).norm() / exact.norm())
        assert merged.errors[path] == pytest.approx(error, abs=1e-5)
    truncated = {path: error for path, error in merged.errors.items() if error}
    assert bool(truncated) == (combination_type == "svd")


@pytest.mark.parametrize(
    ("combination_type", "options"),
    [
        ("linear", {}),
        ("ties", {"density": 0.3}),
        ("ties", {"density": 0.5, "majority_sign_method": "frequency"}),
        ("ties_svd", {"density": 0.3, "svd_rank": 7}),
        ("ties_svd", {"density": 0.4, "majority_sign_method": "frequency"}),
        ("magnitude_prune", {"density": 0.3}),
        ("magnitude_prune_svd", {"density": 0.3, "svd_rank": 7, "svd_full_matrices": False}),
        # Without what is random.
        ("dare_linear", {"density": 1.0}),
        ("dare_linear_svd", {"density": 1.0}),
        ("dare_ties", {"density": 1.0, "majority_sign_method": "total"}),
        ("dare_ties", {"density": 1.0, "majority_sign_method": "frequency"}),
        ("dare_ties_svd", {"density": 1.0, "svd_rank": 3}),
    ],
)
@pytest.mark.parametrize("weights", [[0.7, 0.2, 0.5], [0.7, -0.2, 0.0]])
def test_pefts_other_ways_give_what_it_gives(combination_type, options, weights):
    model = build(**ALIKE)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The density 1.0 is greater than or equal to 1")
        model.add_weighted_adapter(NAMES, weights, "theirs", combination_type, **options)
    merged = merge(model, NAMES, weights, "ours", combination_type, **options)
    assert not merged.coefficients
    assert set(merged.errors) == {path for path, layer in lora_paths(model)}
    ranks = {layer.r["ours"] for _, layer in lora_paths(model)}
    assert ranks == {layer.r["theirs"] for _, layer in lora_paths(model)}
    for path in merged.errors:
        torch.testing.assert_close(
            update_of(model, path, "ours"), update_of(model, path, "theirs"), rtol=1e-4, atol=1e-5
        )


def test_the_rank_of_a_truncation_is_the_configurations_where_no_layer_has_it():
    """Layers of rank 1 and 2 by a pattern, under a rank of 4: PEFT truncates to 4."""
    model = build(rank_pattern={"q_proj": 1, "v_proj": 2})
    model.add_weighted_adapter(NAMES, [0.7, -0.2, 0.5], "theirs", "svd")
    merge(model, NAMES, [0.7, -0.2, 0.5], "ours", "svd")
    for path, layer in lora_paths(model):
        assert layer.r["ours"] == min(4, sum(layer.r[name] for name in NAMES if name in layer.lora_A))
        torch.testing.assert_close(
            update_of(model, path, "ours"), update_of(model, path, "theirs"), rtol=1e-4, atol=1e-5
        )


def test_every_way_of_peft_is_taken_and_no_other():
    signature = inspect.signature(LoraModel.add_weighted_adapter)
    theirs = signature.parameters["combination_type"].annotation
    kinds = typing.get_args(typing.get_type_hints(LoraModel.add_weighted_adapter)["combination_type"] or theirs)
    assert set(COMBINATIONS) == set(kinds)
    own = {"self", "adapters", "weights", "adapter_name", "combination_type", "svd_rank"}
    translated = {"svd_clamp", "svd_full_matrices", "svd_driver", "density", "majority_sign_method"}
    assert set(signature.parameters) == own | translated


def one_linear():
    torch.manual_seed(5)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(32, 32)), config, NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, config)
    return model


def kept(model, name):
    """The factors of a merged adapter in the first layer, and the share of their entries that are not zero."""
    layer = next(one for _, one in lora_paths(model) if all(adapter in one.lora_A for adapter in NAMES))
    factors = [layer.lora_A[name].weight, layer.lora_B[name].weight]
    return factors, sum(int((factor != 0).sum()) for factor in factors) / sum(factor.numel() for factor in factors)


@pytest.mark.parametrize(("combination_type", "whole"), [("dare_linear", "linear"), ("dare_ties", None)])
def test_random_ways_drop_as_many_entries_as_peft_and_expect_the_same(combination_type, whole):
    """PEFT draws from the global generator and ours from one of its own, so that only shares and means compare."""
    model, draws, density = one_linear(), 60, 0.25
    weights = [0.7, 0.2, 0.5]
    found = {"ours": [], "theirs": []}
    for seed in range(draws):
        merge(model, NAMES, weights, "ours", combination_type, density=density, seed=seed)
        model.add_weighted_adapter(NAMES, weights, "theirs", combination_type, density=density)
        for who, all_of in found.items():
            all_of.append(kept(model, who))
            model.delete_adapter(who)
    shares = {who: [share for _, share in all_of] for who, all_of in found.items()}
    # An entry is zero where all three dropped it; 256 entries in 60 draws.
    expected = 1 - (1 - density) ** 3
    for values in shares.values():
        assert sum(values) / draws == pytest.approx(expected, abs=5 * (expected * (1 - expected) / 256 / draws) ** 0.5)
    means = {
        who: [torch.stack(one) for one in zip(*(factors for factors, _ in all_of), strict=True)]
        for who, all_of in found.items()
    }
    for ours, theirs in zip(means["ours"], means["theirs"], strict=True):
        error = ((ours.var(0) + theirs.var(0)) / draws).sqrt()
        assert float(((ours.mean(0) - theirs.mean(0)).abs() / error).max()) < 5
    if whole is not None:
        model.add_weighted_adapter(NAMES, weights, "whole", whole)
        for ours, exact in zip(means["ours"], kept(model, "whole")[0], strict=True):
            assert float(((ours.mean(0) - exact).abs() / (ours.std(0) / draws**0.5)).max()) < 5


@pytest.mark.parametrize("combination_type", ["dare_linear", "dare_linear_svd"])
def test_what_dare_keeps_is_scaled_up(combination_type):
    model = build()
    merge(model, ["a"], [0.7], "ours", combination_type, 32, density=0.25)
    path = "model.layers.0.self_attn.q_proj"
    if combination_type == "dare_linear":
        layer = model.get_base_model().get_submodule(path)
        root = (0.7 * layer.scaling["a"]) ** 0.5
        pairs = [(root * factors["a"].weight, factors["ours"].weight) for factors in (layer.lora_A, layer.lora_B)]
    else:
        pairs = [(0.7 * update_of(model, path, "a"), update_of(model, path, "ours"))]
    for all_of_them, left in pairs:
        stays = left.abs() > 1e-5 * all_of_them.abs().max()
        assert 0.1 < float(stays.double().mean()) < 0.4
        torch.testing.assert_close(left[stays], 4 * all_of_them[stays], rtol=1e-4, atol=1e-5)


def test_where_peft_is_wrong_ours_is_right():
    """What add_weighted_adapter adds up to with rsLoRA, with biases, and of one adapter alone."""
    path, weights = "model.layers.0.self_attn.v_proj", [0.7, 0.2, 0.5]
    model = build(use_rslora=True)
    exact = sum(weight * update_of(model, path, name) for name, weight in zip(NAMES, weights, strict=True))
    merge(model, NAMES, weights, "ours", "cat")
    model.add_weighted_adapter(NAMES, weights, "theirs", "cat")
    torch.testing.assert_close(update_of(model, path, "ours"), exact, rtol=1e-4, atol=1e-5)
    # The new adapter is rsLoRA of alpha = r.
    rank = model.peft_config["theirs"].r
    torch.testing.assert_close(update_of(model, path, "theirs"), rank**0.5 * exact, rtol=1e-4, atol=1e-5)

    model = build(lora_bias=True)
    merge(model, NAMES, weights, "ours", "cat")
    model.add_weighted_adapter(NAMES, weights, "theirs", "cat")
    layer = model.get_base_model().get_submodule(path)
    shares = [weight * layer.scaling[name] for name, weight in zip(NAMES, weights, strict=True)]
    biases = [share * layer.lora_B[name].bias for name, share in zip(NAMES, shares, strict=True)]
    torch.testing.assert_close(layer.lora_B["ours"].bias, sum(biases))
    assert not layer.lora_B["theirs"].bias.any()

    # One adapter is not trimmed by PEFT, nor truncated.
    model = one_linear()
    model.add_weighted_adapter(["a"], [1.0], "theirs", "magnitude_prune", density=0.25)
    merge(model, ["a"], [1.0], "ours", "magnitude_prune", density=0.25)
    assert kept(model, "theirs")[1] == 1
    assert kept(model, "ours")[1] == 0.25


@pytest.mark.parametrize("left_out", [{"layers_to_transform": [1, 2, 3]}, {"exclude_modules": r".*layers\.0\..*"}])
def test_what_the_first_adapter_leaves_out_is_merged_of_the_others(left_out):
    """By PEFT it is lost: the new adapter has the first one's configuration."""
    path = "model.layers.0.self_attn.v_proj"
    model = build()
    model.add_adapter("first", LoraConfig(r=2, target_modules=["v_proj"], **left_out))
    merge(model, ["first", "a"], [0.7, 0.5], "ours", "cat")
    torch.testing.assert_close(update_of(model, path, "ours"), 0.5 * update_of(model, path, "a"), rtol=1e-4, atol=1e-5)
    model.add_weighted_adapter(["first", "a"], [0.7, 0.5], "theirs", "cat")
    assert "theirs" not in model.get_base_model().get_submodule(path).lora_A


def test_convolutions_are_registered_in_their_shapes():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1))
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["0", "2"], init_lora_weights=False)
    model = get_peft_model(base, config, "a")
    model.add_adapter("b", config)
    x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    half = {"density": 0.5}
    for combination_type, options in (("cat", {}), ("ties", half), ("magnitude_prune_svd", half)):
        model.add_weighted_adapter(["a", "b"], [0.5, 0.4], "theirs", combination_type, **options)
        merge(model, ["a", "b"], [0.5, 0.4], "ours", combination_type, **options)
        with torch.no_grad():
            model.set_adapter("ours")
            found = model(x)
            model.set_adapter("theirs")
            torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)
        for name in ("ours", "theirs"):
            model.delete_adapter(name)


class Ends(nn.Module):
    """Whose adapted module is called as others end: another linear, and what PEFT puts no LoRA around."""

    def __init__(self, other: nn.Module):
        super().__init__()
        self.proj, self.block = nn.Linear(8, 8), nn.ModuleDict({"proj": other})

    def forward(self, x):
        return self.block["proj"](self.proj(x))


@pytest.mark.parametrize("other", [nn.Linear(8, 8), nn.LayerNorm(8)], ids=["linear", "norm"])
def test_modules_that_end_alike_are_left_alone(other, tmp_path):
    base = Ends(other)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules="^proj$"), "a")
    nn.init.normal_(model.get_base_model().proj.lora_B["a"].weight)
    x = torch.randn(3, 8)
    expected = model(x)
    merge(model, ["a"], [1.0], method="task_arithmetic")
    assert not any("merged" in key and "block" in key for key in model.state_dict())
    model.set_adapter("merged")
    torch.testing.assert_close(model(x), expected)
    model.save_pretrained(tmp_path, selected_adapters=["merged"])
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path / "merged")(x), expected)


@pytest.mark.parametrize("other", [nn.Linear(8, 8), nn.LayerNorm(8)])
def test_a_saved_adapter_leaves_modules_that_end_alike_alone(other, tmp_path):
    base = Ends(other)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules="^proj$"), "a")
    nn.init.normal_(model.get_base_model().proj.lora_B["a"].weight)
    x = torch.randn(3, 8)
    result = nsc_merge.merge(base, {"a": model}, method="task_arithmetic", scale=1.0)
    result.save(tmp_path, format="lora")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert not any("block" in key and "lora" in key for key in loaded.state_dict())
    torch.testing.assert_close(loaded(x), model(x))
    again = nsc_merge.load_adapter(tmp_path, "a")
    assert list(again.factors) == ["proj"]


def test_dare_keeps_the_density_that_peft_calls_so():
    model = build()
    merged = merge(model, NAMES, [1.0, 1.0, 1.0], "ours", "dare_ties_svd", 32, density=0.25)
    assert merged.result.options["drop"] == 0.75
    dense = merged.result.factors["model.layers.0.self_attn.q_proj"].delta()
    # Two adapters with a quarter of their entries each.
    assert float((dense != 0).double().mean()) == pytest.approx(1 - 0.75**2, abs=0.05)
    assert max(merged.errors.values()) < 1e-6


def test_svd_keeps_the_largest_rank_unless_told(batch):
    model = build()
    merged = merge(model, NAMES, method="task_arithmetic", output="svd")
    ranks = {layer.r["merged"] for layer in lora_layers(model)}
    assert max(ranks) == 6
    assert 0 < max(merged.errors.values()) < 1
    exact = merge(model, NAMES, adapter_name="wide", method="task_arithmetic", rank=32)
    assert set(exact.errors.values()) == {0.0}
    with torch.no_grad():
        model.set_adapter("wide")
        found = model(**batch).logits
        model.delete_adapter("wide")
        merge(model, NAMES, adapter_name="cat", method="task_arithmetic")
        model.set_adapter("cat")
        torch.testing.assert_close(found, model(**batch).logits, rtol=1e-4, atol=1e-4)


def test_svd_keeps_biases():
    model = build(lora_bias=True)
    merge(model, NAMES, [1.0, 0.5, 2.0], "small", "svd", 2)
    for layer in lora_layers(model):
        weights = dict(zip(NAMES, [1.0, 0.5, 2.0], strict=True))
        present = [name for name in NAMES if name in layer.lora_A]
        expected = sum(weights[name] * layer.scaling[name] * layer.lora_B[name].bias for name in present)
        torch.testing.assert_close(layer.lora_B["small"].bias, expected)


def test_weights_are_where_nsc_starts():
    model = build()
    merged = merge(model, NAMES, [0.1, 0.2, 0.3], data=data(), steps=1, lr=0.0, weight_decay=0.0, progress=False)
    assert merged.result.method == "nsc"
    found = {name: {row[name] for row in merged.coefficients.values()} - {0.0} for name in NAMES}
    assert {name: pytest.approx(weight) for name, weight in zip(NAMES, (0.1, 0.2, 0.3), strict=True)} == {
        name: values.pop() for name, values in found.items()
    }
    for layer in lora_layers(model):
        assert layer.scaling["merged"] == 1.0


def test_results_without_coefficients():
    """A method registered for the test: its update is dense, of full rank."""
    from nsc_merge.adapters import Factor
    from nsc_merge.methods import METHODS
    from nsc_merge.methods.gradient_free import gradient_free
    from nsc_merge.methods.method import NoOptions

    def updates(adapters, paths, options):
        for path in paths:
            present = [adapter.factors[path] for adapter in adapters.values() if path in adapter.factors]
            dense = sum(factor.delta() for factor in present).relu().float()
            yield path, Factor(torch.empty(0, dense.shape[1]), torch.empty(dense.shape[0], 0), 1.0, dense=dense)

    METHODS["positive"] = gradient_free("positive", "", "", NoOptions, updates)
    try:
        model = build()
        with pytest.raises(ValueError, match="output: the update of method 'positive' is of full rank"):
            merge(model, NAMES, method="positive")
        assert list(model.peft_config) == NAMES
        merged = merge(model, NAMES, method="positive", output="svd", rank=4)
    finally:
        del METHODS["positive"]
    assert not merged.coefficients
    for path, error in merged.errors.items():
        dense = sum(update_of(model, path, name) for name in NAMES).relu()
        sigma = torch.linalg.svdvals(dense.double())
        assert error == pytest.approx(float(sigma[4:].norm() / sigma.norm()), rel=1e-4)
        assert float((update_of(model, path, "merged") - dense).norm() / dense.norm()) == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"combination_type": "dare"}, r"combination_type: expected one of \['cat', 'svd', .*\], found 'dare'"),
        ({"combination_type": "ties", "majority_sign_method": "x"}, "majority_sign_method: expected one of"),
        ({"combination_type": "cat", "density": 0.5}, "density: combination_type 'cat' has none; expected it with one"),
        ({"combination_type": "dare_linear", "density": 0}, "density: expected the share of entries to keep, above 0"),
        ({"combination_type": "svd", "majority_sign_method": "total"}, "majority_sign_method: combination_type 'svd'"),
        ({"combination_type": "svd", "svd_clamp": 0.99}, "svd_clamp: expected None: it bounds"),
        ({"combination_type": "svd", "svd_driver": "gesvd"}, "svd_driver: expected None"),
        ({"combination_type": "svd", "svd_full_matrices": "x"}, "svd_full_matrices: expected True or False"),
        ({"combination_type": "magnitude_prune"}, "'magnitude_prune' adds factors .*; 'magnitude_prune_svd' merges up"),
        ({"combination_type": "linear"}, "combination_type: 'linear' adds factors and needs equal ranks .*; 'svd'"),
        ({"combination_type": "cat", "method": "nsc"}, "combination_type: expected it, or method and output"),
        ({"method": "task_arithmetic", "output": "full"}, r"output: expected one of \['cat', 'svd'\], found 'full'"),
        ({"method": "task_arithmetic", "output": "cat", "rank": 2}, "rank: output 'cat' has the sum of the ranks"),
        ({"method": "task_arithmetic", "rank": 0}, "rank: expected a whole number of at least 1, found 0"),
        ({"method": "task_arithmetic", "rank": 2, "svd_rank": 2}, "svd_rank: expected it or rank"),
        ({"method": "task_arithmetic", "weights": [1.0]}, r"weights: expected a list, .* found \[1\.0\]"),
        ({"method": "task_arithmetic", "weights": dict.fromkeys(NAMES, 1.0)}, r"weights: expected .* found \{'a'"),
        ({"method": "task_arithmetic", "weights": "123"}, "weights: expected a list, .* found '123'"),
        ({"method": "zero_shot", "weights": [1.0, 1.0, 1.0]}, "weights: method 'zero_shot' takes none"),
        ({"method": "finetuned"}, "method: 'finetuned' gives every task an update of its own"),
        ({"method": "zero_shot"}, "method: the update of 'zero_shot' is zero"),
    ],
)
def test_merge_refuses_what_it_cannot_do(arguments, message):
    model = build()
    with pytest.raises(ValueError, match=message):
        merge(model, NAMES, **arguments)
    assert list(model.peft_config) == NAMES


def test_the_example_merges_folders_in_place_and_by_another_method(tmp_path, monkeypatch, capsys):
    model = build(**ALIKE)
    model.save_pretrained(tmp_path / "adapters", selected_adapters=["a", "b"])
    model.unload().save_pretrained(tmp_path / "base")
    folders = [f"{name}={tmp_path / 'adapters' / name}" for name in ("a", "b")]
    options = ["--type", "ties", "--density", "0.5", "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["peft_adapters.py", str(tmp_path / "base"), *folders, *options])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert f"{tmp_path / 'out' / 'both'}: 8 modules, relative error 0" in capsys.readouterr().out
    merged = nsc_merge.load_adapter(tmp_path / "out" / "both", "both")
    model = build(**ALIKE)
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "theirs", "ties", density=0.5)
    for path, factor in merged.factors.items():
        torch.testing.assert_close(factor.delta().float(), update_of(model, path, "theirs"), rtol=1e-4, atol=1e-5)
    assert len(nsc_merge.load_adapter(tmp_path / "out" / "knots", "knots").factors) == len(merged.factors)
