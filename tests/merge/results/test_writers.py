"""Saving into a folder that others write, that is hostile, full or linked: old or new, and nothing is lost."""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import stat
from functools import partial

import pytest
import torch
import yaml

import nsc_merge
from nsc_merge.descent.checkpoint import State

ROUNDS = 4


@pytest.fixture
def merges(model, folders):
    return [
        nsc_merge.merge(model, folders, method="task_arithmetic", scale=0.3),
        nsc_merge.merge(model, folders, method="finetuned"),
    ]


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def together(jobs):
    """Run each job in a process of its own, all from one moment on; what each raised."""
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(len(jobs)), [context.SimpleQueue() for _ in jobs]

    def process(job, answer):
        barrier.wait()
        try:
            job()
            answer.put(None)
        except (OSError, ValueError) as error:
            answer.put(str(error))

    children = [context.Process(target=process, args=each) for each in zip(jobs, answers, strict=True)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    return [answer.get() for answer in answers]


def test_of_two_formats_written_together_one_is_there_and_the_other_refused(merges, tmp_path):
    result = merges[0]
    alone = {name: contents(result.save(tmp_path / name, name)) for name in ("lora", "model")}
    for number in range(ROUNDS):
        out = tmp_path / f"out{number}"
        answers = together([partial(result.save, out, name) for name in alone])
        found = contents(out)
        winner = next(name for name, files in alone.items() if files == found)
        for name, answer in zip(alone, answers, strict=True):
            assert (answer is None) == (name == winner)
            assert answer is None or re.search("another writer is at work on|; expected a folder without one", answer)


def test_two_merges_written_together_never_mix(merges, tmp_path):
    wholes = [contents(one.save(tmp_path / f"alone{number}", ["lora"])) for number, one in enumerate(merges)]
    for number in range(ROUNDS):
        out = tmp_path / f"out{number}"
        answers = together([partial(one.save, out, ["lora"]) for one in merges])
        assert contents(out) in wholes
        assert None in answers
        assert all(answer is None or "another writer is at work on" in answer for answer in answers)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_lock_of_a_dead_writer_holds_nobody_up(merges, tmp_path):
    out, (reading, writing) = tmp_path / "out", os.pipe()
    child = os.fork()
    if child == 0:
        from nsc_merge.utils.atomic_folder import replacing_folder

        with replacing_folder(out, lambda *_: False) as staging:
            (staging / "config.json").write_text("{}")
            os.write(writing, b"x")
            os.close(reading)
            multiprocessing.Event().wait(60)
            os._exit(1)
    os.read(reading, 1)
    with pytest.raises(BlockingIOError, match="out: another writer is at work on .*out; expected one at a time"):
        merges[0].save(out, "lora")
    # Nothing beside the output can be taken for a model meanwhile.
    assert not list(tmp_path.glob("*/config.json")) + list(tmp_path.glob(".*/config.json"))
    os.kill(child, 9)
    os.waitpid(child, 0)
    merges[0].save(out, "lora")
    assert "config.json" not in contents(out)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")]


def test_a_task_has_no_model_beside_its_adapter(merges, tmp_path):
    merges[1].save(tmp_path / "alone", "lora")
    before = contents(tmp_path / "alone")
    with pytest.raises(ValueError, match=r"tasks/plain holds an adapter \(adapter_config.json\)"):
        merges[1].save(tmp_path / "alone", "model")
    assert contents(tmp_path / "alone") == before
    merges[0].save(tmp_path / "out" / "lora", "model")
    with pytest.raises(ValueError, match=r"lora holds a model \(config.json\)"):
        merges[0].save(tmp_path / "out", ["lora"])


@pytest.mark.parametrize("inside", [False, True])
def test_a_recipe_that_lies_there_names_no_file_of_a_user_for_deletion(merges, tmp_path, monkeypatch, inside):
    out = tmp_path / "out"
    mine = ["notes.txt", "data/config.json", "lora/tokens.json", "heads/deep/x.safetensors", "tasks/plan"]
    mine += ["w.safetensors"]
    outside = ["victim.txt", "other/README.md", "other/config.json"]
    for name in [*(f"out/{name}" for name in mine), *outside]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    (out / "heads" / "link").symlink_to(tmp_path / "other")
    named = [*mine, *(f"../{name}" for name in outside), *(str(tmp_path / name) for name in outside)]
    named += ["heads/link/README.md", "heads/link", "heads/../../victim.txt", "heads/..", ".", "", "history.jsonl"]
    named += ["recipe.yaml"]
    (out / "history.jsonl").write_text("of an earlier merge")
    (out / "recipe.yaml").write_text(yaml.safe_dump({"record": {"merge": "0" * 64, "files": named}}))
    if inside:
        monkeypatch.chdir(out)
    merges[0].save(out, ["lora"])
    kept = [*(out / name for name in mine), *(tmp_path / name for name in outside)]
    assert {path.read_text() for path in kept} == {"mine"}
    assert (out / "heads" / "link").is_symlink()
    assert not (out / "history.jsonl").exists()
    recorded = yaml.safe_load((out / "recipe.yaml").read_text())["record"]["files"]
    assert set(recorded) == {"README.md", "coefficients.json", "recipe.yaml"} | {
        f"lora/adapter_{name}" for name in ("config.json", "model.safetensors")
    }


@pytest.mark.parametrize("inside", [False, True])
def test_a_link_where_a_folder_is_to_be_written_is_refused(merges, tmp_path, monkeypatch, inside):
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "lora").symlink_to(tmp_path / "elsewhere")
    if inside:
        monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(FileExistsError, match="out: .*lora is no folder, and one of that name is to be written"):
        merges[0].save(tmp_path / "out", ["lora"])
    assert os.listdir(tmp_path / "out") == ["lora"]
    assert os.listdir(tmp_path / "elsewhere") == []


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_every_file_follows_the_umask(merges, tmp_path, umask):
    before = os.umask(umask)
    try:
        for number, result in enumerate(merges):
            result.save(tmp_path / str(number), ["lora", "model"], plots=True)
        State(1, {"lam": torch.zeros(2)}, [], {}, False).save(tmp_path / "0" / "state.safetensors")
    finally:
        os.umask(before)
    found = [path for number in "01" for path in (tmp_path / number).rglob("*")]
    assert any(path.suffix == ".safetensors" for path in found)
    for path in found:
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask


@pytest.mark.parametrize("format", ["lora", "model", "coefficients"])
@pytest.mark.parametrize("size", [0, 100, 1000])
def test_a_full_disk_takes_nothing(merges, tmp_path, format, size):
    out = merges[1].save(tmp_path / "out", ["lora"])
    (out / "notes.txt").write_text("mine")
    before = contents(tmp_path)

    def save_on_a_full_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        merges[0].save(out, [format])

    (answer,) = together([save_on_a_full_disk])
    assert "\n" not in answer
    assert contents(tmp_path) == before


def test_what_cannot_be_written_is_refused_in_a_line(merges, tmp_path, monkeypatch):
    out = merges[0].save(tmp_path / "out", "lora")
    before = contents(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda *_: False)
        with pytest.raises(PermissionError, match=r"out: .*out is read-only; expected a folder that can be written to"):
            merges[0].save(out, "lora")
    with monkeypatch.context() as patched:
        patched.setattr(os.path, "ismount", lambda path: True)
        with pytest.raises(OSError, match=r"out: .*out is a mount point"):
            merges[0].save(out, "lora")
    (tmp_path / ".out.lock").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match=r"out: .* cannot be written to"):
        merges[0].save(out, "lora")
    (tmp_path / ".out.lock").unlink()
    assert contents(tmp_path) == before


def test_a_name_that_no_file_can_hold_is_refused(model, folders, tmp_path):
    result = nsc_merge.merge(model, {"half \ud800": folders["plain"]}, method="task_arithmetic")
    with pytest.raises(ValueError, match=r"adapters\['half \\ud800'\]: expected a name that UTF-8 can hold"):
        result.save(tmp_path / "out", "lora")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127])
def test_an_output_may_have_the_longest_name_that_there_is(merges, tmp_path, name):
    for _ in range(2):
        merges[0].save(tmp_path / name, "lora")
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("plain", "mixed", "partial")] == [name]
