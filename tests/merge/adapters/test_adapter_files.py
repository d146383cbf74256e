"""An adapter's folder: what is read is what is hashed, and stays what it was."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from zoo import outputs

import nsc_merge
from nsc_merge import load_adapter

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def test_an_adapter_carries_the_hashes_of_what_it_was_made_of(folders):
    folder = folders["plain"]
    expected = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (CONFIG, WEIGHTS)}
    assert load_adapter(folder, "plain").sha256 == expected
    in_memory = {"config": json.loads((folder / CONFIG).read_text()), "weights": load_file(folder / WEIGHTS)}
    assert load_adapter(in_memory, "plain").sha256 == {}


@pytest.mark.parametrize("change", ["overwritten", "cut"])
def test_an_adapter_outlives_its_file(folders, change):
    path = folders["plain"] / WEIGHTS
    weights = load_file(path)
    expected = {key: value.clone() for key, value in weights.items()}
    del weights
    adapter = load_adapter(folders["plain"], "plain")
    if change == "cut":
        os.truncate(path, 10)
    else:
        raw = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(raw[:8], "little")
        raw[start:] = bytes(len(raw) - start)
        with path.open("r+b") as file:
            file.write(raw)
    for module, factor in adapter.factors.items():
        assert torch.equal(factor.A, expected[f"base_model.model.{module}.lora_A.weight"])
        assert torch.equal(factor.B, expected[f"base_model.model.{module}.lora_B.weight"])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_factors_are_plain_numbers_as_for_peft(folders, model, images, dtype):
    path = folders["plain"] / WEIGHTS
    save_file({key: value.to(dtype) for key, value in load_file(path).items()}, path)
    result = nsc_merge.merge(model, {"plain": folders["plain"]}, method="task_arithmetic", scale=1.0)
    inputs = {"pixel_values": images.double()}
    expected = outputs(PeftModel.from_pretrained(copy.deepcopy(model), folders["plain"]).double(), inputs)
    found = outputs(result.apply(model.double()), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("setting", ["r", "lora_alpha"])
def test_a_setting_that_is_given_twice_is_refused(folders, setting):
    path = folders["plain"] / CONFIG
    path.write_text(path.read_text().rstrip().removesuffix("}") + f', "{setting}": 8}}')
    assert json.loads(path.read_text())[setting] == 8
    with pytest.raises(ValueError, match=rf"adapters\['plain'\]: .*{CONFIG} is not valid JSON: the key '{setting}'"):
        load_adapter(folders["plain"], "plain")


def test_what_is_no_file_is_named(folders):
    (folders["plain"] / WEIGHTS).unlink()
    os.mkfifo(folders["plain"] / WEIGHTS)
    (folders["mixed"] / CONFIG).unlink()
    (folders["mixed"] / CONFIG).mkdir()
    (folders["partial"] / CONFIG).write_bytes(b"")
    said = {"plain": f"{WEIGHTS} is no file", "mixed": f"{CONFIG} is no file", "partial": "is not valid JSON"}
    for name, what in said.items():
        with pytest.raises((FileNotFoundError, ValueError), match=rf"adapters\['{name}'\]: .*{what}"):
            load_adapter(folders[name], name)


def test_a_folder_of_adapters_names_one(folders):
    parent = folders["plain"].parent
    with pytest.raises(FileNotFoundError, match=rf"{CONFIG} is missing .*; expected the folder of one adapter, such"):
        load_adapter(parent, "x")
    (parent / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"is missing \(found: \[\]\)$"):
        load_adapter(parent / "empty", "x")


@pytest.mark.parametrize(
    ("file", "way_out"),
    [
        ("adapters.safetensors", "is of MLX, with both factors transposed; to convert: python"),
        ("model.safetensors", "a whole model is no adapter"),
        ("adapter.safetensors", r"is of the library adapters .*merge_adapter\(NAME\).*mergekit-extract-lora"),
        ("pytorch_adapter.bin", r"is of the library adapters .*merge_adapter\(NAME\).*mergekit-extract-lora"),
        ("lora_config.json", "is of PaddleNLP: .*merge_lora_params.py.*mergekit-extract-lora"),
        ("lit_model.pth.lora", "is of LitGPT: .*mergekit-extract-lora"),
        ("a.gguf", "is of llama.cpp: .*of a folder of PEFT's: give that one"),
        ("a.safetensors", r"is of kohya, ComfyUI, .*: load it into the pipeline \(pipe.load_lora_weights\)"),
    ],
)
def test_files_of_something_else_are_named(tmp_path, file, way_out):
    save_file({"weight": torch.zeros(2)}, tmp_path / file)
    with pytest.raises(FileNotFoundError, match=rf"{CONFIG} is missing \(found: \['{file}'\]\); .*{way_out}"):
        load_adapter(tmp_path, "x")


@pytest.mark.parametrize("file", ["a.safetensors", WEIGHTS])
def test_a_file_in_place_of_its_folder_is_told(tmp_path, file):
    save_file({"weight": torch.zeros(2)}, tmp_path / file)
    with pytest.raises(FileNotFoundError, match=r"\(found: a file\); expected the folder of an adapter, .*") as caught:
        load_adapter(tmp_path / file, "x")
    assert ("kohya" in str(caught.value)) == (file != WEIGHTS)


def test_of_several_checkpoints_the_last_is_named(folders):
    parent = folders["plain"].parent / "run"
    for number in (500, 1000):
        copied = shutil.copytree(folders["plain"], parent / f"checkpoint-{number}")
        (copied / "optimizer.pt").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"expected the folder of one adapter, such as .*checkpoint-1000$"):
        load_adapter(parent, "x")
    assert load_adapter(parent / "checkpoint-500", "x").notes == ()
    cached = parent / "models--me--it" / "snapshots"
    cached.mkdir(parents=True)
    (cached / "0123").symlink_to(parent / "checkpoint-500", target_is_directory=True)
    with pytest.raises(FileNotFoundError, match=r"such as .*/models--me--it/snapshots/0123$"):
        load_adapter(cached.parent, "x")


def test_an_adapter_of_mlx_is_converted_as_the_message_says(folders, tmp_path):
    """Of mlx-lm 0.32: its update is ``scale * lora_b.T @ lora_a.T``."""
    old, new = tmp_path / "a b", tmp_path / "new"
    old.mkdir()
    settings = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 20.0}, "num_layers": 1}
    (old / CONFIG).write_text(json.dumps(settings))
    path = "model.layers.3.self_attn.q_proj"
    factors = {"lora_a": torch.randn(6, 4), "lora_b": torch.randn(4, 5)}
    save_file({f"{path}.{part}": value for part, value in factors.items()}, old / "adapters.safetensors")
    with pytest.raises(FileNotFoundError, match="is of MLX") as caught:
        load_adapter(old, "x")
    said = str(caught.value)
    assert "\n" not in said
    _, *words = shlex.split(said.partition("to convert: ")[2])
    subprocess.run([sys.executable, *words[:-1], str(new)], check=True, cwd=tmp_path)
    expected = 20 * factors["lora_b"].double().T @ factors["lora_a"].double().T
    torch.testing.assert_close(load_adapter(new, "x").factors[path].delta(), expected)


def test_a_rank_other_than_the_configurations_is_no_matter_of_convolutions(folders, tmp_path):
    config = {**json.loads((folders["plain"] / CONFIG).read_text()), "r": 7, "rank_pattern": {}}
    with pytest.raises(ValueError, match=r"expected lora_A \[7, d_in\] .*by the configuration \(r, rank_.*\]$"):
        load_adapter({"config": config, "weights": load_file(folders["plain"] / WEIGHTS)}, "x")
