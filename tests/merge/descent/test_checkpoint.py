"""Interrupted and resumed runs end where an uninterrupted one does, to the bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from loop_cases import adapters_for, llama, text_batches, trajectory, values
from safetensors import safe_open
from safetensors.torch import save_file

from nsc_merge import merge
from nsc_merge.calibration.batches import Batch
from nsc_merge.methods.gradient.nsc_options import RECIPES

SETTINGS = {"steps": 40, "schedule": "cosine", "weight_decay": 0.1}
SCRIPT = """
import sys
import torch
from loop_cases import adapters_for, llama, text_batches, trajectory
torch.set_num_threads(1)
trajectory(llama(), adapters_for(llama()), text_batches(), steps=40, schedule="cosine", weight_decay=0.1,
           state_to=sys.argv[1], state_every=1)
"""


def whole(**options):
    return trajectory(llama(), adapters_for(llama()), text_batches(), **{**SETTINGS, **options})


def same_to_the_bit(first, second):
    assert first.coefficients == second.coefficients
    for one, other in zip(first.history, second.history, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


class Interrupting:
    """Batches that press Ctrl-C when a given one is asked for."""

    def __init__(self, batches: list[Batch], at: int) -> None:
        self.batches, self.at, self.count = batches, at, 0

    def __iter__(self):
        for batch in self.batches:
            self.count += 1
            if self.count == self.at:
                raise KeyboardInterrupt
            yield batch


def test_kill_at_a_random_moment_and_resume(tmp_path):
    state = tmp_path / "state.safetensors"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(state)],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state.exists()
    # The folder may hold the temporary file of the save that was cut off, and nothing else.
    assert all(path == state or path.name.startswith(f".{state.name}.") for path in tmp_path.iterdir())
    same_to_the_bit(whole(resume_from=state), whole())


def test_interrupt_saves_and_passes_on(tmp_path):
    state = tmp_path / "deep" / "state.safetensors"
    batches = text_batches()
    # The interrupt comes in the middle of a step, after the first task has drawn its batch.
    interrupted = {**batches, "b": Interrupting(batches["b"], at=24)}
    with pytest.raises(KeyboardInterrupt):
        trajectory(llama(), adapters_for(llama()), interrupted, **SETTINGS, state_to=state, state_every=1000)
    with safe_open(state, framework="pt") as file:
        assert '"step": 23' in file.metadata()["document"]
    resumed = whole(resume_from=state)
    same_to_the_bit(resumed, whole())
    assert [entry["step"] for entry in resumed.history] == list(range(40))


def test_resume_folds_in_the_same_steps(tmp_path):
    """Steps of few tokens, which are not folded, and of many, which are: the one that is resumed with may be either."""
    batches = {task: [*text_batches(1, tokens=2)[task], *text_batches(1)[task]] for task in ("a", "b", "c")}
    settings = {**SETTINGS, "steps": 6}
    plain = trajectory(llama(), adapters_for(llama()), batches, **settings)
    for at in (4, 5):
        state = tmp_path / str(at)
        with pytest.raises(KeyboardInterrupt):
            interrupted = {**batches, "b": Interrupting(batches["b"], at=at)}
            trajectory(llama(), adapters_for(llama()), interrupted, **settings, state_to=state)
        same_to_the_bit(trajectory(llama(), adapters_for(llama()), batches, **settings, resume_from=state), plain)


def test_resume_replays_iterables_that_shuffle(tmp_path):
    class Shuffled:
        def __init__(self, batches):
            self.batches = batches

        def __iter__(self):
            return iter([self.batches[i] for i in torch.randperm(len(self.batches))])

    def calibration():
        return {task: Shuffled(batches) for task, batches in text_batches(5).items()}

    state = tmp_path / "state"
    broken = {**calibration(), "a": Interrupting(text_batches(5)["a"], at=14)}
    plain = {**calibration(), "a": text_batches(5)["a"]}
    with pytest.raises(KeyboardInterrupt):
        trajectory(llama(), adapters_for(llama()), broken, state_to=state, **SETTINGS)
    resumed = trajectory(llama(), adapters_for(llama()), plain, resume_from=state, **SETTINGS)
    same_to_the_bit(resumed, trajectory(llama(), adapters_for(llama()), plain, **SETTINGS))


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_a_finished_state_returns_the_same_at_once(tmp_path, optimizer):
    state = tmp_path / "state"
    done = whole(state_to=state, optimizer=optimizer, steps=5, batch_tasks=None)
    again = whole(resume_from=state, optimizer=optimizer, steps=5, batch_tasks=None)
    same_to_the_bit(done, again)
    assert (values(done) != 0.4).any()


def test_a_state_belongs_to_its_sources(tmp_path):
    state = tmp_path / "state"
    done = whole(state_to=state, steps=2, state_of={"base": {"file": "x"}, "lr": 9})
    assert not {"state_to", "state_of", "resume_from"} & set(done.options)
    same_to_the_bit(whole(resume_from=state, steps=2, state_of={"base": {"file": "x"}, "lr": 9}), done)
    with pytest.raises(ValueError, match="saved with base.file='x', and this is base.file='y'"):
        whole(resume_from=state, steps=2, state_of={"base": {"file": "y"}, "lr": 9})
    with pytest.raises(ValueError, match="saved with base={'file': 'x'}, and this is base=None"):
        whole(resume_from=state, steps=2)
    for bad in (5, {"path": tmp_path}):
        with pytest.raises(ValueError, match="state_of: expected a mapping that JSON can hold, found"):
            whole(state_to=state, steps=2, state_of=bad)


def test_a_state_of_something_else_is_refused(tmp_path):
    state = tmp_path / "state"
    whole(state_to=state, steps=2)
    with pytest.raises(ValueError, match=r"resume_from: .*saved with lr=0\.01, and this is lr=0\.02"):
        whole(resume_from=state, steps=2, lr=0.02)
    adapters = adapters_for(llama())
    next(iter(adapters["a"].factors.values())).B.mul_(2)
    with pytest.raises(ValueError, match="resume_from: .*saved with adapters.a="):
        trajectory(llama(), adapters, text_batches(), **{**SETTINGS, "steps": 2}, resume_from=state)
    swapped = dict(reversed(adapters_for(llama()).items()))
    with pytest.raises(ValueError, match=r"resume_from: .*saved with tasks=\['a', 'b'.*, and this is tasks=\['"):
        trajectory(llama(), swapped, text_batches(), **{**SETTINGS, "steps": 2}, resume_from=state)
    with pytest.raises(FileNotFoundError, match="resume_from: there is no file"):
        whole(resume_from=tmp_path / "missing")
    content = state.read_bytes()
    state.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="resume_from: .* is not valid safetensors"):
        whole(resume_from=state, steps=2)
    nsc_file = tmp_path / "other"
    save_file({"x": torch.zeros(1)}, nsc_file)
    with pytest.raises(ValueError, match=r"resume_from: .*expected format nsc_merge\.state version 1"):
        whole(resume_from=nsc_file, steps=2)


@pytest.mark.parametrize(("schedule", "share"), [("constant", 1), ("cosine", 1 / 4), ("linear", 1 / 3)])
def test_the_last_of_three_steps_takes_the_share_that_the_schedule_says(schedule, share):
    settings = {"lr": 1e-2, "weight_decay": 0.0, "schedule": schedule, "steps": 3}
    result = trajectory(llama(), adapters_for(llama()), text_batches(1), **settings)
    # As long as a gradient hardly changes, Adam moves its coefficient by the learning rate.
    last = values(result).max().item() - result.history[-1]["lambda_max"]
    assert last == pytest.approx(share * 1e-2, rel=0.1)


def test_early_stop_ends_on_a_plateau_and_not_before(tmp_path):
    batches = text_batches(1)
    still = trajectory(llama(), adapters_for(llama()), batches, steps=60, lr=0.0, early_stop=0.0)
    assert len(still.history) == 60
    still = trajectory(llama(), adapters_for(llama()), batches, steps=60, lr=0.0, early_stop=1e-6)
    assert len(still.history) == 20
    settings = {"lr": 0.0, "early_stop": 1e-6, "steps": 60}
    state = tmp_path / "state"
    for kept in ({"state_to": state}, {"resume_from": state}):
        # A run that had stopped stays stopped.
        stopped = trajectory(llama(), adapters_for(llama()), batches, **settings, **kept)
        assert len(stopped.history) == 20
    falling = trajectory(llama(), adapters_for(llama()), batches, steps=40, early_stop=1e-6)
    assert len(falling.history) == 40


@pytest.mark.parametrize("policy", ["init", "tie_previous", "zero"])
def test_dead_coefficients_follow_the_policy(policy):
    model = llama()
    adapters = adapters_for(model)
    result = trajectory(model, adapters, text_batches(), score_blocks=[2], dead=policy)
    blocks = {path: int(path.split(".")[2]) for path in result.coefficients}
    assert set(result.dead) == {path for path, block in blocks.items() if block >= 2}
    for path, tasks in result.dead.items():
        name = path.rsplit(".", 1)[-1]
        live = result.coefficients[f"model.layers.1.self_attn.{name}"]
        for task in tasks:
            expected = {"init": 0.4, "tie_previous": live[task], "zero": 0.0}[policy]
            assert result.coefficients[path][task] == pytest.approx(expected)
            assert live[task] != pytest.approx(0.4, abs=1e-4)
    absent = [path for path, block in blocks.items() if block == 0]
    assert all(result.coefficients[path]["c"] == 0 for path in absent)


def test_dead_coefficients_are_reported_before_the_first_update(caplog):
    with caplog.at_level("INFO", logger="nsc_merge"):
        trajectory(llama(), adapters_for(llama()), text_batches(), score_blocks=[2])
    assert "nothing measured depends on, in 4 of 8 modules: model.layers.2.self_attn.q_proj" in caplog.text


@pytest.mark.parametrize("recipe", ["llm", "vlm"])
def test_recipes_of_language_models(recipe):
    assert RECIPES[recipe] == {"optimizer": "adamw", "lr": 3e-4, "weight_decay": 0.01, "steps": 500}
    result = merge(llama(), adapters_for(llama()), text_batches(1), recipe=recipe, steps=1, progress=False)
    assert (result.options["lr"], result.options["recipe"]) == (3e-4, recipe)
