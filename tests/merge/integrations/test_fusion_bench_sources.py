"""What FusionBench's pools hold, read without FusionBench."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

import nsc_merge
from fusion_bench_cases import TASKS, clip, images, peft_models, t5, texts, whole
from nsc_merge.adapters import Factor
from nsc_merge.integrations.fusion_bench_sources import as_factors, batches_of, merged_into, updates_of


class Pool:
    """What is asked of a pool."""

    def __init__(self, **datasets):
        self.datasets = datasets
        for split in datasets:
            setattr(self, f"{split}_dataset_names", ["task"])
            setattr(self, f"load_{split}_dataset", lambda task, split=split: self.datasets[split])

    def load_processor(self):
        return lambda images, return_tensors: {"pixel_values": torch.full((len(images), 3, 2, 2), float(images[0]))}


def test_rows_of_tensors_in_a_seeded_draw():
    base = clip()
    batches = batches_of(Pool(test=images(0)), "task", base, None, samples=5, batch_size=2)
    assert [list(batch) for batch in batches] == [["pixel_values"]] * 3
    drawn = torch.cat([batch["pixel_values"] for batch in batches])
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))[:5]
    assert torch.equal(drawn, torch.stack([images(0)[number][0] for number in order]))
    base(**batches[0])


def test_validation_data_first_and_a_split_by_name():
    pool = Pool(test=images(0), val=images(1), train=images(2))
    firsts = {}
    for split in (None, "val", "test", "train"):
        firsts[split] = batches_of(pool, "task", clip(), split, samples=1, batch_size=1)[0]["pixel_values"]
    assert torch.equal(firsts[None], firsts["val"])
    assert not torch.equal(firsts["val"], firsts["test"])
    assert not torch.equal(firsts["test"], firsts["train"])


def test_pictures_go_through_the_pools_processor():
    rows = [{"image": number, "label": 1} for number in (3, 5)]
    (batch,) = batches_of(Pool(test=rows), "task", clip(), None, samples=2, batch_size=2)
    assert batch["pixel_values"].shape == (2, 3, 2, 2)
    assert sorted(batch["pixel_values"][:, 0, 0, 0].tolist()) == [3, 5]


def test_lists_of_numbers_are_not_rounded_to_the_default_dtype():
    pixels = [image.tolist() for image, _ in images(0)]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        (batch,) = batches_of(Pool(test=[{"pixel_values": one} for one in pixels]), "task", clip(), None, 8, 8)
    finally:
        torch.set_default_dtype(before)
    assert sorted(batch["pixel_values"].flatten().tolist()) == sorted(torch.tensor(pixels).flatten().tolist())


def test_pictures_need_a_pool_with_a_processor(monkeypatch):
    monkeypatch.delattr(Pool, "load_processor")
    with pytest.raises(ValueError, match="expected a pool with a processor for the images of 'task'.*found a Pool"):
        batches_of(Pool(test=[{"image": 3}]), "task", clip(), None, samples=1, batch_size=1)


def test_rows_of_inputs_lose_their_labels_and_get_a_start_token():
    base = t5()
    (batch,) = batches_of(Pool(test=texts(0)), "task", base, None, samples=3, batch_size=4)
    assert sorted(batch) == ["attention_mask", "decoder_input_ids", "input_ids"]
    assert batch["decoder_input_ids"].tolist() == [[0]] * 3
    assert base(**batch).logits.shape == (3, 1, 64)


def test_wrong_data_is_refused():
    with pytest.raises(ValueError, match=r"dataset: expected a dataset of 'task' .* found 'val' and {'val': \[\]"):
        batches_of(Pool(test=images(0)), "task", clip(), "val", 2, 2)
    with pytest.raises(ValueError, match="dataset: expected a dataset of 'task' .* found None"):
        batches_of(Pool(), "task", clip(), None, 2, 2)
    with pytest.raises(ValueError, match="dataset: expected rows of 'task', found none"):
        batches_of(Pool(test=[]), "task", clip(), None, 2, 2)
    with pytest.raises(ValueError, match="dataset: expected inputs of CLIPVisionModel in the rows of 'task'"):
        batches_of(Pool(test=[{"words": "a"}]), "task", clip(), None, 2, 2)
    uneven = [{"input_ids": [1, 2]}, {"input_ids": [1]}]
    with pytest.raises(ValueError, match="dataset: expected rows of one length for 'task', found 2; pad them"):
        batches_of(Pool(test=uneven), "task", t5(), None, 2, 2)


def test_whole_models_and_their_adapters_are_the_same_updates():
    base = clip()
    adapters = peft_models(base, ["q_proj", "v_proj"])
    for task, model in whole(adapters).items():
        found, given = updates_of(base, model, task), updates_of(base, adapters[task], task)
        assert found.keys() == given.keys()
        for name, update in given.items():
            assert isinstance(update, Factor)
            assert found[name].rank == update.rank
            torch.testing.assert_close(found[name].delta(), update.delta(), rtol=1e-4, atol=1e-6)


def test_turned_weights_convolutions_and_biases():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    base = nn.Sequential(Conv1D(6, 4), nn.LayerNorm(6), nn.Conv2d(3, 5, 2))
    changed = deepcopy(base)
    with torch.no_grad():
        for value in changed.parameters():
            value.add_(torch.randn(value.shape))
    updates = updates_of(base, changed, "task")
    assert [update.shape for update in updates.values()] == [value.shape for value in base.parameters()]
    factors = as_factors(updates, base, "task")
    assert [factor.dense.shape for factor in factors.values()] == [(6, 4), (6, 1), (5, 12)]
    for path, factor in factors.items():
        torch.testing.assert_close(factor.bias, changed.get_submodule(path).bias - base.get_submodule(path).bias)
    merged = merged_into(deepcopy(base), {"task": updates}, "task_arithmetic", {"scale": 1.0})
    for name, value in changed.named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), value)


def test_merging_whole_models_is_merging_their_adapters():
    base = clip()
    adapters = peft_models(base, ["q_proj", "v_proj"])
    updates = {task: updates_of(base, model, task) for task, model in whole(adapters).items()}
    found = merged_into(deepcopy(base), updates, "knots_ties", {"scale": 0.5, "trim_scope": "tensor"})
    result = nsc_merge.merge(base, dict(adapters), method="knots_ties", scale=0.5, trim_scope="tensor")
    expected = result.apply(deepcopy(base))
    moved = 0.0
    for name, value in base.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), expected.get_parameter(name), rtol=1e-4, atol=1e-5)
        moved = max(moved, float((expected.get_parameter(name) - value).abs().max()))
    assert moved > 0.01
    assert list(updates) == TASKS


@pytest.mark.parametrize("method", ["svd", "lora_lego"])
def test_a_rank_is_the_methods_own(method):
    base = clip()
    adapters = peft_models(base, ["q_proj", "v_proj"])
    updates = {task: updates_of(base, model, task) for task, model in adapters.items()}
    found = merged_into(deepcopy(base), updates, method, {"rank": 1})
    expected = nsc_merge.merge(base, dict(adapters), method=method, rank=1).apply(deepcopy(base))
    for name, value in expected.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), value, rtol=1e-4, atol=1e-5)
