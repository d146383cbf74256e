"""Keys of the base's config.json that transformers 5 writes by other names stay in a merged model's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from loop_cases import adapters_for, llama, llava

import nsc_merge
from nsc_merge.models.bases.loading import load_model
from nsc_merge.models.bases.placement import Placement

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
OLDER = {"rope_theta": 500000.0, "rope_scaling": LLAMA3, "torch_dtype": "bfloat16"}


def as_on_the_hub(folder: Path, fields: dict[str, Any]) -> None:
    """A base whose configuration is of transformers 4."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    text = config.get("text_config", config)
    del text["rope_parameters"]
    del config["dtype"]
    text.pop("dtype", None)
    text.update(fields)
    config["torch_dtype"] = fields["torch_dtype"]
    file.write_text(json.dumps(config))


def merged(folder: Path, model: Any) -> dict[str, Any]:
    result = nsc_merge.merge(model, adapters_for(model), method="task_arithmetic", scale=0.4)
    return json.loads((result.save(folder / "merged", "model") / "config.json").read_text())


@pytest.mark.parametrize("make", [llama, llava])
def test_older_keys_are_those_of_the_base(make, tmp_path):
    make().bfloat16().save_pretrained(tmp_path / "base")
    as_on_the_hub(tmp_path / "base", OLDER)
    model = load_model(str(tmp_path / "base"), local=True)
    found = merged(tmp_path, model)
    assert found["torch_dtype"] == found["dtype"] == "bfloat16"
    text = found.get("text_config", found)
    assert (text["rope_theta"], text["rope_scaling"]) == (500000.0, LLAMA3)
    assert text["rope_parameters"] == {**LLAMA3, "rope_theta": 500000.0}
    read = tf.AutoConfig.from_pretrained(tmp_path / "merged")
    assert read.get_text_config().rope_parameters == model.config.get_text_config().rope_parameters


@pytest.mark.parametrize("make", [llama, llava])
def test_a_base_in_another_dtype_is_said_to_be_of_that(make, tmp_path):
    make().bfloat16().save_pretrained(tmp_path / "base")
    as_on_the_hub(tmp_path / "base", OLDER)
    found = merged(tmp_path, load_model(str(tmp_path / "base"), local=True, placement=Placement(dtype="float32")))
    assert found["torch_dtype"] == found["dtype"] == "float32"
    text = found.get("text_config", found)
    assert text["rope_theta"] == 500000.0
    assert text.get("torch_dtype", "float32") == "float32"


@pytest.mark.parametrize("make", [llama, llava])
def test_what_was_changed_in_memory_is_not_told_as_the_base_has_it(make, tmp_path):
    make().save_pretrained(tmp_path / "base")
    as_on_the_hub(tmp_path / "base", {**OLDER, "torch_dtype": "float32"})
    model = load_model(str(tmp_path / "base"), local=True)
    model.config.get_text_config().rope_parameters = {"rope_type": "default", "rope_theta": 20000.0}
    found = merged(tmp_path, model)
    found = found.get("text_config", found)
    assert found["rope_parameters"]["rope_theta"] == 20000.0
    assert not {"rope_theta", "rope_scaling"} & found.keys()


def test_of_a_base_that_has_none_there_are_none(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    model = load_model(str(tmp_path / "base"), local=True)
    keys = json.loads((tmp_path / "base" / "config.json").read_text()).keys()
    assert merged(tmp_path, model).keys() == keys
    file = tmp_path / "base" / "config.json"
    config = json.loads(file.read_text())
    # Nothing that is only the base's, or code, comes along.
    code = {"_attn_implementation": "eager", "attn_implementation": "eager", "quantization_config": {}}
    file.write_text(json.dumps({**config, **code}))
    assert merged(tmp_path, model).keys() == keys
