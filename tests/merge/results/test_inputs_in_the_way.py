"""A merge is not saved over what it was made of; a full disk is named with its place."""

from __future__ import annotations

import errno
import resource

import pytest
from cli_cases import contents, make_place
from transformers import AutoModelForSequenceClassification
from zoo import build

import nsc_merge
from nsc_merge.commands.main import main
from nsc_merge.utils.atomic_file import write_text

SHORT = ["run", "recipe.yaml", "method=task_arithmetic", "options=", "output.formats=coefficients"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return make_place(build("llama-cls"), tmp_path)


@pytest.mark.parametrize(
    ("format", "out", "named"), [("model", "base", "the base"), ("lora", "adapters/nli", "adapters['nli']")]
)
def test_an_export_over_an_input_is_refused(place, capsys, format, out, named):
    assert main(SHORT) == 0
    before = contents(place)
    (place / "link").symlink_to(place / out)
    capsys.readouterr()
    for folder in (out, "link"):
        assert main(["export", "merged", "--format", format, "--out", folder]) != 0
        assert f"is the folder of {named}, whose files would be replaced" in capsys.readouterr().err
    (place / "link").unlink()
    assert contents(place) == before


def test_a_format_of_several_is_not_saved_over_an_input(place):
    (place / "out").mkdir()
    (place / "adapters" / "nli").rename(place / "out" / "lora")
    before = contents(place)
    adapters = {"nli": place / "out" / "lora", "topic": place / "adapters" / "topic"}
    result = nsc_merge.merge(build("llama-cls"), adapters, method="task_arithmetic")
    with pytest.raises(ValueError, match=r"out: .*lora is the folder of adapters\['nli'\]"):
        result.save(place / "out", ["lora"])
    assert contents(place) == before
    # What lies beside it is nobody's input.
    result.save(place / "out", ["model"])


def test_a_merge_is_saved_from_a_working_folder_that_is_gone(place, monkeypatch):
    """As of a job's scratch that was cleared; all that is named is elsewhere."""
    adapters = {task: place / "adapters" / task for task in ("nli", "topic")}
    base = AutoModelForSequenceClassification.from_pretrained(place / "base")
    result = nsc_merge.merge(base, adapters, method="task_arithmetic")
    expected = contents(result.save(place / "out", ["lora", "model"]))
    (place / "scratch").mkdir()
    monkeypatch.chdir(place / "scratch")
    (place / "scratch").rmdir()
    assert contents(result.save(place / "again", ["lora", "model"])) == expected


@pytest.mark.parametrize("name", ["README.md", "recipe.yaml"])
def test_a_page_and_a_recipe_of_the_users_own_are_not_replaced(place, capsys, name):
    assert main(SHORT) == 0
    (place / "mine").mkdir()
    (place / "mine" / name).write_text("mine: 1\n")
    adapters = {task: place / "adapters" / task for task in ("nli", "topic")}
    result = nsc_merge.merge(build("llama-cls"), adapters, method="task_arithmetic")
    before = contents(place)
    with pytest.raises(ValueError, match=f"out: .*mine/{name} is there and no earlier merge's"):
        result.save(place / "mine", "lora")
    assert main(["export", "merged", "--format", "lora", "--out", "mine"]) == 1
    assert f"{name} is there and no earlier merge's" in capsys.readouterr().err
    assert contents(place) == before
    (place / "mine" / name).unlink()
    for format in ("lora", "coefficients", "lora"):
        result.save(place / "mine", format)


def test_a_full_disk_is_named_with_its_place(place, monkeypatch):
    adapters = {task: place / "adapters" / task for task in ("nli", "topic")}
    result = nsc_merge.merge(build("llama-cls"), adapters, method="task_arithmetic")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("nsc_merge.results.saving.write_heads", full)
        with pytest.raises(OSError, match=r"out: .*full cannot be written: No space .*; expected room .*, or save"):
            result.save(place / "full", "lora")
    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OSError, match=r"some\.json cannot be written: No space left on device; expected room"):
        write_text(place / "some.json", "{}")


def test_a_limit_of_a_files_size_is_named_with_its_place(place):
    adapters = {task: place / "adapters" / task for task in ("nli", "topic")}
    result = nsc_merge.merge(build("llama-cls"), adapters, method="task_arithmetic")
    size = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = contents(place)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, size[1]))
    try:
        with pytest.raises(OSError, match=r"out: .*large cannot be written: File too large; .* smaller max_shard_size"):
            result.save(place / "large", "model")
        with pytest.raises(OSError, match=r"some\.json cannot be written: File too large; expected files as large"):
            write_text(place / "some.json", "x" * 30_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, size)
    assert contents(place) == before
