"""Raw data through a whole merge: the coefficients are those of batches made by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from loop_cases import TASKS, adapters_for, llama, text_batches, values
from raw_cases import text_base, tokenizer, write_rows
from safetensors.torch import save_file

import nsc_merge
from nsc_merge.calibration.raw.settings import DataSettings
from nsc_merge.recipes.calibration_keys import CalibrationSource
from nsc_merge.recipes.inputs import read_inputs

TEXTS = {"a": ["a b c", "d", "e f"], "b": ["g h", "a a a b"], "c": ["c c c"]}


def test_a_merge_of_raw_data_is_that_of_batches_made_by_hand(tmp_path):
    base = text_base(tmp_path / "base")
    model = llama()
    data = {}
    for task in TASKS:
        file = write_rows(tmp_path / f"{task}.jsonl", [{"prompt": text} for text in TEXTS[task]])
        data[task] = nsc_merge.calibration_data(file, model, tokenizer=str(base), batch_size=1)
    tool = tokenizer()
    texts = {task: [tool.decode(one["input_ids"][0], skip_special_tokens=True) for one in data[task]] for task in TASKS}
    assert {task: sorted(some) for task, some in texts.items()} == {task: sorted(TEXTS[task]) for task in TASKS}
    by_hand = {task: [tool(text, return_tensors="pt") for text in some] for task, some in texts.items()}
    options = {"steps": 3, "progress": False, "seed": 0}
    found = nsc_merge.merge(model, adapters_for(model), data, **options)
    expected = nsc_merge.merge(model, adapters_for(model), by_hand, **options)
    assert torch.equal(values(found), values(expected))
    other = nsc_merge.merge(model, adapters_for(model), text_batches(), **options)
    assert not torch.equal(values(found), values(other))


def test_raw_data_that_tasks_take_alike_are_read_once(tmp_path):
    base = text_base(tmp_path / "base")
    file = write_rows(tmp_path / "x.jsonl", [{"text": "a b"}, {"text": "c"}])
    save_file({"input_ids": torch.ones(2, 3, dtype=torch.long)}, tmp_path / "x.safetensors")
    raw, fewer = CalibrationSource(str(file)), CalibrationSource(str(file), settings=DataSettings(samples=1))
    stored = CalibrationSource(str(tmp_path / "x.safetensors"))
    sources = {"a": raw, "b": raw, "c": fewer, "d": stored, "e": stored}
    recipe = SimpleNamespace(adapters={}, calibration=sources, model=str(base), batch_size=2, revision=None)
    _, found = read_inputs(recipe)
    assert found["a"] is found["b"]
    assert len({id(batches) for batches in found.values()}) == 4
    assert found["d"].sha256 == found["e"].sha256
    assert sum(len(batch["input_ids"]) for batch in found["c"]) == 1


def test_a_model_that_is_from_nowhere_needs_a_tokenizer_by_name():
    with pytest.raises(ValueError, match="^source: the model does not say where it is from; name a"):
        nsc_merge.calibration_data([{"text": "a"}], llama())
    with pytest.raises(ValueError, match="^model: expected a model of transformers, its folder or .*, found int"):
        nsc_merge.calibration_data([{"text": "a"}], 3)
