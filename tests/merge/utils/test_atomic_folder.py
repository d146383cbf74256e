"""A result folder is the old one or the new one, whenever the process is killed."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys

import killed_writer
import pytest
from killed_writer import NEW, obsolete, replace, write

from nsc_merge.utils import atomic_folder
from nsc_merge.utils.atomic_folder import replacing_folder

OLD = {"config.json": "old", "model-1.safetensors": "old", "model-2.safetensors": "old", "tasks/a/x": "old"}
FOREIGN = {"notes.txt": "mine", "sub/deep/data": "mine"}
AFTER = {**NEW, **FOREIGN}


def read(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def killed_at():
    """:func:`killed_writer.killed_at`, in its own process."""
    command = [sys.executable, killed_writer.__file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def ask(step, out, inside=False, exchange=True):
            asked = {"step": step, "out": str(out), "inside": inside, "exchange": exchange}
            print(json.dumps(asked), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield ask


def test_a_kill_at_any_step_leaves_the_old_or_the_new(tmp_path, killed_at):
    seen, step = [], 0
    while True:
        place = tmp_path / str(step)
        write(place / "out", {**OLD, **FOREIGN})
        killed = killed_at(step, place / "out")
        found = read(place / "out")
        assert found in ({**OLD, **FOREIGN}, AFTER)
        seen.append(found == AFTER)
        if not killed:
            break
        step += 1
    # Once new it stays new, and the last one, which nobody killed, has left nothing beside it.
    assert seen == sorted(seen)
    assert seen[-1]
    assert sum(seen) < len(seen)
    assert [path.name for path in place.iterdir()] == ["out"]


def test_a_kill_leaves_no_folder_or_a_whole_one_where_there_was_none(tmp_path, killed_at):
    for step in range(100):
        out = tmp_path / str(step) / "out"
        killed = killed_at(step, out)
        assert not out.exists() or read(out) == NEW
        if not killed:
            break
    assert read(out) == NEW


def test_without_an_exchange_both_versions_survive_a_kill(tmp_path, killed_at):
    for step in range(100):
        place = tmp_path / str(step)
        write(place / "out", {**OLD, **FOREIGN})
        killed = killed_at(step, place / "out", exchange=False)
        whole = [read(path) for path in place.iterdir()]
        assert {**OLD, **FOREIGN} in whole or AFTER in whole
        if (place / "out").exists():
            assert read(place / "out") in ({**OLD, **FOREIGN}, AFTER)
        if not killed:
            break
    assert whole == [AFTER]


@pytest.mark.parametrize("way", ["exchanged", "renamed", "one by one"])
def test_whatever_a_kill_left_the_next_writer_brings_the_old_or_the_new_and_clears_up(
    tmp_path, monkeypatch, killed_at, way
):
    if way == "renamed":
        monkeypatch.setattr(atomic_folder, "_exchange", lambda *_: False)
    seen = []
    for step in range(0, 200, 5):
        place = tmp_path / str(step)
        write(place / "out", {**OLD, **FOREIGN})
        killed = killed_at(step, place / "out", inside=way == "one by one", exchange=way != "renamed")
        with pytest.raises(RuntimeError, match="no"), replacing_folder(place / "out", obsolete):
            raise RuntimeError("no")
        found = read(place / "out")
        assert found in ({**OLD, **FOREIGN}, AFTER)
        assert [path.name for path in place.iterdir()] == ["out"]
        seen.append(found == AFTER)
        if not killed:
            break
    assert seen == sorted(seen)
    assert seen[-1]
    assert sum(seen) < len(seen)


def test_a_kill_of_who_undoes_a_kill_leaves_the_old_or_the_new(tmp_path, killed_at):
    for step in range(8, 32, 6):
        out = tmp_path / str(step) / "out"
        write(out, {**OLD, **FOREIGN})
        assert killed_at(step, out, inside=True)
        for again in range(4, 12, 3):
            assert killed_at(again, out)
        with pytest.raises(RuntimeError, match="no"), replacing_folder(out, obsolete):
            raise RuntimeError("no")
        assert read(out) in ({**OLD, **FOREIGN}, AFTER)


@pytest.mark.parametrize("call", ["os.replace", "os.link"])
def test_an_error_while_files_are_replaced_one_by_one_is_undone(tmp_path, monkeypatch, call):
    for failing in range(3):
        out = tmp_path / str(failing) / "out"
        write(out, {**OLD, **FOREIGN})
        monkeypatch.chdir(out)
        with monkeypatch.context() as patched:
            real, calls = getattr(os, call.removeprefix("os.")), []

            def fails(*args, real=real, calls=calls, failing=failing, **kwargs):
                calls.append(args)
                if len(calls) == failing + 1:
                    raise KeyboardInterrupt
                return real(*args, **kwargs)

            patched.setattr(call, fails)
            with pytest.raises(KeyboardInterrupt):
                replace(out)
        assert read(out.parent) == {f"out/{name}": text for name, text in {**OLD, **FOREIGN}.items()}
    monkeypatch.chdir(tmp_path)


def test_an_error_leaves_everything_as_it_was(tmp_path):
    write(tmp_path / "out", OLD)
    with pytest.raises(RuntimeError, match="half"), replacing_folder(tmp_path / "out", obsolete) as staging:
        write(staging, NEW)
        raise RuntimeError("half done")
    assert read(tmp_path) == {f"out/{name}": text for name, text in OLD.items()}


def test_a_failed_rename_brings_the_old_folder_back(tmp_path, monkeypatch):
    write(tmp_path / "out", OLD)
    monkeypatch.setattr(atomic_folder, "_exchange", lambda *_: False)
    real, calls = os.rename, []

    def rename(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError("no")
        real(*args)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="no"):
        replace(tmp_path / "out")
    assert read(tmp_path) == {f"out/{name}": text for name, text in OLD.items()}


def test_links_permissions_and_late_files_stay(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(out, OLD)
    write(tmp_path / "elsewhere", {"x": "mine"})
    (out / "link").symlink_to(tmp_path / "elsewhere")
    out.chmod(0o750)
    swap = atomic_folder._swap

    def with_a_late_file(one, other):
        write(other, {"late": "mine"})
        swap(one, other)

    monkeypatch.setattr(atomic_folder, "_swap", with_a_late_file)
    replace(out)
    assert (out / "link").is_symlink()
    assert (out / "late").read_text() == "mine"
    assert (out / "link" / "x").read_text() == "mine"
    assert stat.S_IMODE(out.stat().st_mode) == 0o750
    monkeypatch.undo()

    way = tmp_path / "way"
    way.symlink_to(out)
    write(out, {"config.json": "old"})
    replace(way)
    assert way.is_symlink()
    assert (out / "config.json").read_text() == "new"


def test_a_new_folder_has_the_permissions_of_any_other(tmp_path):
    replace(tmp_path / "out")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_folders_of_others_keep_their_permissions_and_stay_when_empty(tmp_path):
    write(tmp_path / "out", {**OLD, **FOREIGN})
    for name, mode in (("sub", 0o700), ("sub/deep", 0o500), ("empty", 0o711)):
        (tmp_path / "out" / name).mkdir(exist_ok=True)
        (tmp_path / "out" / name).chmod(mode)
    replace(tmp_path / "out")
    modes = {name: stat.S_IMODE((tmp_path / "out" / name).stat().st_mode) for name in ("sub", "sub/deep", "empty")}
    assert modes == {"sub": 0o700, "sub/deep": 0o500, "empty": 0o711}
    assert read(tmp_path / "out") == AFTER
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_where_a_folder_is_needed_and_the_other_way_round_is_refused(tmp_path, monkeypatch):
    for name, message in (("tasks", "tasks is no folder"), ("config.json/mine", "config.json is a folder")):
        out = tmp_path / message[:4] / "out"
        write(out, {name: "mine"})
        with pytest.raises(FileExistsError, match=message):
            replace(out)
        assert read(out.parent) == {f"out/{name}": "mine"}
    (tmp_path / "out" / "config.json").mkdir(parents=True)
    for inside in (False, True):
        if inside:
            monkeypatch.chdir(tmp_path / "out")
        with pytest.raises(FileExistsError, match="config.json is a folder"):
            replace(tmp_path / "out")
        assert os.listdir(tmp_path / "out") == ["config.json"]
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("place", ["file/out", "file/new/out"])
def test_a_folder_within_a_file_is_refused_by_name(tmp_path, place):
    (tmp_path / "file").touch()
    with (
        pytest.raises(NotADirectoryError, match=r"out: no folder can be made in .*file, which is none"),
        replacing_folder(tmp_path / place, lambda *_: False),
    ):
        raise AssertionError


def test_what_another_user_has_in_a_folder_such_as_tmp_is_refused_unless_worked_in(tmp_path, monkeypatch):
    write(tmp_path / "out", {**OLD, **FOREIGN})
    tmp_path.chmod(0o1777)
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(PermissionError, match=r"out: .*/out is another user's, and in .* only its owner may replace"):
        replace(tmp_path / "out")
    assert read(tmp_path / "out") == {**OLD, **FOREIGN}
    replace(tmp_path / "new")
    monkeypatch.chdir(tmp_path / "out")
    replace(tmp_path / "out")
    assert read(tmp_path / "out") == AFTER
    tmp_path.chmod(0o700)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a folder to a group that it is not in")
def test_a_folder_of_a_group_stays_the_groups(tmp_path, monkeypatch):
    """Also where the user who writes it has to become its owner."""
    write(tmp_path / "out", OLD)
    os.chown(tmp_path / "out", 65533, 65532)
    (tmp_path / "out").chmod(0o2770)
    chown = os.chown

    def as_a_member(path, owner, group):
        if owner not in (-1, os.getuid()):
            raise PermissionError
        chown(path, owner, group)

    monkeypatch.setattr(os, "chown", as_a_member)
    replace(tmp_path / "out")
    after = (tmp_path / "out").stat()
    assert (after.st_uid, after.st_gid, stat.S_IMODE(after.st_mode)) == (os.getuid(), 65532, 0o2770)


def test_a_loop_of_links_is_refused_before_anything_is_made(tmp_path):
    (tmp_path / "out").symlink_to("out")
    with (
        pytest.raises((OSError, RuntimeError), match=r"(?i)loop"),
        replacing_folder(tmp_path / "out", lambda *_: False),
    ):
        raise AssertionError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_links_are_copied_where_the_filesystem_has_none(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    write(tmp_path / "out", {**OLD, **FOREIGN})
    replace(tmp_path / "out")
    assert read(tmp_path / "out") == AFTER


def test_the_folder_that_the_process_runs_in_stays_the_same_folder(tmp_path, monkeypatch):
    write(tmp_path / "out", {**OLD, **FOREIGN})
    monkeypatch.chdir(tmp_path / "out")
    before = os.stat(".").st_ino
    replace(tmp_path / "out")
    assert os.stat(".").st_ino == before
    assert read(tmp_path / "out") == AFTER
    shutil.rmtree(tmp_path / "out" / "sub")
    monkeypatch.chdir(tmp_path)
