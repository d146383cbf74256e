"""The command line under a launcher, and how its processes end."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import yaml
from cli_cases import interrupted, make_place
from forked import start
from safetensors.torch import load_file, save_file
from zoo import build

from nsc_merge.calibration.forward_passes import Pass, split
from nsc_merge.commands.main import main
from nsc_merge.commands.run import _share
from nsc_merge.processes import launch
from nsc_merge.processes.group import Group
from nsc_merge.recipes.merge_recipe import RecipeError, load_recipe
from nsc_merge.recipes.preflight import check
from nsc_merge.utils.errors import FoundByAll

needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


def test_rows_are_cut_and_what_has_none_is_dealt_out():
    rows = torch.arange(5.0)[:, None]
    cut = Pass({"x": rows, "scale": 2.0}, ({},), ((0,),), (5,))
    few = [Pass({"x": rows[:2] + number}, ({},), ((number,),)) for number in range(4)]
    odd = Pass({"x": rows, "images": [rows]}, ({},), ((0,),))
    assert split([cut, odd], Group()) == [cut, odd]
    parts = [split([few[0], cut, *few[1:], odd], Group(rank, 3, None)) for rank in range(3)]
    assert [len(one) for one in parts] == [3, 3, 3]
    assert torch.equal(torch.cat([one[0].inputs["x"] for one in parts]), rows)
    assert torch.equal(torch.cat([one[0].mine(rows) for one in parts]), rows)
    assert [one[0].share for one in parts] == [1 / 5, 2 / 5, 2 / 5]
    assert all(one[0].whole["x"] is rows and one[0].inputs["scale"] == 2 for one in parts)
    # Four of two rows and one with a list, in turn; the last process has nothing left.
    assert [one[1].tasks for one in parts] == [few[0].tasks, few[1].tasks, few[2].tasks]
    assert [one[2].tasks for one in parts] == [few[3].tasks, odd.tasks, odd.tasks]
    assert [one[2].share for one in parts] == [1, 1, 0]
    assert not parts[2][2].mine(rows).any()
    assert torch.equal(parts[1][2].mine(rows), rows)


def test_rows_are_cut_with_their_images():
    """Of as many images as rows: each its own, or some several and others none, which nobody may cut."""
    text, images = torch.tensor([[5, 5, 1], [1, 5, 1], [1, 1, 1]]), torch.ones(3, 3, 8, 8)
    for ids, token, rows in ((text, 5, 3), (text, None, 1), (text.index_fill(1, torch.tensor(1), 5), 5, 1)):
        for name in ("pixel_values", "input_features"):
            one = Pass({"input_ids": ids, name: images}, ({},), ((0,),))
            (part,) = split([one], Group(0, 3, None), places={} if token is None else {name: token, "other": 7})
            assert len(part.inputs["input_ids"]) == len(part.inputs[name]) == rows


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launched(rank: int, size: int, port: int) -> dict[str, str]:
    """The variables by which launchers tell processes apart."""
    values = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
    return {name: str(value) for name, value in values.items()}


def carry_out(rank: int, size: int, port: int, words: list[str], said: Path) -> None:
    """A command in one of the processes of a launcher; what they say on standard error is in one file."""
    os.environ.update(launched(rank, size, port))
    with said.open("a") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.exit(main(words))


@needs_gloo
def test_a_request_to_end_is_heard_once(monkeypatch):
    for name, value in launched(0, 1, free_port()).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "launched", lambda: True)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(KeyboardInterrupt), launch.started() as group:
            assert (group.rank, group.size) == (0, 1)
            with launch.undisturbed():
                signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        dist.destroy_process_group()


def test_what_all_processes_find_alike_one_says(monkeypatch):
    def found(*_, **__):
        raise FoundByAll("calibration: at step 0, the objective of task 'a' is nan")

    monkeypatch.setattr("nsc_merge.recipes.run.run", found)
    arguments = SimpleNamespace(dry_run=False, resume=False)
    with pytest.raises(FoundByAll):
        _share(arguments, None, Group(0, 2))
    monkeypatch.setattr("nsc_merge.commands.run.logger", logging.getLogger("test"))
    with pytest.raises(SystemExit) as ended:
        _share(arguments, None, Group(1, 2))
    assert ended.value.code == 1


@needs_gloo
def test_torchrun_goes_on_from_what_one_process_left(tmp_path, monkeypatch, capsys):
    place = make_place(build("llama-cls"), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("nsc_merge.recipes.preflight.current", lambda: Group(0, 2))
        with pytest.raises(RecipeError, match="from 2 processes.* found model; expected a base in a folder"):
            check(replace(load_recipe(place / "recipe.yaml"), local=False), resume=False)
    with monkeypatch.context() as patch:
        # Without data there is nothing to share: the first does it alone, and this is the second.
        patch.setenv("WORLD_SIZE", "2")
        patch.setenv("RANK", "1")
        assert main(["run", str(place / "recipe.yaml"), "method=task_arithmetic", "options={}"]) == 0
        assert not (place / "merged").exists()
    recipe = ["run", str(place / "recipe.yaml"), "options.steps=12", "output.formats=[coefficients, lora, model]"]
    assert main([*recipe, f"output.dir={place / 'alone'}"]) == 0
    with interrupted(monkeypatch):
        assert main(recipe) == 130
    capsys.readouterr()
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*started, "-m", "nsc_merge", *recipe, "--resume", "--json"], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    # One speaks for both.
    summary = json.loads(done.stdout)
    assert (summary["processes"], summary["steps"]) == (2, 12)
    assert done.stderr.count("resuming from") == done.stderr.count("12 steps: mean") == 1
    assert not list(place.glob("*.state.safetensors"))
    found, alone = (json.loads((place / name / "coefficients.json").read_text()) for name in ("merged", "alone"))
    for path, row in alone["coefficients"].items():
        assert found["coefficients"][path] == pytest.approx(row, abs=1e-6)
    # Of the whole model, from the files of the base that neither process held.
    model, expected = (load_file(place / name / "model" / "model.safetensors") for name in ("merged", "alone"))
    assert model.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(model[name], value, rtol=0, atol=1e-5)
    record = yaml.safe_load((place / "merged" / "recipe.yaml").read_text())["record"]
    assert record["processes"] == 2
    assert "2 processes shared the work" in (place / "merged" / "README.md").read_text()
    # What all of them find wrong once the base is there, one says, of the class that it has in transformers.
    save_file({**load_file(place / "inputs" / "nli.safetensors"), "bogus": torch.zeros(6)}, place / "bogus.safetensors")
    wrong = [*recipe, f"calibration.nli={place / 'bogus.safetensors'}", f"output.dir={place / 'other'}"]
    both = start(carry_out, (2, free_port(), wrong, place / "said"), 2)
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="exit code 1"):
        while not both.join():
            pass
    said = (place / "said").read_text()
    assert said.count("nsc-merge: error: calibration.nli: LlamaForSequenceClassification takes no input") == 1
    assert not (place / "other").exists()
