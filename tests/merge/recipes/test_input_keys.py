"""The keys of a recipe that say what is merged, on which data, and what the classes are called."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as some

from nsc_merge.calibration.raw.settings import DataSettings
from nsc_merge.commands import run
from nsc_merge.recipes import merge_recipe
from nsc_merge.recipes.adapter_keys import ADAPTER_KEYS, HubAdapter, labels_in
from nsc_merge.recipes.calibration_keys import DATA_KEYS, CalibrationSource
from nsc_merge.recipes.merge_recipe import load_recipe
from nsc_merge.recipes.yaml_keys import RecipeError

NAMES = some.lists(some.text(some.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1), min_size=1)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Empty folders where a recipe looks for some; the working folder is another."""
    for folder in ("base", "adapters/french", "adapters/legal/lora", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("prompts.jsonl", "legal.parquet", "inputs.safetensors", "elsewhere/other.jsonl"):
        (tmp_path / file).write_bytes(b"")
    recipe = {
        "model": "base",
        "adapters": {"french": "adapters/french", "legal": "adapters/legal/lora"},
        "calibration": {"french": "prompts.jsonl", "legal": {"source": "legal.parquet", "samples": 512}},
        "data": {"seed": 3, "samples": 64},
        "output": {"dir": "merged"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def read(place, *overrides):
    return load_recipe(place / "recipe.yaml", overrides)


def test_a_recipe_without_the_new_keys_reads_as_before(place):
    (place / "old.yaml").write_text(
        "model: base\nadapters: {french: adapters/french}\ncalibration: {french: inputs.safetensors}\n"
        "output: {dir: merged}\n"
    )
    recipe = load_recipe(place / "old.yaml")
    assert recipe.adapters == {"french": place / "adapters" / "french"}
    assert recipe.calibration == {"french": CalibrationSource(str(place / "inputs.safetensors"))}
    assert (recipe.local, recipe.offline, recipe.trust_remote_code) == (True, True, False)
    assert (recipe.revision, recipe.labels, recipe.head, recipe.push_to_hub) == (None, {}, None, None)
    assert (recipe.formats, recipe.plots, recipe.batch_size) == (("coefficients", "lora"), True, 32)
    every = read(place, "output.formats=[model, lora, coefficients]", "batch_size=1")
    assert (every.formats, every.batch_size) == (("model", "lora", "coefficients"), 1)


def test_a_tilde_is_the_home_folder(place, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    (place / "names.txt").write_text("a \n b\n", encoding="utf-8")
    paths = ["model=~/base", "adapters.french=~/adapters/french", "calibration.french=~/prompts.jsonl"]
    recipe = read(place, *paths, "data.tokenizer=~/base", "labels.french=~/names.txt")
    assert recipe == read(place, f"data.tokenizer={place / 'base'}", f"labels.french={place / 'names.txt'}")
    assert recipe.labels == {"french": ("a", "b")}
    assert read(place, "output.dir=~/out").out == place / "out"


def test_the_help_names_every_key():
    words = set(re.findall(r"\w+", run._RUN))
    assert {*merge_recipe._KEYS, *merge_recipe._OUTPUT_KEYS, *DATA_KEYS, *ADAPTER_KEYS} - words == set()


def test_settings_of_a_task_go_before_those_of_all(place):
    calibration = read(place).calibration
    assert calibration["french"] == CalibrationSource(
        str(place / "prompts.jsonl"), True, DataSettings(seed=3, samples=64)
    )
    legal = calibration["legal"]
    assert (legal.source, legal.settings, legal.own) == (
        str(place / "legal.parquet"),
        DataSettings(seed=3, samples=512),
        ("samples",),
    )
    assert legal.as_written()["samples"] == 512
    assert "trust_remote_code" not in legal.as_written()


def test_a_chat_takes_the_place_of_a_text_that_is_for_all(place):
    calibration = read(place, "data.text=question", "calibration.legal.messages=turns").calibration
    assert (calibration["legal"].settings.text, calibration["legal"].settings.messages) == (None, "turns")
    assert (calibration["french"].settings.text, calibration["french"].settings.messages) == ("question", None)


def test_overrides_reach_into_tasks_that_are_a_path_alone(place):
    changed = ["calibration.french.samples=8", "adapters.legal.subfolder=.", "data.seed=1"]
    recipe = read(place, *changed, "calibration.legal=other.jsonl")
    french, legal = recipe.calibration["french"], recipe.calibration["legal"]
    assert (french.source, french.settings.samples, french.settings.seed) == (str(place / "prompts.jsonl"), 8, 1)
    # In the place of all that was there; from where the command was given.
    assert (legal.source, legal.settings.samples) == (str(place / "elsewhere" / "other.jsonl"), 64)
    assert recipe.adapters["legal"] == place / "adapters" / "legal" / "lora"
    whole = f"adapters.legal={{adapter: {place / 'adapters' / 'legal'}, subfolder: lora}}"
    assert read(place, whole).adapters == recipe.adapters


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("adapters.legal=me/legal", HubAdapter("me/legal")),
        ("adapters.legal=me/legal@v2", HubAdapter("me/legal", "v2")),
        ("adapters.legal=me/legal@refs/pr/1", HubAdapter("me/legal", "refs/pr/1")),
        ("adapters.legal={adapter: me/legal, revision: v2, subfolder: a/b}", HubAdapter("me/legal", "v2", "a/b")),
        ("adapters.legal={adapter: me/legal@v2, subfolder: a}", HubAdapter("me/legal", "v2", "a")),
    ],
)
def test_adapters_of_the_hub(place, override, expected):
    recipe = read(place, override)
    assert recipe.adapters["legal"] == expected
    assert recipe.local
    assert not recipe.offline


@pytest.mark.parametrize(
    ("overrides", "offline"),
    [
        (["calibration.french=me/prompts"], False),
        (["data.tokenizer=me/words"], False),
        (["calibration.legal.processor=me/pixels"], False),
        (["data.tokenizer=../base"], True),
        (["model=me/base", "revision=v1"], False),
        (["output.push_to_hub=me/merged"], False),
    ],
)
def test_the_network_is_for_ids_alone(place, overrides, offline):
    assert read(place, *overrides).offline is offline


def test_a_mistyped_file_is_no_id(place):
    with pytest.raises(RecipeError, match=r"calibration\.french: .* is missing"):
        read(place, "calibration.french=dta/prompts.jsonl")
    assert read(place, "calibration.french=me/data.v2").calibration["french"].source == "me/data.v2"
    hub = read(place, "calibration.french={source: me/data, revision: v1, config: fr}").calibration["french"]
    assert hub == CalibrationSource(
        "me/data", False, DataSettings(seed=3, samples=64, revision="v1", config="fr"), ("revision", "config")
    )


def test_code_of_others_is_allowed_for_all_that_a_recipe_loads_or_for_nothing(place, monkeypatch):
    monkeypatch.setenv("HF_TRUST_REMOTE_CODE", "1")
    assert not read(place).trust_remote_code
    recipe = read(place, "trust_remote_code=true")
    assert recipe.trust_remote_code
    assert all(source.settings.trust_remote_code for source in recipe.calibration.values())
    for wrong in ("trust_remote_code=1", "trust_remote_code='true'"):
        with pytest.raises(RecipeError, match="trust_remote_code: expected true or false"):
            read(place, wrong)
    with pytest.raises(RecipeError, match=r"data\.trust_remote_code: no such key"):
        read(place, "data.trust_remote_code=true")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.sampels=3", "data.sampels: no such key; did you mean data.samples?"),
        ("data.samples=0", "data.samples: expected a whole number of at least 1, found 0"),
        ("data.max_length=true", "data.max_length: expected a whole number of at least 1, found True"),
        ("data.padding_side=top", "data.padding_side: expected one of ['right', 'left'], found 'top'"),
        ("data.truncation=3", "data.truncation: expected one of [True, False], found 3"),
        ("data.text=3", "data.text: expected text, found 3"),
        ("data=[a]", "data: expected keys and values"),
        ("calibration.legal.seed=-1", "calibration.legal.seed: expected a whole number of at least 0, found -1"),
        ("calibration.legal.sample=3", "calibration.legal.sample: no such key; did you mean calibration.legal.samples"),
        ("calibration.legal.source=", "calibration.legal.source: expected a path, found None"),
        ("calibration.legal.revision=v1", "calibration.legal.revision: is of a dataset on the hub, but"),
        ("calibration.german=prompts.jsonl", "calibration.german: no such task (tasks: french, legal)"),
        ("adapters.french=3", "adapters.french: expected a path, found 3"),
        ("adapters.french=me/french@", "adapters.french: expected owner/name@revision, found 'me/french@'"),
        ("adapters.french={adapter: me/a@b, revision: c}", "adapters.french.revision: expected it once"),
        ("adapters.french={revision: c}", "adapters.french.revision: is of an adapter on the hub, but"),
        ("adapters.french={adapter: me/a, subfolder: ../b}", "adapters.french.subfolder: expected a path within"),
        ("adapters.french={adapter: me/a, folder: b}", "adapters.french.folder: no such key"),
        ("revision=v1", "revision: is of a model on the hub, but model is the folder"),
        ("labels.german=[a]", "labels.german: no such task (tasks: french, legal)"),
        ("labels.french=[]", "labels.french: expected a list of names, a .txt file with one a line"),
        ("labels.french=[a, 1]", "labels.french: expected names, found 1, which is how YAML reads"),
        ("labels.french=[a, '']", "labels.french: expected names, found ''"),
        ("labels.french={a: null}", "labels.french: expected names by number from 0 on"),
        ("labels.french=[a, b, a]", "labels.french: expected every name once, found 'a' 2 times"),
        ("labels.french={0: a, 2: b}", "labels.french: expected names by number from 0 on, without a gap"),
        ("labels.french=names.csv", "labels.french: expected a list of names, a .txt file"),
        ("labels.french=names.txt", "names.txt is missing"),
        ("batch_size=true", "batch_size: expected a whole number of at least 1, found True"),
        ("output.formats=3", "output.formats: expected some of ['coefficients', 'lora', 'model'], found 3"),
        ("output.head=german", "output.head: expected a task (french, legal), found 'german'"),
        ("output={dir: m, formats: coefficients, head: french}", "output.head: only formats 'lora' and 'model'"),
        ("output.push_to_hub=merged", "output.push_to_hub: expected owner/name, found 'merged'"),
        ("output.private=true", "output.private: expected output.push_to_hub: owner/name beside it, found none"),
    ],
)
def test_what_is_wrong_is_said_by_its_key(place, override, message):
    with pytest.raises(RecipeError) as error:
        read(place, override)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(names=NAMES.filter(lambda names: len(set(names)) == len(names)))
def test_names_of_classes_are_read_from_whatever_holds_them(names, tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels", numbered=True)
    forms = {
        "list.json": names,
        "config.json": {"id2label": {str(number): name for number, name in enumerate(names)}},
        "numbers.json": {str(number): name for number, name in enumerate(names)},
    }
    for file, value in forms.items():
        (folder / file).write_text(json.dumps(value), encoding="utf-8")
    (folder / "names.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    values = [names, dict(enumerate(names)), *(str(folder / file) for file in (*forms, "names.txt"))]
    for value in values:
        assert labels_in({"labels": {"cats": value}}, ["cats"]) == {"cats": tuple(names)}


def test_labels_of_a_file_beside_the_recipe(place):
    (place / "names.txt").write_text("\ufefftabby\r\n\r\nsiamese\n", encoding="utf-8")
    (place / "label2id.json").write_text('{"siamese": 1, "tabby": 0}')
    recipe = yaml.safe_load((place / "recipe.yaml").read_text())
    recipe["labels"] = {"french": "names.txt", "legal": "label2id.json"}
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert read(place).labels == {"french": ("tabby", "siamese"), "legal": ("tabby", "siamese")}
    (place / "names.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(RecipeError, match=r"labels\.french: .*names\.txt: .*utf-8"):
        read(place)
