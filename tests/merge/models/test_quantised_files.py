"""Bases whose files hold codes: read as numbers or with a gradient, merged, and saved in plain numbers."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers as tf
from loop_cases import text_batches, trajectory, values
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import nsc_merge
from nsc_merge import Adapter, Factor
from nsc_merge.models.bases.loading import load_model
from nsc_merge.models.bases.placement import PLAIN, Placement, loading_settings
from nsc_merge.models.bases.quantised import check_gradients, dequantised, is_linear, is_quantised
from nsc_merge.results import merged_model

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# The values of four bits (E2M1), by code.
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1 = torch.cat([E2M1, -E2M1])
MODELS = {
    "fp8": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)),
    # Its files hold experts one by one, which transformers stacks as it reads them.
    "fp8 experts": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, **EXPERTS)),
    "mxfp4": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**SIZES, **EXPERTS, layer_types=["full_attention"] * 2)),
}


def fp8(numbers: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What files hold of linears in blocks of 32 by 32, and what they stand for."""
    held, meant = {}, {}
    for name, value in numbers.items():
        if value.dim() != 2 or "layers" not in name or name.endswith("gate.weight"):
            held[name] = meant[name] = value
            continue
        rows, columns = (size // 32 for size in value.shape)
        blocks = value.float().reshape(rows, 32, columns, 32)
        scale = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        held[name], held[f"{name}_scale_inv"] = codes.reshape(value.shape), scale
        meant[name] = (codes.float() * scale[:, None, :, None]).reshape(value.shape).bfloat16()
    return held, meant


def mxfp4(numbers: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What files hold of gpt-oss's experts ``[E, d_in, d_out]``, transposed and in blocks of 32, and what it means."""
    held, meant = {}, {}
    generator = torch.Generator().manual_seed(0)
    for name, value in numbers.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            held[name] = meant[name] = value
            continue
        count, inputs, outputs = value.shape
        codes = torch.randint(256, (count, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
        exponents = torch.randint(120, 124, codes.shape[:-1], generator=generator, dtype=torch.uint8)
        held[f"{name}_blocks"], held[f"{name}_scales"] = codes, exponents
        # The lower half of a byte comes first.
        pairs = torch.stack([E2M1[(codes & 15).long()], E2M1[(codes >> 4).long()]], -1).flatten(-2)
        scaled = pairs * torch.exp2(exponents.float() - 127)[..., None]
        meant[name] = scaled.flatten(-2).transpose(1, 2).bfloat16()
    return held, meant


def base(kind: str, folder: Path) -> dict[str, Tensor]:
    """A base in files of codes; returns what its files would hold in plain numbers."""
    torch.manual_seed(0)
    MODELS[kind]().bfloat16().save_pretrained(folder)
    held, meant = (mxfp4 if kind == "mxfp4" else fp8)(load_file(folder / "model.safetensors"))
    held = {name: value.contiguous() for name, value in held.items()}
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    own = ["self_attn", "router", "embed_tokens", "lm_head"]
    config["quantization_config"] = (
        {"quant_method": "mxfp4", "modules_to_not_convert": own}
        if kind == "mxfp4"
        else {"quant_method": "fp8", "weight_block_size": [32, 32], "modules_to_not_convert": ["gate", "lm_head"]}
    )
    (folder / "config.json").write_text(json.dumps(config))
    return meant


def adapters() -> dict[str, Adapter]:
    generator = torch.Generator().manual_seed(1)

    def factor() -> Factor:
        return Factor(torch.randn(2, 64, generator=generator), 0.1 * torch.randn(64, 2, generator=generator), 1.0)

    paths = [f"model.layers.{layer}.self_attn.{name}" for layer in range(2) for name in ("q_proj", "v_proj")]
    return {task: Adapter(task, {path: factor() for path in paths}) for task in ("a", "b")}


@pytest.mark.parametrize("quantization", [None, PLAIN])
@pytest.mark.parametrize("kind", MODELS)
def test_a_merge_is_saved_in_plain_numbers_under_their_names(kind, quantization, tmp_path):
    """transformers itself writes gpt-oss's under the names of codes, and reads that as experts of random numbers."""
    meant = base(kind, tmp_path / "base")
    placement = Placement(device="cpu", quantization=quantization)
    model = load_model(str(tmp_path / "base"), local=True, placement=placement)
    result = nsc_merge.merge(model, adapters(), method="task_arithmetic", scale=0.4)
    for path in result.paths:
        name = f"{path}.weight"
        meant[name] = (meant[name].double() + result.delta(path).double()).bfloat16()
    folder = result.save(tmp_path / "merged", "model", dequantize=True)
    written = load_file(folder / "model.safetensors")
    assert written.keys() == meant.keys()
    for name, value in meant.items():
        torch.testing.assert_close(written[name], value, rtol=0, atol=0, msg=name)
    read, told = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(told.values())
    assert not hasattr(read.config, "quantization_config")
    with torch.no_grad():
        for mine, other in zip(result.apply(model).state_dict().values(), read.state_dict().values(), strict=True):
            assert torch.equal(mine, other)


def test_what_would_not_be_read_back_is_not_written(monkeypatch, tmp_path):
    base("mxfp4", tmp_path / "base")
    model = load_model(str(tmp_path / "base"), local=True, placement=Placement(device="cpu"))
    result = nsc_merge.merge(model, adapters(), method="task_arithmetic", scale=0.4)
    monkeypatch.setattr(merged_model, "under_plain_names", lambda model: nullcontext())
    with pytest.raises(ValueError, match=r"does not read 4 tensors as it writes them, .*experts\.down_proj;"):
        result.save(tmp_path / "merged", "model", dequantize=True)
    assert not (tmp_path / "merged").exists()


def test_what_is_asked_of_files_by_how_they_are_quantised(tmp_path):
    place = torch.device("cpu")
    for method, wanted in (
        ("gptq", {"backend": "torch"}),
        ("awq", {"backend": "torch_awq"}),
        ("compressed-tensors", {"dequantize": True}),
        ("fp8", {}),
    ):
        own = {"quant_method": method}
        # As transformers has it, which looks there for what it does not find at the top.
        for config in (tf.LlamaConfig(quantization_config={**own}), tf.LlavaConfig(text_config=tf.LlamaConfig())):
            if isinstance(config, tf.LlavaConfig):
                config.text_config.quantization_config = {**own}
            assert loading_settings(None, config, "auto", place) == {"dtype": "auto"}
            inner = getattr(config, "quantization_config", None) or config.text_config.quantization_config
            assert inner == {**own, **wanted}
    config = tf.LlamaConfig(quantization_config={"quant_method": "gptq"})
    gpu = torch.device("cuda", 0)
    assert loading_settings(None, config, "auto", gpu) == {"dtype": "auto", "device_map": {"": gpu}}
    assert config.quantization_config["backend"] == "auto_trainable"
    for config, found in (
        (tf.LlamaConfig(), "found one in plain numbers"),
        (tf.LlamaConfig(quantization_config={"quant_method": "awq"}), "quantised by awq; leave the key out"),
    ):
        with pytest.raises(ValueError, match=rf"quantization: dequantize is for .*compressed-tensors, fp8.*{found}"):
            loading_settings(PLAIN, config, "auto", place)


def test_experts_in_codes_are_refused_where_gradients_are_needed():
    from transformers.integrations.finegrained_fp8 import FP8Experts
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

    model = MODELS["mxfp4"]()
    model.model.layers[1].mlp.experts = Mxfp4GptOssExperts(model.config)
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.experts: .*Mxfp4GptOssExperts .*mxfp4.*dequantize"):
        check_gradients(model)
    data = {task: text_batches()[task] for task in ("a", "b")}
    with pytest.raises(ValueError, match=r"experts: expected a module whose output has a gradient"):
        nsc_merge.merge(model, adapters(), data, method="nsc", steps=1)
    with pytest.raises(ValueError, match=r"^0: .*found a FP8Experts"):
        check_gradients(nn.Sequential(FP8Experts(tf.MixtralConfig(**SIZES, **EXPERTS), block_size=(32, 32))))


def test_a_linear_that_gives_its_scale_beside_its_numbers_is_passed_over():
    """I-BERT's, which only has the sizes of one."""
    model = tf.IBertForMaskedLM(tf.IBertConfig(**SIZES, pad_token_id=0)).eval()
    layer = model.ibert.encoder.layer[0].attention.self.query
    assert is_quantised(layer)
    assert is_linear(layer)
    assert isinstance(layer(torch.randn(1, layer.in_features)), tuple)
    check_gradients(model)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_four_bits_of_gptq_and_awq_are_merged_as_the_numbers_they_stand_for(method, tmp_path):
    """In half precision, for which their library would take kernels without a gradient."""
    pytest.importorskip("gptqmodel")
    torch.manual_seed(0)
    plain = MODELS["fp8"]().bfloat16()
    plain.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    generator = torch.Generator().manual_seed(0)

    def codes(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31 - 1, shape, generator=generator, dtype=torch.int32)

    for path in [name.removesuffix(".weight") for name in held if "layers" in name and "proj" in name]:
        del held[f"{path}.weight"]
        held[f"{path}.qweight"] = codes(8, 64) if method == "gptq" else codes(64, 8)
        held[f"{path}.qzeros"] = codes(2, 8)
        held[f"{path}.scales"] = torch.full((2, 64), 0.01, dtype=torch.float16)
        if method == "gptq":
            held[f"{path}.g_idx"] = (torch.arange(64) // 32).int()
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    settings = {"quant_method": method, "bits": 4, "group_size": 32, "desc_act": False}
    settings |= {"sym": False} if method == "gptq" else {"zero_point": True, "version": "gemm"}
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_model(str(tmp_path), local=True, placement=Placement(device="cpu"))
    paths = [path for path, module in model.named_modules() if is_linear(module) and is_quantised(module)]
    assert len(paths) == 14
    data = {task: text_batches()[task] for task in ("a", "b")}
    with torch.no_grad():
        # Running it must not take the gradient away.
        model(**data["a"][0])
        for path in paths:
            plain.get_submodule(path).weight.copy_(dequantised(model, path))
    mine, other = (trajectory(one, adapters(), data, steps=3) for one in (model, plain))
    assert (values(mine) - 0.4).abs().max() > 1e-2
    torch.testing.assert_close(values(mine), values(other), rtol=0, atol=2e-2)
