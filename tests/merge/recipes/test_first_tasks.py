"""What the tasks of a first recipe are called, and what is said of their adapters."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import zoo

from nsc_merge.recipes.first.tasks import _names, find_tasks
from nsc_merge.recipes.yaml_keys import RecipeError


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    place, model = tmp_path_factory.mktemp("tasks"), zoo.build("llama")
    settings = {"q_proj": 4, "v_proj": 6}
    zoo.write_adapter(model, place / "plain", 1, r=2, lora_alpha=4, target_modules=["q_proj"])
    zoo.write_adapter(
        model, place / "ranks", 2, r=2, rank_pattern=settings, use_rslora=True, use_dora=True, lora_alpha=8,
        target_modules=["q_proj", "k_proj", "v_proj"],
    )  # fmt: skip
    zoo.write_adapter(
        model, place / "alone", 3, r=2, lora_alpha=4, target_modules=["q_proj"], layers_to_transform=[1],
        modules_to_save=["lm_head"],
    )  # fmt: skip
    for checkpoint in ("checkpoint-1", "checkpoint-20"):
        shutil.copytree(place / "plain", place / "french" / checkpoint)
    shutil.copytree(place / "plain", place / "legal" / "checkpoint-1")
    return place


def test_what_is_said_of_adapters(folders, monkeypatch) -> None:
    monkeypatch.chdir(folders)
    plain, ranks, alone = find_tasks(["plain", "ranks", "alone"])
    assert (plain.said, ranks.said) == ("rank 2, alpha 4", "rank 2 to 6, alpha 8 (rsLoRA), DoRA")
    assert (plain.ranks, ranks.ranks) == ([2], [2, 4, 6])
    assert plain.modules == f"{len(plain.updates)} modules: q_proj"
    assert alone.modules == "1 module: q_proj"
    assert ranks.targets == ["k_proj", "q_proj", "v_proj"]
    assert (plain.has_dora, ranks.has_dora) == (False, True)
    assert (plain.whole, alone.whole) == ([], ["lm_head"])
    assert plain.source == os.path.abspath("plain")


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["plain", "ranks"], ["plain", "ranks"]),
        (["french/checkpoint-1", "french/checkpoint-20"], ["checkpoint-1", "checkpoint-20"]),
        (["french/checkpoint-1", "legal/checkpoint-1"], ["french", "legal"]),
        (["french/checkpoint-1", "law=legal/checkpoint-1"], ["checkpoint-1", "law"]),
        ([" a b =plain", "ranks/"], ["a b", "ranks"]),
    ],
)
def test_tasks_are_called_like_their_folders(folders, monkeypatch, given, names) -> None:
    monkeypatch.chdir(folders)
    assert [task.name for task in find_tasks(given)] == names


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["owner/one@v1", "owner/two"], ["one", "two"]),
        (["owner/one", "other/one"], ["owner", "other"]),
        (["/a/b/c", "/a/b/d", "/b/b/c"], ["a-b-c", "a-b-d", "b-b-c"]),
        (["/a/c", "/b/d/c"], ["a", "d"]),
        (["/c", "/b/c"], ["c", "b-c"]),
        ([], []),
    ],
)
def test_names_are_the_last_parts_that_all_differ(sources, names) -> None:
    assert _names(sources) == names


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["plain", "./plain"], "plain is given twice; expected each adapter once"),
        (["a=plain", "a=ranks"], "expected a name for each task, found 'a' for several; TASK=FOLDER names one"),
        (["ranks=plain", "ranks"], "found 'ranks' for several"),
        ([" =plain", "ranks"], "found an empty one"),
        (["gone/for/good"], "gone/for/good is missing; expected a folder with adapter_config.json"),
        (["a=plain/adapter_config.json"], "is a file; expected a folder with adapter_config.json"),
    ],
)
def test_tasks_that_cannot_be_are_refused(folders, monkeypatch, given, message) -> None:
    monkeypatch.chdir(folders)
    with pytest.raises(RecipeError) as raised:
        find_tasks(given)
    assert str(raised.value).startswith("ADAPTER: ")
    assert message in str(raised.value)


def test_a_folder_with_an_equals_sign_is_a_folder(folders, monkeypatch) -> None:
    monkeypatch.chdir(folders)
    shutil.copytree("plain", "r=2", dirs_exist_ok=True)
    assert [task.name for task in find_tasks(["r=2", "t=ranks"])] == ["r=2", "t"]
