"""What a calibration batch given in Python must be: tensors, with a real token in every row."""

from __future__ import annotations

import numpy
import pytest
import torch
from loop_cases import TASKS, adapters_for, llama, text_batches
from safetensors.torch import save_file
from transformers import BatchEncoding

import nsc_merge
from nsc_merge.calibration.batch_files import read_batches
from nsc_merge.calibration.batches import held_out, streams

IDS = torch.ones(2, 3, dtype=torch.long)
LISTS = {
    "ragged": ({"input_ids": [[1, 2, 3], [4]]}, "list of rows of 1 to 3 numbers"),
    "rows": (BatchEncoding({"input_ids": [[1, 2], [3, 4]]}), "found list;"),
    "flat": ({"input_ids": [1, 2]}, "found list;"),
    "numpy": ({"input_ids": numpy.ones((2, 3), int)}, "found ndarray;"),
    "tensors": ({"input_ids": [IDS[0], IDS[1]]}, "found list;"),
    "tuple": ({"input_ids": ()}, "found tuple;"),
}


@pytest.mark.parametrize("batch", LISTS)
@pytest.mark.parametrize("method", ["nsc", "regmean", "adamerging"])
def test_lists_are_refused_by_task_and_key(batch, method):
    model = llama()
    given, found = LISTS[batch]
    batches = {**text_batches(1), "b": [given]}
    options = {} if method == "regmean" else {"progress": False}
    with pytest.raises(ValueError, match=rf"^calibration\['b'\]: input_ids: .*{found}.*return_tensors=\"pt\""):
        nsc_merge.merge(model, adapters_for(model), batches, method, **options)


def test_tensors_of_a_tokenizer_and_settings_beside_them_are_taken():
    model = llama()
    batches = {task: [BatchEncoding({"input_ids": IDS, "output_attentions": False})] for task in TASKS}
    plain = {task: [{"input_ids": IDS}] for task in TASKS}
    found, wanted = (
        nsc_merge.merge(model, adapters_for(model), given, steps=1, progress=False) for given in (batches, plain)
    )
    assert found.coefficients == wanted.coefficients
    # As sizes of pictures are.
    sized = {"input_ids": IDS, "image_sizes": [[8, 8], [8, 8]]}
    assert next(streams({"a": [sized]}, ["a"])["a"]) is sized


def one_dictionary():
    batch = {}
    for number in range(3):
        batch["input_ids"] = IDS + number
        yield batch


def one_tensor():
    ids = torch.empty_like(IDS)
    for number in range(3):
        yield {"input_ids": ids.copy_(IDS + number)}


class Anew:
    def __init__(self, make):
        self.make = make

    def __iter__(self):
        return self.make()


@pytest.mark.parametrize("make", [one_dictionary, one_tensor])
@pytest.mark.parametrize("around", [Anew, lambda make: make()])
def test_batches_that_are_filled_anew_are_refused(make, around):
    """What is kept of a batch, and run again, would be of another."""
    words = r"calibration\['b'\]: expected a dictionary and tensors of its own .*'input_ids' filled anew.*clone\(\)"
    batches = {**text_batches(2), "b": around(make)}
    with pytest.raises(ValueError, match=words):
        nsc_merge.merge(llama(), adapters_for(llama()), batches, "match", steps=2, progress=False)
    with pytest.raises(ValueError, match=words):
        held_out({"b": around(make)}, ["b"], 1)


def test_one_batch_may_come_again_also_where_the_model_writes_into_it():
    batch = {"input_ids": IDS.clone()}
    for given in ([batch], [batch, batch], [batch, {"input_ids": batch["input_ids"]}]):
        stream = streams({"b": given}, ["b"])["b"]
        for _ in range(5):
            next(stream)["input_ids"].add_(1)


def test_rows_of_nothing_but_padding_are_refused_in_batches_and_in_files(tmp_path):
    batch = {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 0], [0, 0, 0]])}
    words = r"^calibration\['b'\]: attention_mask: expected a real token in every row, .* in rows \[1\] \(1 in all\)$"
    model = llama()
    with pytest.raises(ValueError, match=words):
        nsc_merge.merge(model, adapters_for(model), {**text_batches(1), "b": [batch]}, progress=False)
    with pytest.raises(ValueError, match=words):
        held_out({"b": [batch, batch]}, ["b"], 1)
    stream = streams({"b": [{"input_ids": IDS}, batch]}, ["b"])["b"]
    next(stream)
    with pytest.raises(ValueError, match=words):
        next(stream)
    save_file(batch, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"attention_mask has no real token in rows \[1\] \(1 in all\)$"):
        read_batches(tmp_path / "b.safetensors", 4, "calibration")


@pytest.mark.parametrize("method", ["match", "distill"])
def test_masks_of_other_texts_are_refused_in_batches_and_in_files(tmp_path, method):
    """transformers runs them, over some of the tokens."""
    batch = {"input_ids": IDS, "attention_mask": torch.ones(2, 2).long()}
    words = r"attention_mask: expected the shape of input_ids, \[2, 3\], found \[2, 2\]$"
    model = llama()
    with pytest.raises(ValueError, match=rf"^calibration\['b'\]: {words}"):
        nsc_merge.merge(model, adapters_for(model), {**text_batches(1), "b": [batch]}, method, steps=1, progress=False)
    save_file(batch, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=rf"^calibration: .*b\.safetensors: {words}"):
        read_batches(tmp_path / "b.safetensors", 4, "calibration")


def test_masks_that_are_added_to_scores_may_be_zero():
    batch = {"input_ids": IDS, "attention_mask": torch.zeros(2, 1, 3, 3)}
    assert next(streams({"b": [batch]}, ["b"])["b"]) is batch
