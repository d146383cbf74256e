"""PEFT swap-ins against PEFT's own forward."""

from __future__ import annotations

import copy
import itertools
import logging

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from transformers import LlamaConfig, LlamaForCausalLM

from nsc_kernels.integrations import peft as integration
from nsc_kernels.integrations.peft import accelerate
from nsc_merge.integrations.peft import merge

NAMES = ["a", "b", "c"]
PATTERN = {"layers.1.self_attn.q_proj": 6}


def configs(**settings) -> dict[str, LoraConfig]:
    common = {"target_modules": ["q_proj", "v_proj"], **settings}
    return {
        "a": LoraConfig(**{"r": 4, "lora_alpha": 8, **common}),
        "b": LoraConfig(**{"r": 3, "lora_alpha": 5, "use_rslora": True, "rank_pattern": PATTERN, **common}),
        "c": LoraConfig(**{"r": 2, "lora_alpha": 2, **common, "target_modules": ["v_proj"]}),
    }


def build(dtype=torch.float32, **settings):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    base = LlamaForCausalLM(config).to(dtype)
    first, *others = configs(**settings).items()
    model = get_peft_model(base, first[1], adapter_name=first[0], autocast_adapter_dtype=False)
    for name, one in others:
        model.add_adapter(name, one, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "lora_" in key:
                value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    model.base_model.set_adapter(NAMES)
    return model.requires_grad_(False).eval()


@pytest.fixture
def batch():
    return {"input_ids": torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(2))}


@pytest.fixture
def fallbacks(caplog):
    integration._say_once.cache_clear()
    caplog.set_level(logging.WARNING, logger="nsc_kernels")
    return caplog


def lora_layers(model):
    return [module for module in model.modules() if isinstance(module, Linear)]


def learnable(model):
    """Tensor-valued scaling in every layer: coefficient times LoRA's own; returns the coefficients."""
    lams = []
    for number, layer in enumerate(lora_layers(model)):
        for k, name in enumerate(layer.lora_A):
            lam = torch.tensor(0.3 + 0.1 * k + 0.01 * number, dtype=layer.weight.dtype, requires_grad=True)
            layer.scaling[name] = lam * layer.scaling[name]
            lams.append(lam)
    return lams


@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_output_and_gradients_equal_pefts_own(batch, fallbacks, dtype, tolerance, lora_bias):
    model = build(dtype, lora_bias=lora_bias)

    def run():
        lams = learnable(model)
        embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        logits = model(inputs_embeds=embedded).logits
        grads = torch.autograd.grad(logits.square().mean(), [embedded, *lams])
        return logits, grads

    original = [dict(layer.scaling) for layer in lora_layers(model)]
    expected = run()
    for layer, scaling in zip(lora_layers(model), original, strict=True):
        layer.scaling = scaling
    with accelerate(model) as handle:
        found = run()
    assert handle.layers == 8
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    largest = max(float(grad.abs().max()) for grad in expected[1])
    for grad, wanted in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(grad, wanted, rtol=20 * tolerance, atol=20 * tolerance * largest)
    assert not fallbacks.records


def test_it_is_fused_and_undone(batch, monkeypatch):
    model = build()
    calls = []
    real = integration.merged_lora
    monkeypatch.setattr(integration, "merged_lora", lambda *args: calls.append(1) or real(*args))
    objects = {name: id(module) for name, module in model.named_modules()}
    with torch.no_grad():
        expected = model(**batch).logits
        handle = accelerate(model)
        fused = model(**batch).logits
        assert len(calls) == len(lora_layers(model)) == handle.layers == 8
        assert accelerate(model).layers == 0
        handle.remove()
        handle.remove()
        assert torch.equal(model(**batch).logits, expected)
    assert len(calls) == 8
    torch.testing.assert_close(fused, expected, rtol=2e-5, atol=2e-5)
    assert {name: id(module) for name, module in model.named_modules()} == objects
    assert not any("forward" in vars(module) for module in model.modules())


def test_bfloat16_base_under_float32_adapters(batch):
    model = build()
    model.base_model.model.to(torch.bfloat16)
    for key, value in model.named_parameters():
        if "lora_" in key:
            value.data = value.data.float()
    with torch.no_grad():
        expected = model(**batch).logits
        with accelerate(model):
            found = model(**batch).logits
    assert found.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2 * float(expected.abs().max()))


def test_changes_to_adapters_are_seen(batch):
    model = build()

    with torch.no_grad(), accelerate(model) as handle:
        before = model(**batch).logits
        layer = lora_layers(model)[0]
        layer.lora_B["a"].weight.mul_(3)
        in_place = model(**batch).logits
        layer.lora_A["a"].weight.data = 2 * layer.lora_A["a"].weight.data
        replaced = model(**batch).logits
        model.base_model.set_adapter(["a", "c"])
        fewer = model(**batch).logits
        with model.disable_adapter():
            none = model(**batch).logits
        handle.remove()
        torch.testing.assert_close(fewer, model(**batch).logits, rtol=2e-5, atol=2e-5)
        model.base_model.set_adapter(NAMES)
        torch.testing.assert_close(replaced, model(**batch).logits, rtol=2e-5, atol=2e-5)
        different = [before, in_place, replaced, fewer, none]
    assert all((one - other).abs().max() > 1e-3 for one, other in itertools.pairwise(different))


def test_what_it_cannot_express_goes_to_peft_and_is_said_once(batch, fallbacks):
    model = build(lora_dropout=0.5)
    with accelerate(model):
        model.train()
        torch.manual_seed(5)
        dropped = model(**batch).logits
        assert [record.message for record in fallbacks.records] == [
            "PEFT's own forward serves some calls: dropout in training mode gives every adapter an input of its own"
        ]
        model.eval()
        model(**batch)
        with torch.no_grad():
            mixed = model(**batch, adapter_names=["a", "b"]).logits
        assert "adapter_names" in fallbacks.records[-1].message
        for layer in lora_layers(model):
            layer.lora_A["a"].weight.requires_grad_(True)
        model(**batch).logits.sum().backward()
        assert lora_layers(model)[0].lora_A["a"].weight.grad is not None
        assert "being trained" in fallbacks.records[-1].message
    assert len(fallbacks.records) == 3
    model.train()
    torch.manual_seed(5)
    torch.testing.assert_close(model(**batch).logits, dropped)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch, adapter_names=["a", "b"]).logits, mixed)


def test_dora_and_models_without_lora(batch, fallbacks):
    model = build(use_dora=True)
    with torch.no_grad():
        expected = model(**batch).logits
        with accelerate(model):
            assert torch.equal(model(**batch).logits, expected)
    assert "DoRA" in fallbacks.text
    with pytest.raises(ValueError, match=r"model: expected peft\.tuners\.lora\.Linear layers, found none"):
        accelerate(torch.nn.Linear(2, 2))


def test_a_copy_of_an_accelerated_model_is_its_own(batch):
    model = build()
    with torch.no_grad(), accelerate(model):
        twin = copy.deepcopy(model)
        before = twin(**batch).logits
        for layer in lora_layers(model):
            layer.lora_B["a"].weight.zero_()
        assert torch.equal(twin(**batch).logits, before)


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
    with pytest.raises(TypeError, match="model: expected a PeftModel, found Linear"):
        merge(torch.nn.Linear(2, 2), ["a"], adapter_name="merged")
    dora = build(use_dora=True)
    with pytest.raises(ValueError, match="DoRA"):
        merge(dora, NAMES, data=data(), adapter_name="merged")
    assert list(dora.peft_config) == NAMES


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
    from nsc_merge.methods.arithmetic import NoOptions
    from nsc_merge.methods.base import gradient_free

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
