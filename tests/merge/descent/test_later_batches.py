"""Coefficients that only later batches depend on, as those of experts that the first ones send nothing to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nsc_merge import Adapter, Factor, merge

TASKS = ("a", "b")
PATHS = ("blocks.0.left", "blocks.0.right", "blocks.1.left")
SETTINGS = {"steps": 6, "optimizer": "adam", "weight_decay": 0.0, "lr": 1e-2, "progress": False}
METHODS = {
    "nsc": {"score_modules": ["left"], "score_blocks": [1]},
    "match": {"features": ["blocks.1"]},
    "warm-up": {"features": ["blocks.1"], "warm_up": 5},
}


class Block(nn.Module):
    """Two experts; a row goes to the right one where its first number is positive."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, z, right):
        return z + torch.where(right[:, None], self.right(z) if right.any() else 0.0, self.left(z)).tanh()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, z):
        return self.blocks[1](self.blocks[0](z, z[:, 0] > 0), torch.zeros(len(z), dtype=torch.bool))


def problem():
    torch.manual_seed(0)
    model = Model()
    adapters = {
        task: Adapter(task, {path: Factor(torch.randn(2, 8), 0.3 * torch.randn(8, 2), 1.0) for path in PATHS})
        for task in TASKS
    }
    rows = torch.randn(len(TASKS), 6, 5, 8)
    # The first three steps send nothing to the right.
    rows[:, :3, :, 0] = -rows[:, :3, :, 0].abs()
    rows[:, 3:, :2, 0] = 1.0
    return model, adapters, {task: [{"z": one} for one in rows[number]] for number, task in enumerate(TASKS)}


def run(name, **options):
    return merge(*problem(), method="nsc" if name == "nsc" else "match", **{**SETTINGS, **METHODS[name], **options})


@pytest.mark.parametrize("name", METHODS)
def test_what_only_later_batches_depend_on_is_learnt_from_then_on(name):
    found, early = run(name), run(name, steps=3)
    assert "blocks.0.right" in early.dead
    assert early.coefficients["blocks.0.right"] == pytest.approx(dict.fromkeys(TASKS, 0.4))
    assert "blocks.0.right" not in found.dead
    for task in TASKS:
        assert abs(found.coefficients["blocks.0.right"][task] - 0.4) > 1e-3
    # NSC measures in front of the last linear, which nothing depends on for good.
    assert list(found.dead) == (["blocks.1.left"] if name == "nsc" else [])


@pytest.mark.parametrize("name", METHODS)
def test_a_run_goes_on_from_before_and_after_that_to_the_bit(name, tmp_path):
    whole, state = run(name), tmp_path / "state.safetensors"
    for stop in (2, 4):

        class Stopped(Exception):
            pass

        def drawn(batches, stop=stop, stopped=Stopped):
            yield from batches[:stop]
            raise stopped

        model, adapters, batches = problem()
        with pytest.raises(Stopped):
            merge(
                model, adapters, {**batches, "a": drawn(batches["a"])}, "nsc" if name == "nsc" else "match",
                **SETTINGS, **METHODS[name], state_to=state, state_every=1,
            )
        resumed = run(name, resume_from=state)
        assert (resumed.coefficients, resumed.dead) == (whole.coefficients, whole.dead)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.score = nn.Linear(1, 2)

    def forward(self, z):
        return self.score(z)


def test_distances_that_cancel_at_first_are_no_reason_to_refuse():
    """Between what two tasks predict, the sum of total variations is flat: it is lower where later inputs say so."""
    torch.manual_seed(0)
    model = Classifier()
    ways = {"a": 1.0, "b": -0.5}
    adapters = {
        task: Adapter(task, {"score": Factor(torch.ones(1, 1), torch.tensor([[way], [-way]]), 1.0)})
        for task, way in ways.items()
    }
    outputs = {task: lambda model, batch: model(**batch) for task in ways}
    same = {"z": torch.ones(3, 1)}
    later = {"a": [same, same, {"z": torch.ones(3, 1)}], "b": [same, same, {"z": torch.zeros(3, 1)}]}
    options = {"outputs": outputs, **SETTINGS, "steps": 2}
    still = merge(model, adapters, later, "distill", **options)
    assert still.dead == {"score": list(ways)}
    assert still.coefficients["score"] == pytest.approx(dict.fromkeys(ways, 0.4))
    moved = merge(model, adapters, later, "distill", **{**options, "steps": 3})
    assert moved.dead == {}
    assert moved.coefficients["score"]["a"] > 0.405
