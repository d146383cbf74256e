"""Adapters in memory are what PEFT's layers run: against its own forward, in float64."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
import transformers as tf
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import Linear
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file
from torch import nn
from zoo import DECODER, build, filled, outputs, text

import nsc_merge
from nsc_merge.integrations.peft import merge as merge_loaded

TARGETS = ["q_proj", "v_proj"]


def base():
    return build("llama").double()


def wrapped(**config):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **config}
    return filled(get_peft_model(base(), LoraConfig(**settings), autocast_adapter_dtype=False))


def layers(model):
    return [module for module in model.modules() if isinstance(module, Linear)]


def agrees(model, name="default"):
    """Merging the one adapter with a coefficient of 1 gives what the model computes with it."""
    wanted = outputs(model, text(3))
    clean = base()
    assert (wanted - outputs(clean, text(3))).abs().max() > 1e-3
    adapter = nsc_merge.load_adapter(model, name)
    result = nsc_merge.merge(clean, {"a": adapter}, method="task_arithmetic", scale=1.0)
    torch.testing.assert_close(outputs(result.apply(clean), text(3)), wanted, rtol=1e-10, atol=1e-10)
    return adapter


def every(method, *arguments):
    def change(model):
        for layer in layers(model):
            getattr(layer, method)(*arguments)

    return change


def scale_and_reset(model):
    every("scale_layer", 3.0)(model)
    every("unscale_layer")(model)


def tensor_scalings(model):
    """A scaling per layer, learnt, as the fused forward takes it."""
    for number, layer in enumerate(layers(model)):
        layer.scaling["default"] = torch.tensor(0.5 + number, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    "change",
    [
        every("set_scale", "default", 4.0),
        every("scale_layer", 0.25),
        every("unscale_layer", 5.0),
        scale_and_reset,
        tensor_scalings,
        lambda model: model.merge_adapter() or model.unmerge_adapter(),
    ],
    ids=["set_scale", "scale_layer", "unscale_layer", "reset", "tensors", "merged and unmerged"],
)
@pytest.mark.parametrize(
    "config", [{}, {"use_rslora": True, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {r"layers\.1\..*": 2}}]
)
def test_scaling_is_what_the_layers_run(change, config):
    model = wrapped(**config)
    change(model)
    agrees(model)


@pytest.mark.parametrize("prepared", [False, True])
def test_a_swapped_adapter_has_the_other_scaling_and_rank(tmp_path, prepared):
    rank, alpha = (6, 48) if prepared else (4, 32)
    other = filled(get_peft_model(base(), LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS)), 2)
    other.save_pretrained(tmp_path)
    model = wrapped()
    if prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    hotswap_adapter(model, str(tmp_path), "default")
    adapter = agrees(model)
    assert {factor.scaling for factor in adapter.factors.values()} == {8.0}
    assert {factor.rank for factor in adapter.factors.values()} == {8 if prepared else 4}
    saved = nsc_merge.load_adapter(tmp_path, "a")
    for path, factor in adapter.factors.items():
        torch.testing.assert_close(factor.delta(), saved.factors[path].delta(), rtol=1e-6, atol=1e-9)
    # Registered beside it, the merge is what the layers run, too.
    merged = merge_loaded(model, ["default"], method="task_arithmetic", scale=1.0)
    wanted = outputs(model, text(3))
    model.set_adapter(merged.adapter_name)
    torch.testing.assert_close(outputs(model, text(3)), wanted, rtol=1e-5, atol=1e-5)


def test_what_was_read_does_not_change_with_the_model():
    model = wrapped()
    adapter = nsc_merge.load_adapter(model, "a")
    before = {path: factor.delta() for path, factor in adapter.factors.items()}
    with torch.no_grad():
        for layer in layers(model):
            layer.lora_B["default"].weight.zero_()
    assert all(torch.equal(factor.delta(), before[path]) for path, factor in adapter.factors.items())


def test_biases_disabled_and_merged_adapters_are_read():
    model = filled(get_peft_model(build("qwen2"), LoraConfig(r=4, target_modules=TARGETS, lora_bias=True)))
    wanted = outputs(model, text(3))
    model.merge_adapter()
    with model.disable_adapter():
        adapter = nsc_merge.load_adapter(model, "a")
    clean = build("qwen2").double()
    result = nsc_merge.merge(clean, {"a": adapter}, method="task_arithmetic", scale=1.0)
    torch.testing.assert_close(outputs(result.apply(clean), text(3)), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("put", ["inject_adapter_in_model", "add_adapter"])
def test_adapters_without_peft_s_wrapper_are_read(put):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
    model = base()
    if put == "add_adapter":
        model.add_adapter(config, "one")
    else:
        model = inject_adapter_in_model(config, model, "one")
    adapter = agrees(filled(model), "one")
    assert set(adapter.factors) == {f"model.layers.{block}.self_attn.{name}" for block in range(3) for name in TARGETS}
    every("set_scale", "one", 3.0)(model)
    agrees(model, "one")


def test_a_compiled_peft_model_is_read():
    model = wrapped()
    compiled = nsc_merge.load_adapter(torch.compile(model), "a")
    assert set(compiled.factors) == set(nsc_merge.load_adapter(model, "a").factors)


def test_merging_beside_an_adapter_with_a_module_of_its_own_uses_the_base_s():
    """An active adapter's own projection is no part of the base on which others are merged."""
    settings = {"data": {"default": [text(5)], "b": [text(6)]}, "steps": 3, "lr": 1e-2, "progress": False}
    found = []
    for beside in (False, True):
        model = wrapped()
        model.add_adapter("b", LoraConfig(r=3, target_modules=TARGETS), autocast_adapter_dtype=False)
        filled(model, 4)
        if beside:
            model.add_adapter("own", LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=["up_proj"]))
            model.set_adapter("own")
            wrapper = model.get_base_model().model.layers[0].mlp.up_proj
            wrapper.modules_to_save["own"].weight.data.mul_(3)
        found.append(merge_loaded(model, ["default", "b"], **settings).coefficients)
    assert found[0] == found[1]
    assert model.get_base_model().model.layers[0].mlp.up_proj is wrapper


def test_layers_that_run_something_else_are_refused():
    embedding = get_peft_model(base(), LoraConfig(r=4, target_modules=["embed_tokens"], use_dora=True))
    with pytest.raises(ValueError, match=r"embed_tokens: expected LoRA on .*, found peft.*Embedding"):
        nsc_merge.load_adapter(embedding, "a", dora="convert")
    model = wrapped()
    layers(model)[0].lora_A["default"].bias = torch.nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match="q_proj: expected lora_A without a bias, as PEFT makes it, found one"):
        nsc_merge.load_adapter(model, "a")
    model = wrapped()
    layers(model)[0].scaling["default"] = torch.ones(2)
    with pytest.raises(ValueError, match=r"q_proj: expected a scaling of one number, found one of shape \[2\]"):
        nsc_merge.load_adapter(model, "a")
    layers(model)[0].scaling["default"] = float("nan")
    with pytest.raises(ValueError, match="q_proj: expected a finite scaling, found nan"):
        nsc_merge.load_adapter(model, "a")
    with pytest.raises(ValueError, match="is on the meta device"):
        nsc_merge.load_adapter(wrapped().to("meta"), "a")
    with pytest.raises(TypeError, match="found DataParallel"):
        nsc_merge.load_adapter(nn.DataParallel(wrapped()), "a")


def test_dora_in_memory_is_converted_as_from_its_folder(tmp_path):
    model = wrapped(use_dora=True)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use_dora=True is refused"):
        nsc_merge.load_adapter(model, "a", dora="refuse")
    held, saved = (nsc_merge.load_adapter(source, "a", dora="convert") for source in (model, tmp_path))
    for path, factor in saved.factors.items():
        assert torch.equal(factor.magnitude, held.factors[path].magnitude)
        assert torch.equal(factor.delta(), held.factors[path].delta())
    # PEFT keeps what a layer runs apart from the configuration.
    model.peft_config["default"].use_dora = False
    with pytest.raises(ValueError, match="q_proj runs DoRA"):
        nsc_merge.load_adapter(model, "a", dora="refuse")


def test_adapters_without_values_are_refused(folders):
    adapter = nsc_merge.load_adapter(folders["plain"], "a")
    path, factor = next(iter(adapter.factors.items()))
    for wrong, message in ((factor.A.to("meta"), "A is on the meta device"), (factor.A / 0, "A .*not finite")):
        broken = replace(adapter, factors={path: replace(factor, A=wrong)})
        with pytest.raises(ValueError, match=rf"adapters\['a'\]: {path}.{message}"):
            nsc_merge.load_adapter(broken, "a")


def test_heads_trained_as_one_with_the_embeddings_are_read_under_both_names(tmp_path):
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER, tie_word_embeddings=True))
    settings = {"r": 4, "target_modules": ["q_proj"], "ensure_weight_tying": True}
    held = get_peft_model(model, LoraConfig(**settings, modules_to_save=["lm_head"]))
    held.save_pretrained(tmp_path, save_embedding_layers=False)
    for source in (held, tmp_path):
        adapter = nsc_merge.load_adapter(source, "a")
        assert sorted(adapter.trained) == ["lm_head.weight", "model.embed_tokens.weight"]
        assert adapter.base_weights == {}


def test_a_state_dict_with_copies_of_whole_modules_is_refused(tmp_path):
    torch.manual_seed(0)
    held = get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    weights = {key: value for key, value in held.state_dict().items() if "lora_" in key or "lm_head" in key}
    with pytest.raises(ValueError, match=r"2 of \d+ tensors would be ignored.*lm_head.modules_to_save.default.weight"):
        nsc_merge.load_adapter({"config": held.peft_config["default"].to_dict(), "weights": weights}, "a")


def test_lora_on_a_head_is_the_same_from_folder_and_memory(tmp_path):
    """PEFT saves the head's base weight along."""
    model = filled(get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj", "lm_head"])))
    model.save_pretrained(tmp_path / "a")
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / "a" / "adapter_model.safetensors")
    wanted = outputs(model, text(3))
    for source in (tmp_path / "a", model):
        clean = base()
        result = nsc_merge.merge(clean, {"a": source}, method="task_arithmetic", scale=1.0)
        torch.testing.assert_close(outputs(result.apply(clean), text(3)), wanted, rtol=1e-10, atol=1e-10)
    # In the adapter's dtype or the model's, and wherever its weights are, the base is the same.
    assert nsc_merge.merge(cpu_offload(base()), {"a": tmp_path / "a"}, method="task_arithmetic").paths
    assert nsc_merge.merge(base().float(), {"a": tmp_path / "a"}, method="task_arithmetic").paths
    other = base()
    other.lm_head.weight.data[3, 4] += 0.5
    with pytest.raises(ValueError, match=r"lm_head.weight of the base was saved with the adapter and differs"):
        nsc_merge.merge(other, {"a": tmp_path / "a"}, method="task_arithmetic")


def test_resized_embeddings_are_refused_on_a_base_of_another_size(tmp_path):
    model = base()
    model.resize_token_embeddings(70)
    held = filled(get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS)))
    held.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    with pytest.raises(ValueError, match=r"weight of the base was saved .*resize_token_embeddings"):
        nsc_merge.merge(base(), {"a": tmp_path / "a"}, method="task_arithmetic")
    clean = copy.deepcopy(model)
    result = nsc_merge.merge(held.unload(), {"a": tmp_path / "a"}, method="task_arithmetic", scale=1.0)
    wanted = outputs(PeftModel.from_pretrained(clean, tmp_path / "a").double(), text(3))
    torch.testing.assert_close(outputs(result.apply(result.model), text(3)), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"config": [], "weights": {}}, "config: expected a mapping from names"),
        ({"config": {}, "weights": {1: torch.ones(1)}}, "weights: expected a mapping from names"),
        ({"config": {}, "weights": {"a": 1}}, "a: expected a tensor, found 1"),
        ({"adapter": 3, "revision": "main"}, "expected adapter, revision and subfolder, found {'adapter': 3"),
    ],
)
def test_mappings_of_something_else_are_refused(source, message):
    with pytest.raises(ValueError, match=message):
        nsc_merge.load_adapter(source, "a")


def test_a_mapping_is_copied(folders):
    folder = folders["plain"]
    weights = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    adapter = nsc_merge.load_adapter({"config": config, "weights": weights}, "a")
    before = {path: factor.delta() for path, factor in adapter.factors.items()}
    for value in weights.values():
        value.zero_()
    assert all(torch.equal(factor.delta(), before[path]) for path, factor in adapter.factors.items())
