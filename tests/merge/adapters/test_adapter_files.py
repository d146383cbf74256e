"""An adapter's folder: what is read is what is hashed, and stays what it was."""

from __future__ import annotations

import copy
import hashlib
import json
import os

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
    [("adapters.safetensors", "is of MLX; .* lora_a and lora_b transposed"), ("model.safetensors", "a whole model")],
)
def test_files_of_something_else_are_named(tmp_path, file, way_out):
    save_file({"weight": torch.zeros(2)}, tmp_path / file)
    with pytest.raises(FileNotFoundError, match=rf"{CONFIG} is missing \(found: \['{file}'\]\); .*{way_out}"):
        load_adapter(tmp_path, "x")


def test_a_rank_other_than_the_configurations_is_no_matter_of_convolutions(folders, tmp_path):
    config = {**json.loads((folders["plain"] / CONFIG).read_text()), "r": 7, "rank_pattern": {}}
    with pytest.raises(ValueError, match=r"expected lora_A \[7, d_in\] .*by the configuration \(r, rank_.*\]$"):
        load_adapter({"config": config, "weights": load_file(folders["plain"] / WEIGHTS)}, "x")
