"""AdaLoRA is LoRA whose ranks training gave out: read from folders, mappings and memory with PEFT's own updates."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from architectures import PAGE
from peft import AdaLoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from zoo import DECODER, outputs, text

import nsc_merge
from nsc_merge.adapters import load_adapter
from nsc_merge.adapters.formats.adalora import settings_as_lora

INITIAL = 4


def adalora(model: nn.Module, kept: dict[str, list[bool]] | None = None, **settings: Any) -> Any:
    """A model with AdaLoRA of which training kept some directions: of the others the singular values are zero."""
    torch.manual_seed(1)
    config = AdaLoraConfig(init_r=INITIAL, target_r=2, lora_alpha=6, total_step=9, **settings)
    made = get_peft_model(model, config)
    layers = {path: layer for path, layer in made.base_model.model.named_modules() if hasattr(layer, "lora_E")}
    for path, layer in layers.items():
        rank = torch.tensor((kept or {}).get(path, INITIAL * [True]))[:, None]
        layer.lora_E["default"].data.copy_(torch.randn(INITIAL, 1) * rank)
    if kept:
        made.peft_config["default"].rank_pattern = {
            f"{path}.lora_E.default": kept.get(path, INITIAL * [True]) for path in layers
        }
    return made


def updates(made: Any) -> dict[str, Tensor]:
    layers = made.base_model.model.named_modules()
    return {path: layer.get_delta_weight("default").detach() for path, layer in layers if hasattr(layer, "lora_E")}


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.gpt2, self.conv = nn.Linear(6, 5), Conv1D(7, 6), nn.Conv2d(3, 5, 3)


KEPT = {"linear": [True, False, True, False], "gpt2": [False, True, False, False], "conv": [True, True, False, True]}


def deltas(adapter: nsc_merge.Adapter) -> dict[str, Tensor]:
    """As they lie in the weights."""
    found = {path: factor.delta() for path, factor in adapter.factors.items()}
    if "gpt2" in found:
        found["gpt2"] = found["gpt2"].t()
    return {path: delta.reshape(5, 3, 3, 3) if path == "conv" else delta for path, delta in found.items()}


@pytest.mark.parametrize("kept", [None, KEPT], ids=["whole", "allocated"])
def test_every_source_has_the_updates_of_pefts_layers(kept: Any, tmp_path: Path) -> None:
    made = adalora(Mixed(), kept, target_modules=["linear", "gpt2", "conv"])
    wanted = updates(made)
    state = {key: value for key, value in made.state_dict().items() if ".lora_" in key}
    if kept:
        # As PEFT cuts them where it saves; a state dict has all, and a configuration with all ranks goes with it.
        made.save_pretrained(tmp_path)
    else:
        save_file(get_peft_model_state_dict(made), tmp_path / "adapter_model.safetensors")
        made.peft_config["default"].save_pretrained(tmp_path)
    settings = {**made.peft_config["default"].to_dict(), "rank_pattern": None}
    sources = {"folder": tmp_path, "memory": made, "state": {"config": settings, "weights": state}}
    for where, source in sources.items():
        read = load_adapter(source, "default")
        assert read.notes == (() if where != "state" else read.notes), where
        found = deltas(read)
        assert set(found) == set(wanted), where
        for path, delta in wanted.items():
            torch.testing.assert_close(found[path].float(), delta, rtol=1e-5, atol=1e-6, msg=f"{where}: {path}")
        ranks = {path: sum((kept or {}).get(path, INITIAL * [True])) for path in wanted}
        assert where != "folder" or {path: len(factor.A) for path, factor in read.factors.items()} == ranks


def test_a_merge_computes_what_peft_does_in_both_formats(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER)).double().eval()
    # Of one module nothing is left.
    kept = {
        "model.layers.0.self_attn.q_proj": INITIAL * [False],
        "model.layers.1.self_attn.v_proj": [True, True, False, True],
    }
    made = adalora(copy.deepcopy(model), kept, target_modules=["q_proj", "v_proj"], modules_to_save=["norm"])
    made.base_model.model.model.norm.modules_to_save["default"].weight.data += 0.1
    made.save_pretrained(tmp_path / "a")
    expected = outputs(PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a").double().eval(), text(1))
    assert (expected - outputs(model, text(1))).abs().max() > 1e-3
    result = nsc_merge.merge(model, {"a": tmp_path / "a"}, method="task_arithmetic", scale=1.0)
    assert "model.layers.0.self_attn.q_proj" not in result.paths
    merged = result.apply(copy.deepcopy(result.model))
    torch.testing.assert_close(outputs(merged, text(1)), expected, rtol=1e-6, atol=1e-7)
    again = PeftModel.from_pretrained(copy.deepcopy(model), result.save(tmp_path / "lora", "lora")).double()
    torch.testing.assert_close(outputs(again, text(1)), expected, rtol=1e-5, atol=1e-6)
    assert "| AdaLoRA | merged |" in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_factors_are_multiplied_in_float32_at_least(dtype: torch.dtype) -> None:
    made = adalora(nn.Sequential(nn.Linear(6, 5)).double(), target_modules=["0"])
    # Of which float32 holds none.
    weights = {key: (value.double() / 3).to(dtype) for key, value in get_peft_model_state_dict(made).items()}
    factor = load_adapter({"config": made.peft_config["default"].to_dict(), "weights": weights}, "a").factors["0"]
    computed = torch.promote_types(dtype, torch.float32)
    A, E = (weights[f"base_model.model.0.lora_{part}"].to(computed) for part in "AE")
    assert factor.A.dtype == computed
    assert torch.equal(factor.A, A * E)
    assert factor.scaling == pytest.approx(6 / (INITIAL + 1e-5), rel=1e-15)


@pytest.mark.parametrize("settings", [{}, {"init_r": 1, "lora_alpha": 0.5}])
def test_rank_and_alpha_are_pefts_own_where_none_are_said(settings: dict[str, float]) -> None:
    peft = {"init_r": AdaLoraConfig(total_step=9).init_r, "lora_alpha": AdaLoraConfig(total_step=9).lora_alpha}
    rank, alpha = {**peft, **settings}.values()
    shapes = {"lora_A": (rank, 6), "lora_E": (rank, 1), "lora_B": (5, rank)}
    weights = {f"base_model.model.0.{part}": torch.ones(shape) for part, shape in shapes.items()}
    config = {"peft_type": "ADALORA", "target_modules": ["0"], **settings}
    factor = load_adapter({"config": config, "weights": weights}, "a").factors["0"]
    assert factor.scaling == pytest.approx(alpha / (rank + 1e-5), rel=1e-15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_r": 0}, "init_r: expected a positive whole number, found 0"),
        ({"init_r": True}, "init_r: expected a positive whole number, found True"),
        ({"init_r": 10**400}, "init_r: expected a positive whole number"),
        ({"lora_alpha": 0}, "lora_alpha: expected a positive number, found 0"),
        ({"lora_alpha": True}, "lora_alpha: expected a positive number, found True"),
        ({"lora_alpha": "8"}, "lora_alpha: expected a positive number, found '8'"),
        ({"lora_alpha": float("nan")}, "lora_alpha: expected a positive number, found nan"),
        ({"lora_alpha": 10**400}, "lora_alpha: expected a positive number"),
        ({"init_r": 3}, r"0: expected lora_A \[3, d_in\], lora_E \[3, 1\] .* found \[\[4, 6\], \[4, 1\], \[5, 4\]\]"),
        ({"rank_pattern": {"0.lora_E": [True, False]}}, r"0: expected lora_A \[1, d_in\].*\(init_r, rank_pattern\)"),
        ({"rank_pattern": {"0": 2}}, "rank_pattern: expected lists of true and false, found {'0': 2}"),
        ({"rank_pattern": {"0.lora_E": [1, 0]}}, "rank_pattern: expected lists of true and false"),
        ({"rank_pattern": [1]}, "rank_pattern: expected lists of true and false"),
        ({"bias": "all"}, "bias: expected 'none'"),
        ({"target_modules": ["1"]}, "0 has tensors, but is left out by target_modules"),
    ],
)
def test_settings_that_do_not_go_with_the_tensors_are_refused(change: dict[str, Any], message: str) -> None:
    made = adalora(nn.Sequential(nn.Linear(6, 5)), target_modules=["0"])
    config = {**made.peft_config["default"].to_dict(), **change}
    with pytest.raises(ValueError, match=rf"adapters\['a'\]: {message}"):
        load_adapter({"config": config, "weights": get_peft_model_state_dict(made)}, "a")


def test_settings_of_another_kind_stay_its_own() -> None:
    config = {"peft_type": "LOHA", "target_modules": ["0"], "r": 4}
    assert settings_as_lora(config) == config
    with pytest.raises(ValueError, match="LOHA"):
        load_adapter({"config": config, "weights": {"base_model.model.0.hada_w1_a": torch.ones(6, 4)}}, "a")


@pytest.mark.parametrize("missing", ["lora_A", "lora_B", "lora_E"])
def test_tensors_that_are_missing_are_named(missing: str) -> None:
    made = adalora(nn.Sequential(nn.Linear(6, 5)), target_modules=["0"])
    weights = {key: value for key, value in get_peft_model_state_dict(made).items() if not key.endswith(missing)}
    message = "would be ignored.*0.lora_A, base" if missing == "lora_E" else f"0: expected {missing}|0: expected.*None"
    with pytest.raises(ValueError, match=message):
        load_adapter({"config": made.peft_config["default"].to_dict(), "weights": weights}, "a")


def test_what_lora_heeds_and_adalora_does_not_is_without_effect(tmp_path: Path) -> None:
    made = adalora(nn.Sequential(nn.Linear(6, 5)), target_modules=["0"])
    made.save_pretrained(tmp_path)
    wanted = load_adapter(tmp_path, "a").factors["0"]
    file = tmp_path / "adapter_config.json"
    others = {"r": 99, "alpha_pattern": {"0": 50}, "use_rslora": True, "lora_bias": True}
    file.write_text(json.dumps({**json.loads(file.read_text()), **others}))
    layer = PeftModel.from_pretrained(nn.Sequential(nn.Linear(6, 5)), tmp_path).base_model.model[0]
    torch.testing.assert_close(wanted.delta().float(), layer.get_delta_weight("default").detach())
    found = load_adapter(tmp_path, "a").factors["0"]
    assert (found.scaling, len(load_file(tmp_path / "adapter_model.safetensors"))) == (wanted.scaling, 3)
    assert torch.equal(found.A, wanted.A)
