"""Reading PEFT adapters: scaling rules, full coverage, refusals."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from nsc_merge import load_adapter
from nsc_merge.adapters import outline_of
from nsc_merge.adapters.formats.peft_tensors import sorted_tensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def edit_config(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def test_scaling_and_rank_follow_the_patterns(folders):
    plain, mixed = (load_adapter(folders[name], name) for name in ("plain", "mixed"))
    assert {(factor.rank, factor.scaling) for factor in plain.factors.values()} == {(4, 1.5)}
    factors = mixed.factors
    assert (factors["layers.0.attention.q_proj"].rank, factors["layers.1.attention.q_proj"].rank) == (3, 6)
    assert factors["layers.0.attention.q_proj"].scaling == pytest.approx(5 / math.sqrt(3))
    assert factors["layers.1.attention.q_proj"].scaling == pytest.approx(5 / math.sqrt(6))
    assert factors["layers.2.attention.o_proj"].scaling == pytest.approx(2 / math.sqrt(3))


def test_absent_modules_stay_absent(folders):
    partial = load_adapter(folders["partial"], "partial")
    assert {path.rsplit(".", 1)[-1] for path in partial.factors} == {"v_proj", "o_proj"}


@pytest.mark.parametrize("name", ["plain", "mixed", "partial"])
def test_an_outline_has_the_shapes_and_scalings_of_the_adapter(folders, name):
    outline, config = outline_of(folders[name], name)
    whole = load_adapter(folders[name], name)
    assert config == json.loads((folders[name] / CONFIG).read_text())
    assert list(outline.factors) == list(whole.factors)
    for path, factor in whole.factors.items():
        found = outline.factors[path]
        assert found.A.is_meta
        assert found.B.is_meta
        assert (found.A.shape, found.B.shape, found.scaling) == (factor.A.shape, factor.B.shape, factor.scaling)


def test_an_outline_of_a_damaged_folder_is_refused(folders):
    edit_config(folders["plain"], r=5)
    with pytest.raises(ValueError, match=r"expected lora_A \[5, d_in\]"):
        outline_of(folders["plain"], "plain")
    (folders["mixed"] / WEIGHTS).write_bytes(b"none")
    with pytest.raises(ValueError, match="adapters\\['mixed'\\].*header length"):
        outline_of(folders["mixed"], "mixed")
    (folders["partial"] / CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match="adapter_config.json is missing"):
        outline_of(folders["partial"], "partial")


def test_memory_and_folder_give_the_same_adapter(folders):
    folder = folders["mixed"]
    source = {"config": json.loads((folder / CONFIG).read_text()), "weights": load_file(folder / WEIGHTS)}
    from_memory, from_folder = load_adapter(source, "m"), load_adapter(folder, "m")
    assert from_memory.factors.keys() == from_folder.factors.keys()
    for path, factor in from_folder.factors.items():
        assert torch.equal(factor.A, from_memory.factors[path].A)
        assert factor.scaling == from_memory.factors[path].scaling


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.classifier.weight",
        "base_model.model.layers.0.attention.q_proj.lora_B.bias",
        "layers.0.attention.q_proj.lora_A.weight",
    ],
)
def test_a_tensor_that_would_be_ignored_fails_the_load(folders, key):
    weights = load_file(folders["plain"] / WEIGHTS)
    save_file({**weights, key: torch.zeros(2)}, folders["plain"] / WEIGHTS)
    with pytest.raises(ValueError, match="1 of 33 tensors would be ignored") as error:
        load_adapter(folders["plain"], "plain")
    assert key in str(error.value)


def test_dora_is_refused_with_the_reason(write_adapter):
    folder = write_adapter("dora", 1, use_dora=True)
    with pytest.raises(ValueError, match="use_dora=True is refused: DoRA rescales each row"):
        load_adapter(folder, "dora", dora="refuse")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type: expected 'LORA', found 'IA3'"),
        ({"bias": "all"}, "bias: expected 'none', found 'all'"),
        ({"lora_bias": True}, r"has lora_A, lora_B only; expected .*lora_B\.bias"),
        ({"init_lora_weights": "pissa_niter_4"}, "changing the base weights"),
        ({"layer_replication": [[0, 2]]}, "layer_replication=.* is refused"),
        ({"r": 5}, r"expected lora_A \[5, d_in\]"),
        ({"r": 0}, "r of .*: expected a positive whole number, found 0"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern: '\(' is no regular expression"),
        ({"rank_pattern": "q_proj"}, "rank_pattern: expected patterns and numbers, found 'q_proj'"),
        ({"modules_to_save": "score"}, "modules_to_save: expected names, found 'score'"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path: expected text, found 3"),
        ({"lora_alpha": float("inf")}, "not valid JSON: expected finite numbers, found Infinity"),
        ({"lora_alpha": None}, "lora_alpha of .*: expected a positive number, found None"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(folders, change, message):
    edit_config(folders["plain"], **change)
    with pytest.raises(ValueError, match=message):
        load_adapter(folders["plain"], "plain")


def test_half_a_pair_and_non_finite_values_are_refused(folders):
    path = folders["plain"] / WEIGHTS
    weights = load_file(path)
    key = "base_model.model.layers.0.attention.q_proj.lora_B.weight"
    save_file({name: value for name, value in weights.items() if name != key}, path)
    with pytest.raises(ValueError, match="q_proj has lora_A only"):
        load_adapter(folders["plain"], "plain")
    save_file({**weights, key: weights[key].fill_(float("nan"))}, path)
    with pytest.raises(ValueError, match="not finite"):
        load_adapter(folders["plain"], "plain")


A, B = torch.ones(2, 8), torch.ones(6, 2)
ROWS, STACK = {"trainable_token_indices": {"e": [1, 2]}}, {"target_parameters": ["m.w"]}
DELTA = "token_adapter.trainable_tokens_delta"
UNLIKE = {
    "nothing": ({}, {}, "holds no LoRA tensors"),
    "the base's alone": ({}, {"embed.weight": B}, "holds no LoRA tensors"),
    "a scalar": ({}, {"q.lora_A.weight": A[0, 0]}, r"q: expected lora_A \[2, d_in\] .*found \[\] and \[6, 2\]"),
    "a vector": ({}, {"q.lora_A.weight": A[:, 0]}, r"q: expected lora_A \[r, d_in\] .*found \[2\] and \[6, 2\]"),
    "whole numbers": ({}, {"q.lora_A.weight": A.long()}, r"q\.lora_A\.weight: expected floating point"),
    "a bias": ({"lora_bias": True}, {"q.lora_B.bias": A[0]}, r"q\.lora_B\.bias: expected \[6\], found \[8\]"),
    "a magnitude": ({"use_dora": True}, {"q.lora_magnitude_vector": A[0]}, r"vector: expected \[6\], found \[8\]"),
    "a kernel's": ({"use_dora": True}, {"q.lora_magnitude_vector": A[None]}, "q: DoRA on a convolution is not merged"),
    "a row": (ROWS, {f"e.{DELTA}": A[:1]}, r"e: expected a row for each of 2 different tokens .*found \[1, 8\]"),
    "a token twice": ({"trainable_token_indices": [1, 1]}, {f"e.{DELTA}": A}, "e: expected a row for each of 2 diff"),
    "no numbers": (ROWS, {f"e.{DELTA}": math.inf * A}, r"e\.trainable_tokens_delta .*not finite"),
    "tokens by name": ({"trainable_token_indices": "ab"}, {}, "trainable_token_indices: expected whole numbers"),
    "left out": ({"ensure_weight_tying": True, "target_modules": ["v"]}, {}, "q has tensors, but is left out by ta"),
    "left out beside one": (
        {"ensure_weight_tying": True, "target_modules": ["v"]},
        {"v.lora_A.weight": 2 * A, "v.lora_B.weight": B},
        "q has tensors, but is left out by ta",
    ),
    "no parameter": ({}, {"head.weight": B, "head.other": B}, r"1 of 4 tensors would be ignored.*head\.other"),
    "other rows": (ROWS, {f"e.{DELTA}": A, f"head.{DELTA}": 0 * A}, r"1 of 4 tensors would be ignored.*head\.token"),
    "half a stack": (STACK, {"m.lora_A.weight": A}, r"m has lora_A\.weight only; expected lora_A"),
    "a stack": (STACK, {"m.lora_A.weight": A, "m.lora_B.weight": A}, r"m: expected lora_A \[E r, d_in\] .*\[2, 8\]"),
    "a vector of all": (STACK, {"m.lora_A.weight": A, "m.lora_B.weight": A[0]}, r"m: expected lora_A .*\[8\]"),
    "a stack of none": (STACK, {"m.lora_A.weight": math.nan * A, "m.lora_B.weight": B}, r"m\.A .*not finite"),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_tensors_unlike_those_that_peft_writes_are_refused(case):
    config, tensors, message = UNLIKE[case]
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"], **config}
    beside = {} if "no LoRA" in message else {"q.lora_A.weight": A, "q.lora_B.weight": B}
    weights = {f"base_model.model.{name}": value for name, value in (beside | tensors).items()}
    with pytest.raises(ValueError, match=r"adapters\['a'\]: .*" + message):
        load_adapter({"config": config, "weights": weights}, "a")


@pytest.mark.parametrize(("head", "trained"), [(B, ["head.weight"]), (2 * B, [])])
def test_of_what_is_trained_as_one_only_what_is_the_same_is_trained(head, trained):
    """An embedding has a head tied to it; another head is the base's own, which lies beside it."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"], "ensure_weight_tying": True}
    held = {"q.lora_A.weight": A, "q.lora_B.weight": B, "e.weight": B.clone(), "n.weight": A[0], "head.weight": head}
    weights = {f"base_model.model.{name}": value for name, value in held.items()}
    found, of_base = sorted_tensors("a", {**config, "modules_to_save": ["e", "n"]}, weights)
    assert list(found.trained) == ["e.weight", "n.weight", *trained]
    assert [*found.trained, *of_base] == ["e.weight", "n.weight", "head.weight"]


def test_rows_of_tokens_under_the_name_of_a_tied_weight_are_the_same_rows():
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"], **ROWS}
    names = {"q.lora_A.weight": A, "q.lora_B.weight": B, f"e.{DELTA}": A, f"head.{DELTA}": A.clone()}
    weights = {f"base_model.model.{name}": value for name, value in names.items()}
    assert list(load_adapter({"config": config, "weights": weights}, "a").token_rows) == ["e"]


def test_missing_and_corrupt_files_are_named(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_adapter(tmp_path / "nowhere", "x")
    (folders["plain"] / WEIGHTS).write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="not valid safetensors"):
        load_adapter(folders["plain"], "plain")
    (folders["mixed"] / CONFIG).write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_adapter(folders["mixed"], "mixed")
    (folders["partial"] / WEIGHTS).rename(folders["partial"] / "adapter_model.bin")
    with pytest.raises(
        FileNotFoundError, match=r"adapter_model\.safetensors is missing .*adapter_model\.bin"
    ):
        load_adapter(folders["partial"], "partial")
    with pytest.raises(TypeError, match="expected a PEFT folder"):
        load_adapter(3, "x")


def test_an_adapter_that_was_not_trained_is_noted(folders):
    """As a checkpoint of the first step is, or one that was saved before the weights were gathered."""
    assert not load_adapter(folders["plain"], "plain").notes
    path = folders["plain"] / WEIGHTS
    weights = load_file(path)
    save_file({key: value * (0 if "lora_B" in key else 1) for key, value in weights.items()}, path)
    (note,) = load_adapter(folders["plain"], "plain").notes
    assert note.startswith("every update is zero, as before training")
    last = [key for key in weights if "lora_B" in key][-1]
    save_file({key: value * (0 if "lora_B" in key and key != last else 1) for key, value in weights.items()}, path)
    assert not load_adapter(folders["plain"], "plain").notes


def test_adapters_in_folders_within_are_noted(folders):
    """As PEFT saves a model that holds several; a trainer's checkpoints are the same adapter, earlier."""
    own = folders["plain"]
    shutil.copytree(own, own / "checkpoint-500")
    assert not load_adapter(own, "plain").notes
    for other in ("b", "a"):
        shutil.copytree(own / "checkpoint-500", own / other)
    (note,) = load_adapter(own, "plain").notes
    assert note == (
        "folders within its own hold other adapters, which are not read (a, b): name each that is to be merged"
    )


@pytest.mark.parametrize("name", ["unembed_tokens", "layers.0.mlp.experts.w1"])
def test_names_of_tinker_are_refused_with_what_converts_them(name):
    held = {"A": torch.ones(3, 2, 4) if "experts" in name else torch.ones(2, 4), "B": torch.ones(5, 2)}
    weights = {f"base_model.model.model.{name}.lora_{part}.weight": value for part, value in held.items()}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": "all-linear"}
    with pytest.raises(ValueError, match=rf"model\.{name} is a name of Tinker's; tinker_cookbook.weights.build_lora"):
        load_adapter({"config": config, "weights": weights}, "x")


def test_empty_tensors_are_told_as_those_of_zero_3(folders):
    file = folders["plain"] / WEIGHTS
    save_file({key: torch.empty(0) for key in load_file(file)}, file)
    with pytest.raises(ValueError, match=r"found \[0\] and \[0\]; DeepSpeed's ZeRO-3 leaves empty tensors"):
        load_adapter(folders["plain"], "x")
