"""What is computed from the adapters is not rounded by a torch.autocast around the merge; gradients are to be had in
torch.inference_mode.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from data_cases import heads, pooled
from factor_cases import NEED_EQUAL_RANKS

import nsc_merge
from nsc_kernels import entries
from nsc_merge.methods import METHODS

WITHOUT_DATA = [name for name, method in METHODS.items() if not method.needs and name != "ensemble"]


def narrow():
    return torch.autocast("cpu", torch.bfloat16)


def updates(result):
    each = {task: result.for_task(task) for task in result.adapters} if result.per_task else {"": result}
    return {(task, path): one.delta(path) for task, one in each.items() for path in one.paths}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "without the library"])
@pytest.mark.parametrize("method", WITHOUT_DATA)
def test_autocast_rounds_no_update(model, folders, method, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(entries, "unavailable", lambda: "not here")
    adapters = {task: nsc_merge.load_adapter(folder, task) for task, folder in folders.items()}
    if method in NEED_EQUAL_RANKS:
        del adapters["mixed"]
    expected = updates(nsc_merge.merge(model, adapters, method=method))
    with narrow():
        found = updates(nsc_merge.merge(model, adapters, method=method))
    assert_same(found, expected)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.updates])
def test_autocast_where_factors_are_taken(method):
    """Of updates given as matrices, and where the autocast begins after the call."""
    generator = torch.Generator().manual_seed(0)
    drawn = {task: torch.randn(9, 3, generator=generator) @ torch.randn(3, 12, generator=generator) for task in "ab"}
    tasks = {task: {"q": matrix, "k": (matrix[:3], torch.eye(3), 0.5)} for task, matrix in drawn.items()}

    def merged():
        with pytest.warns(UserWarning, match="is factored") if warns else contextlib.nullcontext():
            return nsc_merge.merge_factors(tasks, method)

    chosen = METHODS[method]
    warns = chosen.of_factors_with(chosen.resolved({}, list(tasks)))
    expected = {path: factor.delta() for path, factor in merged()}
    given = merged()
    with narrow():
        found = {path: factor.delta() for path, factor in given}
        again = {path: factor.delta() for path, factor in merged()}
    assert_same(found, expected)
    assert_same(again, expected)


@pytest.mark.parametrize("mode", [narrow, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("preset", ["canonical", "mergelm"])
def test_fisher_whatever_is_on_around_it(model, folders, calibration, preset, mode):
    """Of a model in float64, whose forward autocast leaves alone."""
    model = model.double()
    adapters = {task: nsc_merge.load_adapter(folder, task) for task, folder in folders.items()}
    wide = {task: head.double() for task, head in heads().items()}
    outputs = {task: lambda model, batch, head=head: pooled(model, batch) @ head for task, head in wide.items()}
    for batch in [one for own in calibration.values() for one in own]:
        batch["pixel_values"] = batch["pixel_values"].double()

    def merged():
        settings = {"preset": preset, "batches": 2, "outputs": outputs}
        return updates(nsc_merge.merge(model, adapters, calibration, "fisher", **settings))

    expected = merged()
    with mode():
        assert_same(merged(), expected)
