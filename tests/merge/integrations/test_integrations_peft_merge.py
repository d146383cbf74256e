"""Merging of adapters that are loaded in a PEFT model, against PEFT's own forward and ``add_weighted_adapter``."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft.tuners.lora import Linear

from nsc_merge.integrations.peft import merge
from peft_cases import NAMES, build, inputs, lora_layers


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
    ],
)
def test_pefts_other_ways_give_what_it_gives(combination_type, options):
    model = build(r=4, lora_alpha=6, use_rslora=False, rank_pattern={})
    arguments = (NAMES, [0.7, 0.2, 0.5])
    model.add_weighted_adapter(*arguments, "theirs", combination_type, **options)
    merged = merge(model, *arguments, "ours", combination_type, **options)
    assert not merged.coefficients
    assert merged.errors
    for path in merged.errors:
        torch.testing.assert_close(
            update_of(model, path, "ours"), update_of(model, path, "theirs"), rtol=1e-4, atol=1e-5
        )


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
        ({"combination_type": "cat", "method": "nsc"}, "combination_type: expected it, or method and output"),
        ({"method": "task_arithmetic", "output": "full"}, r"output: expected one of \['cat', 'svd'\], found 'full'"),
        ({"method": "task_arithmetic", "output": "cat", "rank": 2}, "rank: output 'cat' has the sum of the ranks"),
        ({"method": "task_arithmetic", "rank": 0}, "rank: expected a whole number of at least 1, found 0"),
        ({"method": "task_arithmetic", "rank": 2, "svd_rank": 2}, "svd_rank: expected it or rank"),
        ({"method": "task_arithmetic", "weights": [1.0]}, r"weights: expected one for each of .* found \[1\.0\]"),
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
