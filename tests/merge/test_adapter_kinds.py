"""The second table of docs/architectures.md: what becomes of each kind of adapter that PEFT writes."""

from __future__ import annotations

import copy
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from architectures import PAGE
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from zoo import DECODER, outputs, text, write_adapter

import nsc_merge

LINEARS = {"target_modules": ["q_proj", "v_proj"]}
MERGED: dict[str, dict[str, Any]] = {
    "LoRA, unequal ranks (`rank_pattern`)": {**LINEARS, "rank_pattern": {"q_proj": 5}},
    "rsLoRA": {**LINEARS, "use_rslora": True},
    "VeLoRA": {**LINEARS, "velora_config": {"num_groups": 4}},
    "`lora_bias`": {**LINEARS, "lora_bias": True},
    "`fan_in_fan_out` set on linears": {**LINEARS, "fan_in_fan_out": True},
    "DoRA": {**LINEARS, "use_dora": True},
    "LoRA on embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA on `lm_head`": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings in `modules_to_save`": {**LINEARS, "modules_to_save": ["embed_tokens"]},
    "`lm_head` in `modules_to_save`": {**LINEARS, "modules_to_save": ["lm_head"]},
    "norms in `modules_to_save`": {**LINEARS, "modules_to_save": ["input_layernorm", "norm"]},
    "`trainable_token_indices`": {**LINEARS, "trainable_token_indices": {"embed_tokens": [3, 11]}},
}
TIED = {
    "tied weights: LoRA on `lm_head` alone": {"target_modules": ["q_proj", "lm_head"]},
    "tied weights: embeddings in `modules_to_save`": {**LINEARS, "modules_to_save": ["embed_tokens"]},
    "tied weights: `ensure_weight_tying`": {
        **LINEARS,
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
}
REFUSED = {
    "QALoRA": ({"use_qalora": True}, "QALoRA pools the input.*serve its adapter by itself"),
    "PiSSA, OLoRA, LoftQ and others that change the base": (
        {"init_lora_weights": "pissa"},
        "path_initial_model_for_weight_conversion",
    ),
    "activated LoRA": ({"alora_invocation_tokens": [1, 2]}, "serve its adapter by itself"),
    "biases of the base (`bias=\"all\"`)": ({"bias": "all"}, "bias: expected 'none'.*train with bias='none'"),
}
# Rows whose outcome other tests show: file below tests/merge, and test.
ELSEWHERE = {
    "LoHa, LoKr, VeRA, MiSS, FourierFT and other kinds of PEFT": (
        "adapters/test_peft_config.py",
        "test_another_kind_of_adapter_becomes_lora_as_the_message_says",
    ),
    "LoRA on Conv1D (GPT-2)": ("models/test_other_modules.py", "test_both_formats_compute_what_peft_does"),
    "AdaLoRA": ("adapters/test_adalora.py", "test_a_merge_computes_what_peft_does_in_both_formats"),
    "LoRA on `nn.MultiheadAttention`": (
        "adapters/test_peft_tensors.py",
        "test_lora_on_an_attention_of_torch_is_refused_but_not_on_its_parameter",
    ),
    "LoRA on convolutions": ("models/test_other_modules.py", "test_both_formats_compute_what_peft_does"),
    "a larger vocabulary": ("models/test_vocabulary.py", "test_one_adapter_with_added_tokens_is_what_peft_runs"),
    "keys of `torch.compile`, FSDP, DataParallel, a state dict, or without PEFT's prefix": (
        "adapters/test_peft_keys.py",
        "test_keys_of_another_making_are_read_alike_with_a_note",
    ),
    "mergekit-extract-lora": ("test_adapter_kinds.py", "test_what_mergekit_saved_changed_is_merged"),
    "experts of a fused parameter (`target_parameters`)": (
        "models/test_experts.py",
        "test_adapters_of_parameters_compute_what_peft_does",
    ),
    "LoRA on single experts, as transformers 4 had them": (
        "models/test_experts.py",
        "test_adapters_of_single_experts_compute_what_peft_makes_of_them",
    ),
    "`adapter_model.bin`, or weights in several files": (
        "test_adapter_kinds.py",
        "test_pickles_and_parts_are_converted_by_the_line_that_the_message_names",
    ),
    "files of MLX, Tinker, AdapterHub, PaddleNLP, LitGPT, llama.cpp, kohya": (
        "adapters/test_adapter_files.py",
        "test_files_of_something_else_are_named",
    ),
}
LINES = PAGE.read_text(encoding="utf-8").splitlines()


def base(*, tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER, attention_bias=True, tie_word_embeddings=tied)).double().eval()


def by_peft(model: nn.Module, folder: Path, inputs: dict[str, Tensor]) -> Tensor:
    return outputs(PeftModel.from_pretrained(copy.deepcopy(model), folder).double(), inputs)


@pytest.mark.parametrize("kind", [*MERGED, *TIED])
def test_merged_kinds_compute_what_peft_does(kind: str, tmp_path: Path) -> None:
    model = base(tied=kind in TIED)
    folder = write_adapter(model, tmp_path / "a", 1, r=3, lora_alpha=5, **{**MERGED, **TIED}[kind])
    result = nsc_merge.merge(model, {"a": folder}, method="task_arithmetic", scale=1.0)
    expected = by_peft(model, folder, text(1))
    own = copy.deepcopy(result.model)
    torch.testing.assert_close(outputs(result.apply(own), text(1)), expected, rtol=1e-6, atol=1e-7)
    again = PeftModel.from_pretrained(copy.deepcopy(model), result.save(tmp_path / "lora", "lora")).double()
    torch.testing.assert_close(outputs(again, text(1)), expected, rtol=1e-5, atol=1e-6)
    assert f"| {kind} | merged |" in "\n".join(LINES)


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_kinds_name_cause_and_cure(kind: str, tmp_path: Path) -> None:
    setting, cure = REFUSED[kind]
    folder = write_adapter(base(), tmp_path / "a", 1, r=2, **LINEARS)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **setting}))
    with pytest.raises(ValueError, match=cure):
        nsc_merge.load_adapter(folder, "a")
    assert f"| {kind} | refused |" in "\n".join(LINES)


def by_mergekit(model: nn.Module, folder: Path, changed: float) -> Path:
    """As mergekit-extract-lora writes: embeddings and norms in modules_to_save, be they the base's or not."""
    write_adapter(model, folder, 1, r=3, **LINEARS)
    config = json.loads((folder / "adapter_config.json").read_text())
    names = ["embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm"]
    (folder / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": names}))
    weights = load_file(folder / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(2)
    for key, value in model.state_dict().items():
        if key.split(".")[-2] in names:
            noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
            weights[f"base_model.model.{key}"] = value + changed * noise
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def test_what_mergekit_saved_changed_is_merged(tmp_path: Path) -> None:
    model = base()
    folder = by_mergekit(model, tmp_path / "a", 0.1)
    result = nsc_merge.merge(model, {"a": folder}, method="task_arithmetic", scale=1.0)
    norms = 1 + 2 * DECODER["num_hidden_layers"]
    assert len(result.paths) == len(nsc_merge.load_adapter(folder, "a").factors) + 2 + norms
    merged = result.apply(copy.deepcopy(model))
    peft = PeftModel.from_pretrained(copy.deepcopy(model), folder).double()
    # Each weight, as norms round to float32 inside; updates in full are kept in float32.
    for path in result.paths:
        own = peft.get_base_model().get_submodule(path)
        if hasattr(own, "lora_A"):
            weight = own.base_layer.weight + own.get_delta_weight("default")
        else:
            weight = own.modules_to_save["default"].weight
        found = merged.get_parameter(f"{path}.weight")
        torch.testing.assert_close(found, weight, rtol=0, atol=3e-8, check_dtype=False)
    assert (outputs(peft, text(1)) - outputs(model, text(1))).abs().max() > 0.01
    torch.testing.assert_close(outputs(merged, text(1)), outputs(peft, text(1)), rtol=0, atol=1e-6)


def test_what_mergekit_leaves_unchanged_is_left_out(tmp_path: Path) -> None:
    model = base()
    folder = by_mergekit(model, tmp_path / "a", 0.0)
    result = nsc_merge.merge(model, {"a": folder}, method="task_arithmetic", scale=1.0)
    assert result.paths == list(nsc_merge.load_adapter(folder, "a").factors)
    assert any("lm_head" in note for note in result.adapters["a"].notes)
    assert "| mergekit-extract-lora | merged |" in "\n".join(LINES)


def same(read: nsc_merge.Adapter, wanted: nsc_merge.Adapter) -> bool:
    pairs = [(read.factors[path], factor) for path, factor in wanted.factors.items()]
    return all(torch.equal(one.A, other.A) and torch.equal(one.B, other.B) for one, other in pairs)


def run(message: str) -> None:
    """The one line that a message asks for."""
    exec(shlex.split(message[message.index("python -c") :])[2], {})


def test_pickles_and_parts_are_converted_by_the_line_that_the_message_names(tmp_path: Path) -> None:
    folder = write_adapter(base(), tmp_path / "it's a", 1, r=2, **LINEARS)
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    one, other = [key for key in weights if key.endswith("q_proj.lora_A.weight")][:2]
    save_file({**weights, one: weights[other].clone()}, file)
    wanted = nsc_merge.load_adapter(folder, "a")
    file.unlink()
    # Two that are one in memory, as tied weights are.
    torch.save({**weights, one: weights[other]}, folder / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pickles are never.*map_location=.*weights_only=True") as caught:
        nsc_merge.load_adapter(folder, "a")
    run(str(caught.value))
    assert same(nsc_merge.load_adapter(folder, "a"), wanted)
    file.unlink()
    (folder / "adapter_model.bin").unlink()
    weights[one] = weights[other].clone()
    keys = sorted(weights)
    for number, half in enumerate((keys[::2], keys[1::2]), 1):
        save_file({key: weights[key] for key in half}, folder / f"adapter_model-0000{number}-of-00002.safetensors")
    with pytest.raises(FileNotFoundError, match="parts not put together") as caught:
        nsc_merge.load_adapter(folder, "a")
    run(str(caught.value))
    assert same(nsc_merge.load_adapter(folder, "a"), wanted)


def test_dora_is_approximated_when_asked(tmp_path: Path) -> None:
    model = base()
    folder = write_adapter(model, tmp_path / "a", 1, r=3, use_dora=True, **LINEARS)
    result = nsc_merge.merge(model, {"a": folder}, method="task_arithmetic", scale=1.0, dora="convert")
    assert any("DoRA converted at rank 3, relative error" in note for note in result.adapters["a"].notes)


def test_the_page_lists_all_kinds_and_no_other() -> None:
    begin = LINES.index("| kind | outcome | |")
    end = LINES.index("", begin) if "" in LINES[begin:] else len(LINES)
    rows = [line.split(" | ")[0].removeprefix("| ") for line in LINES[begin + 2 : end]]
    assert sorted(rows) == sorted([*MERGED, *TIED, *REFUSED, *ELSEWHERE])
    for file, test in ELSEWHERE.values():
        assert f"def {test}(" in (Path(__file__).parent / file).read_text(encoding="utf-8")


def test_named_experts_that_the_model_has_not_are_refused(tmp_path: Path) -> None:
    model = get_peft_model(base(), LoraConfig(r=2, target_modules=["gate_proj"]))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    renamed = {key.replace("mlp.gate_proj", "block_sparse_moe.experts.0.w1"): value for key, value in weights.items()}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["w1"]}))
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"adapted modules are not in LlamaForCausalLM, for example .*experts\.0\.w1"):
        nsc_merge.merge(base(), {"a": tmp_path}, method="task_arithmetic")
