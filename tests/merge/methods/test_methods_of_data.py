"""What all methods that take calibration data have in common."""

from __future__ import annotations

import pytest
import torch
from zoo import build, write_adapter

import nsc_merge
from nsc_merge.calibration.batches import naming_tasks
from nsc_merge.utils.errors import UsageError
from nsc_merge.utils.option_checks import check_number


@pytest.mark.parametrize("method", ["adamerging", "regmean", "fisher", "match"])
def test_same_seed_same_result_and_model_left_alone(model, folders, calibration, outputs, method):
    options = {
        "adamerging": {"outputs": outputs, "steps": 3, "progress": False},
        "regmean": {"batches": 1},
        "fisher": {"outputs": outputs, "batches": 1, "exact": 0},
        "match": {"steps": 3, "progress": False},
    }[method]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    one, two = (nsc_merge.merge(model, folders, calibration, method, **options) for _ in range(2))
    for path in one.paths:
        assert torch.equal(one.delta(path), two.delta(path))
    assert flags == [p.requires_grad for p in model.parameters()]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("method", ["adamerging", "regmean", "fisher", "match"])
@pytest.mark.parametrize("bad", [None, {}, "partial", "empty"])
def test_calibration_errors(model, folders, calibration, outputs, method, bad):
    if bad == "partial":
        bad = {"plain": calibration["plain"]}
    if bad == "empty":
        bad = {**calibration, "mixed": []}
    options = {"outputs": outputs} if method in ("adamerging", "fisher") else {}
    with pytest.raises(ValueError, match="calibration"):
        nsc_merge.merge(model, folders, bad, method, **options)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("nsc", {"batch_tasks": True}),
        ("nsc", {"batch_tasks": None}),
        ("match", {}),
        ("match", {"init": "match"}),
        ("distill", {}),
        ("adamerging", {}),
        ("regmean", {}),
        ("fisher", {}),
    ],
)
def test_inputs_that_the_model_refuses_are_told_with_the_task_and_their_shapes(tmp_path, method, options):
    model = build("vit")
    lora = {"r": 2, "target_modules": ["q_proj"]}
    tasks = {task: write_adapter(model, tmp_path / task, seed, **lora) for seed, task in enumerate("ab")}
    batches = {"a": [{"pixel_values": torch.ones(2, 3, 8, 8)}], "b": [{"pixel_values": torch.ones(2, 3, 12, 12)}]}
    steps = {} if method in ("regmean", "fisher") else {"steps": 2, "progress": False}
    words = r"^calibration: .*'b' of pixel_values \[2, 3, 12, 12\]: Input image size \(12\*12\)"
    with pytest.raises(ValueError, match=words):
        nsc_merge.merge(model, tasks, batches, method, **steps, **options)


def test_batches_held_out_are_told_by_their_own_shapes(tmp_path):
    """They are measured within a step, on the batches of which nothing is wrong."""
    model = build("vit")
    folder = write_adapter(model, tmp_path / "a", 1, r=2, target_modules=["q_proj"])
    batches = [{"pixel_values": torch.ones(2, 3, side, side)} for side in (12, 8)]
    words = r"^calibration: .*'a' of pixel_values \[2, 3, 12, 12\]: Input image size \(12\*12\)"
    with pytest.raises(ValueError, match=words):
        nsc_merge.merge(model, {"a": folder}, {"a": batches}, "match", hold_out=1, steps=2, progress=False)


def test_what_is_refused_here_is_told_as_it_is():
    drawn = {"a": {"input_ids": torch.ones(2, 3)}, "b": {"input_ids": torch.ones(4, 3)}}
    drawn["c"] = drawn["a"]
    with pytest.raises(ValueError, match=r"^init: expected"), naming_tasks(drawn):
        check_number("init", "none")
    words = r"^calibration: in forwards of the batches of 'a', 'c' of input_ids \[2, 3\]; 'b' of input_ids \[4, 3\]: 3$"
    with pytest.raises(IndexError, match=words) as caught, naming_tasks(drawn):
        raise IndexError(3)
    assert isinstance(caught.value.__cause__, IndexError)
    with pytest.raises(UsageError, match=r"^of its own kind$"), naming_tasks(drawn):
        raise UsageError("of its own kind")
