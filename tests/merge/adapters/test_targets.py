"""Tensors of modules that a configuration does not select are refused, by PEFT's own rule."""

from __future__ import annotations

import itertools
import json
import time

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from zoo import build, write_adapter

import nsc_merge
from nsc_merge.adapters.peft_config import check_targets

PATHS = [
    *(f"model.layers.{block}.{name}" for block in (0, 1, 11) for name in ("attn.q_proj", "attn.1.k_proj", "mlp.up")),
    *("q_proj", "layers.1.q_proj", "visual.blocks.1.attn.q_proj", "model.layers.1", "lm_head"),
]
TARGETS = [
    *(["q_proj"], ["q_proj", "model.layers.1.mlp.up"], ["layers.1.attn.q_proj", "up"], ["1"], "all-linear", None),
    *(r".*\.q_proj", "q_proj", r".*layers\.(0|11)\..*", r"model.*(q_proj|up)", r"^model.*q_proj$", "All-Linear"),
]
EXCLUDED = [None, [], ["model.layers.0.attn.q_proj"], ["up"], r".*visual.*", "visual"]
LAYERS = [(None, None), ([1], None), (11, None), ([0, 1], "layers"), ([1], ["blocks", "layers"]), ([], None)]


def is_read(config: dict, path: str) -> bool:
    try:
        check_targets("a", config, [path])
    except ValueError:
        return False
    return True


def test_what_peft_leaves_out_is_refused_and_nothing_else() -> None:
    for targets, excluded, (layers, under) in itertools.product(TARGETS, EXCLUDED, LAYERS):
        if layers is not None and not isinstance(targets, list):
            continue
        settings = {"target_modules": targets, "exclude_modules": excluded}
        settings |= {"layers_to_transform": layers, "layers_pattern": under}
        # The word for all linears becomes the names of all of them before PEFT asks.
        every = not isinstance(targets, list) and (targets or "all-linear").lower() == "all-linear"
        asked = LoraConfig(**{**settings, "target_modules": PATHS if every else targets})
        for path in PATHS:
            found = check_target_module_exists(asked, path)
            assert is_read(settings, path) == (bool(found) and not isinstance(found, _ExcludedModule)), (settings, path)


def test_look_around_is_taken_to_select_everything() -> None:
    assert is_read({"target_modules": "^(?!.*visual).*"}, "visual.blocks.1.attn.q_proj")


def test_a_folder_whose_configuration_is_of_other_weights_is_refused(tmp_path) -> None:
    folder = write_adapter(build("llama"), tmp_path / "a", 1, r=4, target_modules=["q_proj", "v_proj"])
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "target_modules": ["v_proj"]}))
    with pytest.raises(ValueError, match=r"q_proj has tensors, but is left out by target_modules=\['v_proj'\]"):
        nsc_merge.load_adapter(folder, "a")


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": 3},
        {"target_modules": [1]},
        {"exclude_modules": {"a": 1}},
        {"layers_to_transform": [1.5]},
        {"layers_to_transform": True},
        {"layers_pattern": 1},
    ],
)
def test_selections_of_another_type_are_refused(tmp_path, change) -> None:
    folder = write_adapter(build("llama"), tmp_path / "a", 1, r=4, target_modules=["q_proj"])
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=f"{next(iter(change))}: expected"):
        nsc_merge.load_adapter(folder, "a")


def test_many_names_and_hostile_expressions_take_no_time() -> None:
    paths = [f"model.layers.{block}.attn.q_proj{number}" for block in range(100) for number in range(100)]
    begun = time.process_time()
    check_targets("a", {"target_modules": [path.partition(".")[2] for path in paths]}, paths)
    assert not is_read({"target_modules": "(a+)+b"}, "a" * 200)
    assert time.process_time() - begun < 1
