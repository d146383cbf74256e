"""What a run writes takes no input's place, no user's file, and no other run's state; a dry run refuses the same."""

from __future__ import annotations

import os
import shutil

import pytest
from cli_cases import contents, interrupted, make_place
from zoo import build

from nsc_merge.commands.main import main
from nsc_merge.recipes.merge_recipe import load_recipe
from nsc_merge.recipes.preflight import state_file
from nsc_merge.utils.atomic_folder import only_run

SHORT = ["method=task_arithmetic", "options="]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return make_place(build("llama-cls"), tmp_path)


def refused(place, capsys, message, *overrides, recipe="recipe.yaml"):
    """Run and dry run end alike, before anything is loaded, and leave everything as it was."""
    before = contents(place)
    for flags in ([], ["--dry-run"]):
        capsys.readouterr()
        assert main(["run", recipe, *overrides, *flags]) == 2
        shown = capsys.readouterr()
        assert message in shown.err
        assert "loading" not in shown.err
        assert contents(place) == before


@pytest.mark.parametrize(
    ("input", "named"), [("model=merged/model", "model"), ("adapters.nli=merged/lora", "adapters.nli")]
)
def test_a_merge_of_what_it_would_replace_is_refused(place, capsys, input, named):
    assert main(["run", "recipe.yaml", *SHORT]) == 0
    refused(place, capsys, f"output.dir: {named} is {place / 'merged'}", *SHORT, input)
    # What an earlier merge left goes, also where other formats come.
    refused(place, capsys, f"output.dir: {named} is", *SHORT, input, "output.formats=coefficients")
    assert main(["run", "recipe.yaml", *SHORT, input, "output.dir=chained"]) == 0


def test_inputs_in_the_folder_are_refused_only_where_files_come(place, capsys):
    project = place / "project"
    shutil.copytree(place / "base", project / "model")
    shutil.copytree(place / "adapters" / "nli", project / "lora")
    shutil.copy(place / "inputs" / "nli.safetensors", project / "history.jsonl")
    refused(place, capsys, "output.dir: model is", *SHORT, "output.dir=project", "model=project/model")
    refused(place, capsys, "output.dir: adapters.nli is", *SHORT, "output.dir=project", "adapters.nli=project/lora")
    (project / "history.jsonl").unlink()
    shutil.copytree(place / "base", project / "plain")
    command = ["run", "recipe.yaml", *SHORT, "output.dir=project/out", "model=project/plain"]
    assert main(command) == 0
    assert main(["run", "recipe.yaml", *SHORT, "output.dir=project/plain/out", "model=project/plain"]) == 0
    shutil.rmtree(project / "model")
    shutil.rmtree(project / "lora")
    assert main(["run", "recipe.yaml", *SHORT, "output.dir=project", "model=project/plain"]) == 0


def test_calibration_that_the_history_would_replace_is_refused(place, capsys):
    (place / "merged").mkdir()
    (place / "merged" / "history.jsonl").write_text('{"text": "a"}\n')
    refused(place, capsys, "output.dir: calibration.nli is", "calibration.nli=merged/history.jsonl")


def test_names_of_classes_that_the_model_would_replace_are_refused(place, capsys):
    """As of an earlier merge, whose configuration has them."""
    assert main(["run", "recipe.yaml", *SHORT]) == 0
    named = "labels.nli=merged/model/config.json"
    refused(place, capsys, f"output.dir: labels.nli is {place / 'merged' / 'model' / 'config.json'}", *SHORT, named)
    assert main(["run", "recipe.yaml", *SHORT, named, "output.dir=other"]) == 0
    (place / "names.txt").write_text("a\nb\nc\n")
    assert main(["run", "recipe.yaml", *SHORT, "labels.nli=names.txt"]) == 0


def test_a_recipe_and_a_page_of_the_users_own_stay(place, capsys):
    refused(place, capsys, f"output.dir: {place / 'recipe.yaml'} is there", *SHORT, "output.dir=.")
    (place / "mine").mkdir()
    (place / "mine" / "README.md").write_text("mine")
    refused(place, capsys, "README.md is there and no earlier merge's", *SHORT, "output.dir=mine")
    refused(place, capsys, "output.dir: model is", *SHORT, "output.dir=base")
    # A merge is run again from its record, over itself.
    assert main(["run", "recipe.yaml", *SHORT]) == 0
    assert main(["run", "merged/recipe.yaml"]) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda out: (out / "lora").write_text(""), "lora is no folder"),
        (lambda out: (out / "README.md").mkdir(), "README.md is a folder"),
        (lambda out: ((out / "lora").mkdir(), (out / "lora" / "config.json").write_text("{}")), "holds a model"),
    ],
)
def test_a_folder_that_cannot_be_written_is_refused_at_once(place, capsys, make, message):
    (place / "merged").mkdir()
    make(place / "merged")
    refused(place, capsys, message, *SHORT)


def test_what_every_task_has_of_its_own_is_refused_as_early(place, capsys):
    each = ["method=finetuned", "options="]
    lora = place / "merged" / "tasks" / "nli" / "lora"
    lora.mkdir(parents=True)
    (lora / "config.json").write_text("{}")
    refused(place, capsys, f"output.dir: {lora} holds a model", *each)
    (lora / "config.json").unlink()
    shutil.copytree(place / "adapters" / "nli", lora, dirs_exist_ok=True)
    refused(place, capsys, f"output.dir: adapters.nli is {lora}", *each, "adapters.nli=merged/tasks/nli/lora")
    # One update for all stands beside them.
    assert main(["run", "recipe.yaml", *SHORT, "adapters.nli=merged/tasks/nli/lora"]) == 0
    shutil.rmtree(lora)
    lora.write_text("")
    refused(place, capsys, "lora is no folder", *each)
    lora.unlink()
    assert main(["run", "recipe.yaml", *each]) == 0
    assert (lora / "adapter_config.json").is_file()


def test_a_mount_point_a_loop_and_a_name_that_is_too_long_are_refused(place, capsys):
    refused(place, capsys, "output.dir: / is a mount point", *SHORT, "output.dir=/")
    refused(place, capsys, "output.dir: expected a folder that can be made", *SHORT, f"output.dir={'x' * 240}")
    os.symlink("loop", "loop")
    refused(place, capsys, "output.dir: expected a folder that can be made", *SHORT, "output.dir=loop")
    refused(place, capsys, "output.dir: expected a folder that can be made", *SHORT, "output.dir=loop/out")


def test_a_second_run_into_a_folder_is_refused_and_touches_nothing(place, capsys, monkeypatch):
    with interrupted(monkeypatch):
        assert main(["run", "recipe.yaml"]) == 130
    state = state_file(load_recipe("recipe.yaml"))
    before = state.read_bytes()
    with only_run(place / "merged"):
        for flags in ([], ["--resume"]):
            capsys.readouterr()
            assert main(["run", "recipe.yaml", *flags]) == 1
            shown = capsys.readouterr().err
            assert "output.dir: another run into" in shown
            assert "go on with" not in shown
    assert state.read_bytes() == before
    # What a dead process leaves blocks nobody.
    (place / ".merged.run.lock").touch()
    assert main(["run", "recipe.yaml", "--resume"]) == 0
    assert not state.exists()
    assert not (place / ".merged.run.lock").exists()


def test_a_run_that_the_disk_ends_names_its_state(place, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError("out: merged cannot be written: No space left on device")

    monkeypatch.setattr("nsc_merge.recipes.run.save", full)
    assert main(["run", "recipe.yaml", "options.state_every=1"]) == 1
    assert "go on with: nsc-merge run recipe.yaml" in capsys.readouterr().err
