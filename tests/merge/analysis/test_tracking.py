"""Null-space ratios over training."""

from __future__ import annotations

import itertools
import json
import math
import shutil

import pytest
import torch
from analysis_cases import seen
from safetensors.torch import save_file
from zoo import write_adapter

import nsc_merge
from nsc_merge.adapters import load_adapter
from nsc_merge.analysis import Tracking, find_checkpoints, per_sample_ratios, read_log, track
from nsc_merge.analysis.rank_correlation import rank_correlation
from nsc_merge.commands.main import main


@pytest.fixture
def training(tmp_path, llama):
    """Checkpoints whose A turns from random towards what the modules see, with a log."""
    model, adapters, batches = llama
    final = load_adapter(adapters["a"], "a")
    tensors = {}
    for path, factor in final.factors.items():
        # As good a plane of rank 4 as there is for these inputs.
        z = torch.cat(seen(model, path, batches)).flatten(0, 1)
        tensors[path] = torch.linalg.svd(z, full_matrices=False).Vh[:4], factor.A
    folder = tmp_path / "run"
    for step in (0, 5, 10, 20):
        shutil.copytree(adapters["a"], folder / f"checkpoint-{step}")
        weights = {}
        for path, (best, start) in tensors.items():
            mixed = (1 - step / 20) * start + step / 20 * best
            weights[f"base_model.model.{path}.lora_A.weight"] = mixed.contiguous()
            weights[f"base_model.model.{path}.lora_B.weight"] = torch.zeros(final.factors[path].B.shape)
        save_file(weights, folder / f"checkpoint-{step}" / "adapter_model.safetensors")
    entries = [
        {"step": step, "loss": loss} for step, loss in ((0, 4.0), (5, 3.0), (10, 2.5), (20, 2.0), (30, 9.0))
    ]
    (folder / "steps.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return model, folder, batches


def test_tracking_falls_as_an_adapter_turns_towards_its_inputs(training):
    model, folder, batches = training
    tracking = track(
        model, find_checkpoints(folder), batches, columns=read_log(folder / "steps.jsonl"), progress=False
    )
    assert tracking.steps == [0, 5, 10, 20]
    mean = tracking.mean()
    assert mean == sorted(mean, reverse=True)
    assert tracking.random == pytest.approx(math.sqrt(1 - 4 / 32))
    assert set(tracking.by_block()) == {"0", "1", "2"}
    assert set(tracking.by_name()) == {"q_proj", "v_proj"}
    blocks = tracking.by_block().values()
    assert mean == pytest.approx([sum(values) / 3 for values in zip(*blocks, strict=True)])
    found = tracking.correlations("loss")
    assert (found["all"], found["steps"]) == (1.0, 4)
    losses, ratios = (
        [-1.0, -0.5, -0.5],
        [after - before for before, after in itertools.pairwise(mean)],
    )
    assert found["changes"] == pytest.approx(rank_correlation(losses, ratios))
    with pytest.raises(ValueError, match=r"column: expected one of \['loss'\], found 'metric'"):
        tracking.correlations("metric")


def test_tracking_on_the_command_line(training, tmp_path, capsys):
    model, folder, batches = training
    model.save_pretrained(tmp_path / "base")
    save_file(
        {name: torch.cat([b[name] for b in batches]) for name in batches[0]}, tmp_path / "inputs.safetensors"
    )
    arguments = ["--model", str(tmp_path / "base"), "--inputs", str(tmp_path / "inputs.safetensors")]
    assert (
        main(["analyse", "tracking", str(folder), *arguments, "--out", str(tmp_path / "out"), "--json"]) == 0
    )
    document = json.loads(capsys.readouterr().out)
    expected = track(model, find_checkpoints(folder), batches, progress=False)
    assert document["mean"] == pytest.approx(expected.mean(), rel=1e-5)
    assert document["correlations"]["loss"]["all"] == 1.0
    assert json.loads((tmp_path / "out" / "tracking.json").read_text()) == document
    assert (tmp_path / "out" / "tracking.png").stat().st_size > 10_000
    assert (
        main(["analyse", "tracking", str(folder), *arguments, "--modules", "v_proj", "--blocks", "1,2"]) == 0
    )
    shown = capsys.readouterr().out
    assert "4 checkpoints, steps 0 to 20, 2 modules" in shown
    assert "rho with loss over 4 steps  all +1.00" in shown
    for wrong, status, message in (
        (["--column", "metric"], 2, "--column: expected some of ['loss'], found 'metric'"),
        (["--modules", "up_proj"], 2, "--modules: expected paths or some of"),
        (["--blocks", "7"], 2, "--blocks: expected 1 to 3 last blocks, found 7"),
        (["--inputs", "nowhere"], 1, "--inputs: nowhere is missing"),
    ):
        assert main(["analyse", "tracking", str(folder), *arguments, *wrong]) == status
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert main(["analyse", "tracking", str(tmp_path / "base"), *arguments]) == 1
    assert "expected PEFT folders whose names end in the step" in capsys.readouterr().err


def test_logs_are_read_and_wrong_ones_refused(tmp_path):
    state = {
        "log_history": [
            {"step": 5, "loss": 2, "epoch": 0.1},
            {"step": 5, "eval_loss": 1.5},
            {"step": 9, "note": "x"},
        ]
    }
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    expected = {"loss": {5: 2.0}, "epoch": {5: 0.1}, "eval_loss": {5: 1.5}}
    assert read_log(tmp_path / "trainer_state.json") == expected
    for text in ("{}", "[1]", '{"loss": 1}', "nonsense", ""):
        (tmp_path / "log.jsonl").write_text(text)
        with pytest.raises(ValueError, match="log: .*expected"):
            read_log(tmp_path / "log.jsonl")


def test_a_step_whose_loss_is_no_number_is_a_gap(training, tmp_path, capsys):
    """One overflow in a log of many steps leaves a correlation of the others, and a constant column has none."""
    steps, omega = [0, 5, 10, 15], [0.9, 0.7, 0.8, 0.6]
    columns = {"loss": {0: 4.0, 5: math.nan, 10: 3.0, 15: 2.0}, "lr": dict.fromkeys(steps, 1.0)}
    found = Tracking(steps, {"layers.0.q": omega}, 0.9, columns).correlations("loss")
    assert (found["all"], found["steps"]) == (pytest.approx(1), 3)
    model, folder, batches = training
    model.save_pretrained(tmp_path / "base")
    save_file(batches[0], tmp_path / "inputs.safetensors")
    entries = [{"step": step, "loss": loss, "lr": 1.0} for step, loss in ((0, 4.0), (5, math.nan), (10, 2), (20, 1))]
    (folder / "steps.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    arguments = ["--model", str(tmp_path / "base"), "--inputs", str(tmp_path / "inputs.safetensors")]
    assert main(["analyse", "tracking", str(folder), *arguments]) == 0
    shown = capsys.readouterr().out
    assert "rho with loss over 3 steps  all +1.00" in shown
    assert "rho with lr over 4 steps  all -  changes -" in shown
    assert "nan" not in shown


def test_a_step_is_measured_in_its_own_model(llama, tmp_path):
    """With the whole update in it; a random A is one of the ranks that are looked at."""
    model, _, batches = llama
    ranks = {"layers.2.self_attn.v_proj": 2}
    write_adapter(model, tmp_path / "c", 3, r=4, target_modules=["v_proj"], rank_pattern=ranks)
    found = track(model, [(7, tmp_path / "c")], batches, blocks=1, progress=False)
    whole = nsc_merge.merge(model, {"c": tmp_path / "c"}, method="task_arithmetic", scale=1.0)
    wanted = per_sample_ratios(model, whole, batches, blocks=1).by_module("c")
    assert {path: value for path, (value,) in found.omega.items()} == pytest.approx(wanted, rel=1e-6)
    before = per_sample_ratios(model, {"c": tmp_path / "c"}, batches, blocks=1).by_module("c")
    assert wanted != pytest.approx(before, rel=1e-4)
    assert (found.steps, found.random) == ([7], pytest.approx(math.sqrt(1 - 2 / 32)))


def test_groups_are_blocks_and_names_and_few_steps_have_no_correlation():
    omega = {"layers.0.q": [0.5, 0.3], "layers.0.v": [0.7, 0.5], "layers.1.q": [0.9, 0.8], "proj": [0.1, 0.2]}
    tracking = Tracking([0, 5], omega, 0.9, {"loss": {0: 4.0, 5: 3.0}})
    assert tracking.by_block() == {
        "0": pytest.approx([0.6, 0.4]), "1": pytest.approx([0.9, 0.8]), "other": pytest.approx([0.1, 0.2])
    }  # fmt: skip
    assert tracking.by_name()["q"] == pytest.approx([0.7, 0.55])
    document = tracking.document()
    assert (document["random"], document["modules"], document["columns"]) == (0.9, omega, {"loss": {"0": 4, "5": 3}})
    with pytest.raises(ValueError, match="column: expected at least 3 steps with 'loss' and a ratio, found 2"):
        tracking.correlations("loss")


def test_checkpoints_may_lie_in_a_folder_of_their_own(training):
    _, folder, _ = training
    (folder / "steps").mkdir()
    for checkpoint in folder.glob("checkpoint-*"):
        checkpoint.rename(folder / "steps" / checkpoint.name)
    assert find_checkpoints(folder) == [(step, folder / "steps" / f"checkpoint-{step}") for step in (0, 5, 10, 20)]


def test_checkpoints_of_one_step_or_of_different_modules_are_refused(training, llama):
    model, folder, batches = training
    with pytest.raises(ValueError, match="that of step 7 and the first disagree on module"):
        track(model, [(0, folder / "checkpoint-0"), (7, llama[1]["b"])], batches, progress=False)
    with pytest.raises(ValueError, match="checkpoints: expected at least one"):
        track(model, [], batches)
    shutil.copytree(folder / "checkpoint-5", folder / "again-5")
    with pytest.raises(ValueError, match="two folders in .* say step 5"):
        find_checkpoints(folder)


def test_a_log_is_read_with_its_gaps_and_without_two_meanings(tmp_path):
    """transformers writes NaN where a norm overflowed."""
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1, "loss": 0.5, "grad_norm": NaN}\n{"step": 2, "loss": 0.25}\n')
    columns = read_log(log)
    assert columns["loss"] == {1: 0.5, 2: 0.25}
    assert math.isnan(columns["grad_norm"][1])
    for line, reason in (
        ('{"step": 1, "step": 2, "loss": 0.5}', "the key 'step' is given twice"),
        ('{"step": NaN, "loss": 1}', "cannot convert float NaN to integer"),
    ):
        log.write_text(line)
        with pytest.raises(ValueError, match=rf"log: .*log\.jsonl: expected JSON lines .*{reason}"):
            read_log(log)
