"""Adapters whose null-space ratios say nothing are noted."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from loop_cases import TASKS, adapters_for, llama, text_batches, trajectory
from safetensors.torch import save_file
from torch import nn
from zoo import build, text, write_adapter

from nsc_merge.adapters.algebra.row_spaces import signal_notes
from nsc_merge.commands.main import main

SCORED = [f"model.layers.{block}.self_attn.v_proj" for block in (2, 3)]


def with_rows(adapter, rows):
    """``adapter`` with the rows of A replaced at every module; B keeps what it is."""
    factors = {
        path: replace(factor, A=rows(path, factor), B=factor.B[:, : len(rows(path, factor))])
        for path, factor in adapter.factors.items()
    }
    return replace(adapter, factors=factors)


def shared_by(adapters, tasks):
    """VeRA: a shared A of rank 2 whose rows every task scales by numbers of its own."""
    generator = torch.Generator().manual_seed(3)
    common = {path: torch.randn(2, factor.A.shape[1], generator=generator) for path, factor in factors_of(adapters)}
    scales = {task: torch.rand(2, 1, generator=generator) + 0.5 for task in tasks}
    return {
        task: with_rows(adapter, lambda path, _, task=task: scales[task] * common[path]) if task in tasks else adapter
        for task, adapter in adapters.items()
    }


def factors_of(adapters):
    return adapters["a"].factors.items()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shared_row_space_is_noted_and_does_make_the_ratios_coincide(dtype, caplog):
    model = llama()
    adapters = shared_by(adapters_for(model), TASKS)
    rounded = {
        task: with_rows(adapter, lambda _, factor: factor.A.to(dtype).float()) for task, adapter in adapters.items()
    }
    (note,) = signal_notes(rounded, SCORED)
    assert note.startswith("a, b, c: one row space of A at every measured module")
    assert "nothing ties a coefficient to its own task" in note
    batch = text_batches(1)["a"]
    result = trajectory(model, rounded, dict.fromkeys(TASKS, batch), steps=1)
    assert note in caplog.text
    assert result.notes == [note]
    omega = result.history[0]["omega"]
    assert omega["a"] == pytest.approx(omega["b"], abs=1e-4 if dtype is torch.bfloat16 else 1e-6)


def test_only_those_that_share_are_named():
    adapters = shared_by(adapters_for(llama()), ["a", "c"])
    (note,) = signal_notes(adapters, SCORED)
    assert note.startswith("a, c: one row space")
    assert "nothing among these ties" in note


def test_sharing_at_one_module_but_not_at_another_tells_tasks_apart():
    adapters = shared_by(adapters_for(llama()), TASKS)
    own = adapters["b"].factors[SCORED[1]]
    adapters["b"].factors[SCORED[1]] = replace(own, A=own.A.flip(1))
    (note,) = signal_notes(adapters, SCORED)
    assert note.startswith("a, c: one row space")
    # Nor do tasks that are measured at different modules share everything.
    del adapters["c"].factors[SCORED[1]]
    assert not signal_notes(adapters, SCORED)


def test_plain_adapters_need_no_note(caplog):
    model = llama()
    adapters = adapters_for(model)
    assert not signal_notes(adapters, SCORED)
    trajectory(model, adapters, text_batches(), steps=1)
    assert "null-space" not in caplog.text


def test_full_rank_is_noted_where_it_is(caplog):
    model = llama()
    adapters = adapters_for(model)
    wide = replace(adapters["a"].factors[SCORED[0]], A=nn.init.orthogonal_(torch.empty(32, 32)), B=torch.ones(32, 32))
    adapters["a"].factors[SCORED[0]] = wide
    (note,) = signal_notes(adapters, SCORED)
    assert note.startswith("a: A has the full rank 32 at 1 of 2 measured modules")
    adapters["a"].factors[SCORED[1]] = wide
    (note,) = signal_notes(adapters, SCORED)
    assert note.startswith("a: A has the full rank 32 at every measured module, where its null-space ratio is 0")
    result = trajectory(model, adapters, text_batches(), steps=1, score_blocks=[2, 3])
    assert note in caplog.text
    assert result.history[0]["omega"]["a"] == pytest.approx(0, abs=2e-3)


def test_many_rows_of_lower_rank_are_not_full():
    adapters = adapters_for(llama())
    factor = adapters["a"].factors[SCORED[0]]
    narrow = replace(factor, A=torch.randn(32, 3) @ torch.randn(3, 32), B=torch.ones(32, 32))
    adapters["a"].factors[SCORED[0]] = narrow
    assert not signal_notes(adapters, SCORED)


def test_the_notes_are_in_the_model_card_and_in_the_plan(tmp_path, capsys):
    model = build("llama")
    model.save_pretrained(tmp_path / "base")
    # The same seed, and so the same A and B.
    for task in ("one", "other"):
        write_adapter(model, tmp_path / task, 1, r=2, target_modules=["q_proj", "v_proj"])
        save_file(text(3), tmp_path / f"{task}.safetensors")
    recipe = {
        "model": "base",
        "adapters": {task: task for task in ("one", "other")},
        "calibration": {task: f"{task}.safetensors" for task in ("one", "other")},
        "options": {"steps": 2},
        "output": {"dir": "out", "formats": ["coefficients"]},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(["run", str(tmp_path / "recipe.yaml"), "--dry-run", "--json"]) == 0
    (remark,) = json.loads(capsys.readouterr().out)["remarks"]
    assert remark.startswith("one, other: one row space of A at every measured module")
    assert main(["run", str(tmp_path / "recipe.yaml")]) == 0
    assert remark in (tmp_path / "out" / "README.md").read_text()
