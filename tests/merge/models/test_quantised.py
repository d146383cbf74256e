"""Bases whose linears are no nn.Linear: measured through them, a merge is that of the plain model of their numbers."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from loop_cases import adapters_for, image_batches, llama, llava, text_batches, trajectory, values
from packed_linear import PackedLinear, packed, unpacked
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration
from zoo import write_adapter

import nsc_merge
from nsc_merge.models.bases.architecture import quantised_as
from nsc_merge.models.bases.loading import load_model
from nsc_merge.models.bases.placement import KINDS, Placement, loading_settings
from nsc_merge.models.bases.quantised import activations_of, dequantised
from nsc_merge.models.fitting import fit

NAMES = ("q_proj", "v_proj", "up_proj")


def pair():
    return packed(llama()), unpacked(packed(llama()))


@pytest.mark.parametrize("settings", [{}, {"checkpointing": True, "batch_tasks": None}])
def test_nsc_is_that_on_the_numbers(settings):
    quantised, plain = pair()
    before = quantised.state_dict()
    adapters = adapters_for(llama(), NAMES)
    found, wanted = (trajectory(model, adapters, text_batches(), **settings) for model in (quantised, plain))
    torch.testing.assert_close(values(found), values(wanted), rtol=0, atol=1e-5)
    for mine, other in zip(found.history, wanted.history, strict=True):
        assert mine["objective"] == pytest.approx(other["objective"], abs=1e-6)
    assert (values(found) - 0.4).abs().max() > 1e-3
    after = quantised.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert isinstance(quantised.model.layers[0].self_attn.q_proj, PackedLinear)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("regmean", {"batches": 1}),
        ("fisher", {"batches": 1}),
        ("match", {"steps": 2}),
        ("distill", {"steps": 2}),
        ("adamerging", {"steps": 2}),
    ],
)
def test_other_methods_of_data_are_those_on_the_numbers(method, settings):
    adapters = adapters_for(llama())
    found, wanted = (nsc_merge.merge(m, adapters, text_batches(1), method, **settings) for m in pair())
    for path in wanted.paths:
        torch.testing.assert_close(found.delta(path), wanted.delta(path), rtol=1e-4, atol=1e-6)


def test_a_llava_with_a_quantised_tower_and_decoder():
    quantised, plain = packed(llava()), unpacked(packed(llava()))
    adapters = adapters_for(llava())
    found, wanted = (trajectory(m, adapters, image_batches(), recipe="vlm", steps=2) for m in (quantised, plain))
    torch.testing.assert_close(values(found), values(wanted), rtol=0, atol=1e-5)


def test_activations_are_of_the_dtype_around_a_linear():
    model = packed(llava().bfloat16())
    model.model.vision_tower.half()
    path = "model.language_model.layers.1.mlp.up_proj"
    linear = model.get_submodule(path)
    assert linear.scales.dtype is torch.float32
    assert activations_of(model, path, linear) == (torch.bfloat16, torch.device("cpu"))
    places = (path for path, module in model.named_modules() if isinstance(module, PackedLinear))
    tower = next(path for path in places if "vision" in path)
    assert activations_of(model, tower, model.get_submodule(tower))[0] is torch.float16
    lone = nn.Sequential(PackedLinear(nn.Linear(8, 8, bias=False)))
    with pytest.raises(ValueError, match=r"^0: expected a float parameter in the model"):
        activations_of(lone, "0", lone[0])


def test_a_linear_that_decompresses_itself_is_quantised_before_and_after(tmp_path):
    """As compressed-tensors has it: an nn.Linear of codes, then of numbers, with a forward put on it."""
    model, plain = llama(), llama()
    path = "model.layers.1.self_attn.v_proj"
    linear, inner = model.get_submodule(path), PackedLinear(llama().get_submodule(path))
    plain.get_submodule(path).weight.data.copy_(inner.numbers())

    def forward(z):
        linear.weight = nn.Parameter(inner.numbers(), requires_grad=False)
        return inner(z)

    del linear.weight
    linear.forward, linear.quantization_status = forward, SimpleNamespace(value="compressed")
    adapters = adapters_for(llama())
    with pytest.raises(ValueError, match=rf"{path}: .*found codes of compressed-tensors; .*=True.* run the model"):
        trajectory(model, adapters, text_batches(1), steps=1)
    with pytest.raises(ValueError, match=rf"{path}: .*found codes of compressed-tensors; .*=True.* run the model"):
        nsc_merge.merge(model, adapters, method="ties").save(tmp_path / "out", "model", dequantize=True)
    assert not (tmp_path / "out").exists()
    linear.quantization_status = SimpleNamespace(value="decompressed")
    wanted = trajectory(plain, adapters, text_batches(1), steps=2)
    for _ in range(2):
        found = trajectory(model, adapters, text_batches(1), steps=2)
        torch.testing.assert_close(values(found), values(wanted), rtol=0, atol=1e-5)
        with pytest.raises(ValueError, match=rf"{path}\.weight: .*found what compressed-tensors keeps"):
            found.apply(model)
    found.save(tmp_path, "model", dequantize=True)
    saved = load_file(tmp_path / "model.safetensors")
    torch.testing.assert_close(saved[f"{path}.weight"], wanted.merged(plain, [path])[f"{path}.weight"])


def test_lost_gradients_are_refused_where_they_are_needed():
    adapters = adapters_for(llama(), ["q_proj"])
    inference = packed(llama(), gradients=False)
    plain = unpacked(packed(llama()))
    for method, settings in (("nsc", {"steps": 1}), ("fisher", {}), ("distill", {"steps": 1})):
        with pytest.raises(ValueError, match=r"0\.self_attn\.q_proj: expected a module whose output has a gradient"):
            nsc_merge.merge(inference, adapters, text_batches(1), method, **settings)
    assert isinstance(inference.model.layers[0].self_attn.q_proj, PackedLinear)
    found, wanted = (nsc_merge.merge(m, adapters, text_batches(1), "regmean", batches=1) for m in (inference, plain))
    torch.testing.assert_close(found.delta(found.paths[-1]), wanted.delta(found.paths[-1]), rtol=1e-4, atol=1e-6)


def test_what_only_has_the_sizes_of_a_linear_is_none(tmp_path):
    """timm's MLPs of convolutions, for example, which run on no rows."""

    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features = self.out_features = 6
            self.conv = nn.Conv2d(6, 6, 1)

        def forward(self, x):
            return self.conv(x).relu_()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.mlp, self.head = nn.Linear(6, 6), Mlp(), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.mlp(self.first(x)[..., None, None]).flatten(1))

    model = Model()
    folders = {}
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        lora = LoraConfig(r=2, target_modules=["first", "mlp.conv"], init_lora_weights=False)
        get_peft_model(copy.deepcopy(model), lora).save_pretrained(folders.setdefault(name, tmp_path / name))
    data = {name: [{"x": torch.randn(4, 6)}] for name in folders}
    outputs = dict.fromkeys(folders, lambda model, batch: model(**batch))
    result = nsc_merge.merge(model, folders, data, method="distill", outputs=outputs, steps=2, progress=False)
    assert set(result.paths) == {"first", "mlp.conv"}


def test_a_wrong_gradient_is_refused():
    class Doubled(PackedLinear):
        def forward(self, z):
            return 2 * super().forward(z) - super().forward(z).detach()

    model = packed(llama())
    linear = llama().model.layers[1].mlp.down_proj
    # Not adapted, but on the way.
    model.model.layers[1].mlp.down_proj = Doubled(linear)
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.down_proj: .*none or a wrong one"):
        trajectory(model, adapters_for(llama()), text_batches(1), steps=1)


def test_parts_of_tensor_parallel_linears_are_refused():
    class ColumnParallel(PackedLinear):
        output_size_per_partition = 16

    model = packed(llama())
    path = "model.layers.2.self_attn.q_proj"
    model.set_submodule(path, ColumnParallel(llama().get_submodule(path)))
    with pytest.raises(TypeError, match=rf"{path}.*ColumnParallel, one process's part of a tensor-parallel linear"):
        trajectory(model, adapters_for(llama()), text_batches(1), steps=1)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_is_saved_without_its_quantisation_when_asked(tied, tmp_path):
    torch.manual_seed(0)
    settings = {**llama().config.to_dict(), "tie_word_embeddings": tied, "attention_bias": True}
    model, plain = (LlamaForCausalLM(LlamaConfig(**settings)).eval() for _ in range(2))
    plain.load_state_dict(model.state_dict())
    packed(model)
    unpacked(packed(plain))
    # As transformers has it.
    model.is_quantized, model.config.quantization_config = True, {"quant_method": "gptq", "bits": 4}
    adapters = adapters_for(llama(), NAMES)
    found, wanted = (nsc_merge.merge(m, adapters, method="task_arithmetic", scale=0.5) for m in (model, plain))
    with pytest.raises(ValueError, match=r"use format 'lora', or dequantize=True"):
        found.save(tmp_path / "no", "model")
    with pytest.raises(ValueError, match=r"q_proj\.weight: .*found a PackedLinear; use format 'lora'.*dequantize=True"):
        found.apply(model)
    with pytest.raises(ValueError, match=r"dequantize: only format 'model'"):
        found.save(tmp_path / "no", "lora", dequantize=True)
    assert not (tmp_path / "no").exists()
    found.save(tmp_path / "found", ["model", "lora"], dequantize=True, max_shard_size="20KB")
    wanted.save(tmp_path / "wanted", "model", max_shard_size="20KB")
    mine, other = (LlamaForCausalLM.from_pretrained(tmp_path / name) for name in ("found/model", "wanted"))
    assert mine.config.to_dict() == other.config.to_dict() | {"_name_or_path": mine.config._name_or_path}
    state, expected = mine.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())
    names = [{path.name for path in (tmp_path / name).glob("model-*")} for name in ("found/model", "wanted")]
    assert names[0] == names[1]
    assert len(names[0]) > 1
    assert (tmp_path / "found/lora/adapter_model.safetensors").is_file()
    assert isinstance(model.model.layers[0].self_attn.q_proj, PackedLinear)


def test_a_saved_llava_has_the_names_of_its_files(tmp_path):
    model, plain = packed(llava().bfloat16()), unpacked(packed(llava().bfloat16())).bfloat16()
    # Where transformers looks for what it does not find at the top.
    model.config.text_config.quantization_config = {"quant_method": "packed"}
    adapters = adapters_for(llava())
    for one, name in ((model, "found"), (plain, "wanted")):
        result = nsc_merge.merge(one, adapters, method="task_arithmetic", scale=0.5)
        result.save(tmp_path / name, "model", dequantize=True)
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("found", "wanted"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())
    saved = LlavaForConditionalGeneration.from_pretrained(tmp_path / "found")
    assert saved.dtype is torch.bfloat16
    assert (quantised_as(saved.config), quantised_as(model.config)) == (None, "packed")


def test_numbers_of_a_quantised_linear_are_those_it_computes_with(tmp_path):
    quantised, plain = pair()
    path = "model.layers.1.mlp.up_proj"
    linear = quantised.get_submodule(path)
    linear.register_buffer("bias", torch.ones(48))
    assert torch.equal(dequantised(quantised, path), linear.numbers())
    assert torch.equal(linear.bias, torch.ones(48))
    # As bitsandbytes has codes there.
    linear.bias, linear.weight = None, nn.Parameter(linear.qweight, requires_grad=False)
    trained = {f"{path}.weight": linear.numbers() + 0.25}
    adapter = nsc_merge.Adapter("a", adapters_for(llama())["a"].factors, trained=trained)
    torch.testing.assert_close(fit({"a": adapter}, quantised)["a"].factors[path].dense, torch.full((48, 32), 0.25))
    folder = write_adapter(llama(), tmp_path / "dora", 1, r=4, target_modules=["q_proj"], use_dora=True)
    for dora in ("exact", "convert"):
        settings = {"method": "task_arithmetic", "scale": 1.0, "dora": dora}
        found, wanted = (nsc_merge.merge(model, {"a": folder}, **settings) for model in (quantised, plain))
        for place in wanted.paths:
            torch.testing.assert_close(found.delta(place), wanted.delta(place), rtol=1e-4, atol=1e-6)
    saved = nsc_merge.Adapter("a", adapter.factors, base_weights={f"{path}.weight": linear.numbers()})
    with pytest.raises(ValueError, match=rf"{path}\.weight of the base was saved.*quantised in the model"):
        fit({"a": saved}, quantised)


def test_what_cannot_be_quantised_is_refused_before_it_is_loaded(monkeypatch, tmp_path):
    llama().save_pretrained(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for kind, entry in KINDS.items():
        with pytest.raises(ValueError, match=rf"quantization: {kind} needs {entry.library}, .*: pip install"):
            load_model(str(tmp_path), local=True, placement=Placement(device="cpu", quantization=kind))
    with pytest.raises(ValueError, match=r"quantization: expected one of \['bitsandbytes-8bit', .*found 'gguf'"):
        load_model(str(tmp_path), local=True, placement=Placement(device="cpu", quantization="gguf"))
    config = LlamaConfig(quantization_config={"quant_method": "awq"})
    with pytest.raises(ValueError, match=r"files are quantised \(awq\), found 'fp8'"):
        loading_settings("fp8", config, "auto", torch.device("cpu"))
    assert loading_settings(None, config, "auto", torch.device("cpu")) == {"dtype": "auto"}
    assert loading_settings(None, LlamaConfig(), "auto", torch.device("cpu")) is None
