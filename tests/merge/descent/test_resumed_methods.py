"""Every method that learns goes on from its state as if it had never stopped, to the bit."""

from __future__ import annotations

import functools

import pytest
import torch
from loop_cases import TASKS, adapters_for, llama, text_batches
from safetensors import safe_open
from safetensors.torch import save_file

from nsc_merge import merge
from nsc_merge.methods import METHODS
from nsc_merge.methods.gradient import task_models

SETTINGS = {"lr": 1e-2, "steps": 16, "schedule": "cosine", "progress": False}


def middle(model, batch):
    """Values, whose variance the method has to know."""
    return model(**batch).logits[:, -1, :3]


VALUES = {"outputs": dict.fromkeys(TASKS, middle), "likelihood": "gaussian"}
CASES = {
    "adamerging": ("adamerging", {"clamp": (0.0, 0.45)}),
    "adamerging without a task": ("adamerging", {"outputs": dict.fromkeys(TASKS[:2], middle)}),
    "match": ("match", {"init": "match", "optimizer": "adam"}),
    "match, held out": ("match", {"hold_out": 1, "pull": 0.1, "ratio_weight": 0.1}),
    # The best coefficients are those of before the interruption.
    "match, best at first": ("match", {"hold_out": 1, "lr": 1.0}),
    "match, warm-up with dead": ("match", {"features": ["model.layers.1"], "warm_up": 12}),
    "distill": ("distill", {}),
    "distill, one for a task": ("distill", {"share": "task"}),
    "distill, warm-up": ("distill", {"warm_up": 8}),
    "distill along answers": ("distill", {"new_tokens": 3}),
    "distill of values": ("distill", VALUES),
    "distill with RegMean's terms": ("distill", {"regmean": {"batches": 4}}),
}


class Stopped(Exception):
    """What the machine says as it goes down."""


class Batches:
    """Batches that are drawn anew at every turn, so that none is met twice; the machine goes down at one of them."""

    def __init__(self, batches, down_at=None, anew=False):
        self.batches, self.down_at, self.anew, self.count = batches, down_at, anew, 0

    def __iter__(self):
        for batch in self.batches:
            self.count += 1
            if self.count == self.down_at:
                raise Stopped
            yield dict(batch) if self.anew else batch


def calibration(down_at=None, anew=False):
    kept = text_batches(5)
    # Five of all tasks' own, so that batches come back in another order than that of a step.
    return {**kept, "b": Batches(kept["b"], down_at, anew)}


def run(name, batches, **options):
    method, own = CASES[name]
    return merge(llama(), adapters_for(llama()), batches, method, **{**SETTINGS, **own, **options})


@functools.cache
def undisturbed(name):
    """What a run of the case comes to that nothing stopped."""
    return run(name, calibration())


def same_to_the_bit(first, second):
    assert first.coefficients == second.coefficients
    assert first.factors.keys() == second.factors.keys()
    for path, factor in first.factors.items():
        assert torch.equal(factor.A, second.factors[path].A)
        assert torch.equal(factor.B, second.factors[path].B)
    assert (first.dead, first.objective, first.options) == (second.dead, second.objective, second.options)
    for one, other in zip(first.history, second.history, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_every_method_that_learns_is_here():
    tried = {"nsc", *(method for method, _ in CASES.values())}
    assert {name for name, method in METHODS.items() if method.resumable} == tried
    assert all(method.resumable == ("steps" in method.option_names) for method in METHODS.values())


@pytest.mark.parametrize("down_at", [10, 13])
@pytest.mark.parametrize("name", CASES)
def test_a_run_whose_machine_went_down_goes_on(tmp_path, name, down_at):
    """Saved every fourth step, and lost since."""
    state = tmp_path / "state.safetensors"
    whole = undisturbed(name)
    assert not {"state_to", "state_every", "state_of", "resume_from"} & set(whole.options)
    with pytest.raises(Stopped):
        run(name, calibration(down_at), state_to=state, state_every=4)
    resumed = run(name, calibration(), resume_from=state)
    assert [entry["step"] for entry in resumed.history] == list(range(len(whole.history)))
    same_to_the_bit(resumed, whole)


@pytest.mark.parametrize("name", ["distill of values", "match, best at first"])
def test_a_finished_run_returns_the_same_at_once(tmp_path, name):
    state = tmp_path / "state.safetensors"
    done = run(name, calibration(), state_to=state)
    same_to_the_bit(run(name, calibration(), resume_from=state), done)


@pytest.mark.parametrize("anew", [False, True])
def test_variances_are_of_every_batch_that_was_seen(tmp_path, monkeypatch, anew):
    """Also where what the tasks' own models gave does not stay, and is found and counted once more."""
    monkeypatch.setattr(task_models, "LIMIT", 50)
    state, name = tmp_path / "state.safetensors", "distill of values"
    whole = run(name, calibration(anew=anew))
    with pytest.raises(Stopped):
        run(name, calibration(13, anew), state_to=state, state_every=1)
    same_to_the_bit(run(name, calibration(anew=anew), resume_from=state), whole)


def test_the_state_of_another_method_is_refused(tmp_path):
    state = tmp_path / "state.safetensors"
    run("distill", calibration(), state_to=state, steps=2)
    for other in ("match", "adamerging"):
        with pytest.raises(ValueError, match=f"saved with method='distill', and this is method='{other}'"):
            run(other, calibration(), resume_from=state, steps=2)
    with pytest.raises(ValueError, match="saved with method='distill', and this is method='nsc'"):
        merge(llama(), adapters_for(llama()), calibration(), resume_from=state, steps=2)
    merge(llama(), adapters_for(llama()), calibration(), state_to=state, steps=2, progress=False)
    with pytest.raises(ValueError, match="saved with method='nsc', and this is method='distill'"):
        run("distill", calibration(), resume_from=state, steps=2)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"positions": "all"}, "positions=None, and this is positions='all'"),
        ({"new_tokens": 2}, "new_tokens=1, and this is new_tokens=2"),
        ({"state_of": {"base": "x"}}, "saved with base=None, and this is base='x'"),
    ],
)
def test_a_state_of_other_options_is_refused(tmp_path, change, named):
    state = tmp_path / "state.safetensors"
    run("distill", calibration(), state_to=state, steps=2)
    with pytest.raises(ValueError, match=named):
        run("distill", calibration(), resume_from=state, steps=2, **change)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"objective.best": None}, "expected tensors"),
        ({"objective.best_loss": torch.zeros(2, dtype=torch.float64)}, r"objective.best_loss: expected .*\[\], found"),
        ({"objective.best_loss": torch.tensor(0.5)}, "objective.best_loss: expected torch.float64"),
        ({"objective.best": torch.zeros(1, 3)}, "objective.best: expected torch.float32"),
        ({"objective.best_loss": torch.tensor(torch.nan, dtype=torch.float64)}, "objective.best_loss: expected finite"),
        ({"objective.more": torch.zeros(1)}, "expected tensors"),
    ],
)
def test_a_damaged_memory_is_refused(tmp_path, change, named):
    state, name = tmp_path / "state.safetensors", "match, held out"
    run(name, calibration(), state_to=state, steps=2)
    with safe_open(state, framework="pt") as content:
        tensors = {one: content.get_tensor(one) for one in content.keys()}  # noqa: SIM118
        metadata = content.metadata()
    save_file({one: value for one, value in {**tensors, **change}.items() if value is not None}, state, metadata)
    with pytest.raises(ValueError, match=f"is damaged: {named}"):
        run(name, calibration(), resume_from=state, steps=2)
