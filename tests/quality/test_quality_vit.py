"""The ViT suites' data, training and measures, small enough to train here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from quality_cases import VIT

import nsc_merge
from bench.quality.suite import evaluate
from bench.quality.suites import siglip, vit
from bench.quality.suites.kept_adapters import kept_adapters
from nsc_merge.demo import train
from nsc_merge.models.forward_contexts import shared_forward


def test_parts_are_trained_once(trained, work):
    lines: list[str] = []
    again = vit.load(work, 0, log=lines.append, settings=VIT, permuted=("sal",))
    assert lines == []
    assert list(again.tasks) == list(trained.tasks) == list(vit.TASKS)
    assert {info.kind for info in trained.tasks.values()} == {"classification", "regression", "dense"}
    assert not list(work.rglob(".*"))


def test_a_missing_part_is_trained_again_and_comes_out_the_same(trained, work, tmp_path):
    fresh = tmp_path / "vit" / "seed0" / "adapters"
    fresh.mkdir(parents=True)
    for name in vit.TASKS:
        if name != "angle":
            (fresh / name).symlink_to(work / "vit" / "seed0" / "adapters" / name)
    lines: list[str] = []
    again = vit.load(tmp_path, 0, log=lines.append, progress=False, settings=VIT)
    assert len(lines) == 1
    first, second = (nsc_merge.load_adapter(suite.adapters["angle"], "angle").factors for suite in (trained, again))
    for path, factor in first.items():
        assert torch.equal(factor.A, second[path].A)
        assert torch.equal(factor.B, second[path].B)
    assert torch.equal(trained.heads["angle"].weight, again.heads["angle"].weight)


def test_seeds_differ(trained, tmp_path):
    only = tmp_path / "vit" / "seed1" / "adapters"
    only.mkdir(parents=True)
    for name in vit.TASKS:
        if name != "count":
            (only / name).symlink_to(trained.adapters[name].parent)
    other = vit.load(tmp_path, 1, log=lambda line: None, progress=False, settings=VIT)
    one, two = (nsc_merge.load_adapter(suite.adapters["count"], "count").factors for suite in (trained, other))
    assert all(not torch.equal(one[path].A, two[path].A) for path in one)


def test_adapters_along_training_are_kept(trained, work):
    kept = kept_adapters(work, "vit", 0, "depth", "adapters")
    assert [entry["step"] for entry, _ in kept] == [0, 2, 4, 6]
    start = nsc_merge.load_adapter(kept[0][1], "depth").factors
    assert all(not factor.B.any() for factor in start.values())
    end = nsc_merge.load_adapter(kept[-1][1], "depth").factors
    final = nsc_merge.load_adapter(trained.adapters["depth"], "depth").factors
    assert all(torch.equal(end[path].B, final[path].B) and end[path].B.any() for path in final)
    # The curve is that of the model as it is measured elsewhere.
    alone = nsc_merge.merge(trained.model, trained.adapters, method="finetuned")
    scores = evaluate(trained, alone, "val")
    assert kept[-1][0]["metric"] == pytest.approx(scores.metrics["depth"], rel=1e-4)
    assert kept_adapters(work, "vit", 0, "depth", "permuted") == []
    assert len(kept_adapters(work, "vit", 0, "sal", "permuted")) == 4


def test_the_suite_without_a_class_token_trains_its_own_base(tmp_path, monkeypatch):
    for name, value in (("_PRETRAIN_STEPS", 3), ("_PRETRAIN_SCENES", 64), ("_HELD_OUT", 16)):
        monkeypatch.setattr(train, name, value)
    few = replace(VIT, probe_steps=2, steps=2, kept_steps=2)
    lines: list[str] = []
    suite = siglip.load(tmp_path, 0, log=lines.append, progress=False, settings=few)
    assert (len(lines), suite.name, len(suite.tasks)) == (1 + len(vit.TASKS), "siglip", 8)
    assert suite.model.config.model_type == "siglip_vision_model"
    assert not hasattr(suite.model.embeddings, "mask_token") or suite.model.embeddings.mask_token is None
    factors = nsc_merge.load_adapter(suite.adapters["depth"], "depth").factors
    assert {path.rsplit(".", 1)[-1] for path in factors} == {"q_proj", "k_proj", "v_proj", "out_proj"}
    (inputs, _), *_ = suite.labelled("depth", "val")
    assert suite.output("depth", suite.model, inputs).shape == (32, 24, 24, 1)
    assert [entry["step"] for entry, _ in kept_adapters(tmp_path, "siglip", 0, "depth", "adapters")] == [0, 2]
    siglip.load(tmp_path, 0, log=lines.append, progress=False, settings=few)
    assert len(lines) == 1 + len(vit.TASKS)


def test_masked_patches_do_not_reach_the_model():
    tower = siglip.new_tower(0)
    masked = torch.zeros(2, 36, dtype=torch.bool)
    masked[:, 5] = True
    pixels = torch.randn(2, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    changed = pixels.clone()
    changed[:, :, 0:4, 20:24] += 9
    with torch.no_grad():
        hidden = siglip.masked_features(tower, pixels, bool_masked_pos=masked)
        assert torch.equal(hidden, siglip.masked_features(tower, changed, bool_masked_pos=masked))
        shown = siglip.masked_features(tower, changed, bool_masked_pos=torch.zeros_like(masked))
    assert not torch.allclose(hidden, shown, atol=1e-2)


def test_labels_of_the_added_tasks(trained):
    (_, primary), *_ = trained.labelled("cls", "test")
    (_, count), *_ = trained.labelled("count", "test")
    (_, mask), *_ = trained.labelled("sal", "test")
    assert 0 <= primary.min() <= primary.max() <= 9
    assert mask.flatten(1).sum(1).min() > 0
    scenes = trained._scenes["test"]["shaded"]
    # What is seen of the primary digit is a digit of its class, and all there is where no other digit is shown.
    for digits, one, pixels in zip(scenes.digits, primary, mask.bool(), strict=True):
        assert (digits[pixels] == one + 1).all()
    alone = count == 0
    assert torch.equal(mask[alone].bool(), scenes.digits[alone] > 0)


@pytest.mark.parametrize("task", vit.TASKS)
def test_outputs_losses_and_measures_agree_in_shape(trained, task):
    (inputs, label), *_ = trained.labelled(task, "val")
    output = trained.output(task, trained.model, inputs)
    channels = vit.TASKS[task].channels
    assert output.shape == ((32, 24, 24, channels) if vit.TASKS[task].dense else (32, channels))
    assert trained.loss(task, output, label).shape == ()
    quality = trained.quality(task, output, label)
    assert quality.shape == (32,)
    if trained.tasks[task].metric in ("acc", "deg", "L1"):
        sign = -1 if trained.tasks[task].lower_is_better else 1
        assert quality.mean().item() == pytest.approx(sign * trained.measure(task, output, label), rel=1e-4)


def test_shared_forward_runs_once_per_input_and_leaves_no_trace(trained):
    calls = []
    hook = trained.model.embeddings.register_forward_hook(lambda *_: calls.append(1))
    try:
        with shared_forward(trained.model):
            for task in ("depth", "edge", "depth"):
                trained.output(task, trained.model, trained.labelled(task, "val")[0][0])
            assert "forward" in vars(trained.model)
            trained.output("count", trained.model, trained.labelled("count", "val")[0][0])
    finally:
        hook.remove()
    assert len(calls) == 2
    assert "forward" not in vars(trained.model)
