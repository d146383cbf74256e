"""Raw data through a whole merge: the coefficients are those of batches made by hand."""

from __future__ import annotations

import pytest
import torch
from loop_cases import TASKS, adapters_for, llama, text_batches, values
from raw_cases import text_base, tokenizer, write_rows

import nsc_merge

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


def test_a_model_that_is_from_nowhere_needs_a_tokenizer_by_name():
    with pytest.raises(ValueError, match="^source: the model does not say where it is from; name a"):
        nsc_merge.calibration_data([{"text": "a"}], llama())
