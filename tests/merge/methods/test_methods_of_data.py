"""What all methods that take calibration data have in common."""

from __future__ import annotations

import pytest
import torch

import nsc_merge


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
