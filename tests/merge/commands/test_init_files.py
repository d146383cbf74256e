"""A first recipe where it is written: what is there stays, and names of every kind can be read again."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from init_cases import ADAPTERS, refused, written

from nsc_merge.commands.main import main
from nsc_merge.recipes.first.commented_yaml import Yaml
from nsc_merge.recipes.merge_recipe import load_recipe
from nsc_merge.recipes.schema import schema
from nsc_merge.utils.yaml_text import from_yaml

pytestmark = pytest.mark.usefixtures("offline")


def test_the_schema_lies_beside_and_is_named_in_front(at, capsys):
    at("llama")
    assert main(["init", *ADAPTERS, "--schema"]) == 0
    assert Path("recipe.yaml").read_text().startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    assert json.loads(Path("recipe.schema.json").read_text()) == schema()
    Path("sub").mkdir(exist_ok=True)
    assert main(["init", *ADAPTERS, "--out", "sub/r.yaml", "--force", "--schema", "recipe.schema.json"]) == 0
    assert Path("sub/r.yaml").read_text().startswith("# yaml-language-server: $schema=../recipe.schema.json\n")
    assert written("sub/r.yaml")["model"] == "../base"
    capsys.readouterr()
    assert main(["init", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == schema()
    assert main(["init", "--schema", "own.json"]) == 0
    assert json.loads(Path("own.json").read_text()) == schema()


def test_a_dash_prints_the_recipe_alone(at, capsys):
    at("llama")
    assert main(["init", *ADAPTERS, "--out", "-"]) == 0
    shown = capsys.readouterr().out
    assert from_yaml(shown)["adapters"]["two"] == "adapters/two"
    assert not Path("recipe.yaml").exists()


def test_what_a_locale_has_no_form_of_ends_nothing_that_is_done(at, monkeypatch, capsys):
    """It is refused where the output is a file of its own, of which some would be missing."""
    at("llama")
    adapters = ("one=adapters/one", "λ=adapters/two", "--base", "base")
    told = io.TextIOWrapper(io.BytesIO(), "latin-1")
    monkeypatch.setattr("sys.stdout", told)
    assert main(["init", *adapters]) == 0
    assert list(written()["adapters"]) == ["one", "λ"]
    assert rb"\u03bb: rank" in told.buffer.getvalue()
    assert main(["init", *adapters, "--out", "-"]) == 1
    assert "error: the encoding latin-1 has no form of '\\u03bb'; expected LC_ALL=C.UTF-8\n" in capsys.readouterr().err


def test_a_recipe_that_is_there_stays(at, capsys):
    at("llama")
    Path("recipe.yaml").write_text("mine")
    assert main(["init", *ADAPTERS]) == 2
    assert "--out: recipe.yaml is there already; --force replaces it" in capsys.readouterr().err
    assert Path("recipe.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "file", "message"),
    [
        ((*ADAPTERS, "--data", "prompts.jsonl"), "prompts.jsonl", "--out: prompts.jsonl is prompts.jsonl"),
        (ADAPTERS, "prompts.jsonl", "--out: prompts.jsonl is there and reads as no recipe"),
        (ADAPTERS, "base/config.json", "--out: base/config.json lies in base"),
        (("x=adapters/one", "--base", "base"), "adapters/one/adapter_config.json", "lies in adapters/one"),
        (("adapters/one", "--base", "base"), "adapters/two/adapter_config.json", "reads as no recipe"),
    ],
)
def test_what_is_no_recipe_is_not_replaced(at, capsys, arguments, file, message):
    at("llama")
    before = Path(file).read_bytes()
    assert message in refused(capsys, *arguments, "--force", "--out", file)
    assert Path(file).read_bytes() == before


def test_a_recipe_stands_in_the_folder_of_the_base_that_one_works_in(at, monkeypatch):
    place = at("llama")
    monkeypatch.chdir("base")
    assert main(["init", "../adapters/one", "../adapters/two", "--base", "."]) == 0
    assert load_recipe(place / "base" / "recipe.yaml").model == str(place / "base")


def test_an_empty_file_and_a_recipe_are_replaced(at):
    at("llama")
    Path("recipe.yaml").touch()
    assert main(["init", *ADAPTERS, "--force"]) == 0
    assert main(["init", "adapters/one", "--base", "base", "--force"]) == 0
    assert list(written()["adapters"]) == ["one"]


def test_paths_far_from_the_recipe_stay_absolute(at, tmp_path):
    place = at("llama")
    out = tmp_path / "far" / "recipe.yaml"
    assert main(["init", *ADAPTERS, "--out", str(out)]) == 0
    assert written(str(out))["model"] == str(place / "base")
    assert load_recipe(out).adapters["one"] == place / "adapters" / "one"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "base"], "ADAPTER: expected one or more folders of adapters, found none"),
        (["adapters/three", "--base", "base"], "adapters/three is missing; expected a folder with adapter_config.json"),
        (["./prompts.jsonl", "--base", "base"], "prompts.jsonl is a file"),
        (["base", "--base", "base"], "adapter_config.json is missing"),
        (["adapters/one", "--base", "adapters/two"], "holds no config.json"),
        (["adapters/one", "--base", "./nowhere"], "--base: expected a folder or a hub id"),
        (["adapters/one", "adapters/one", "--base", "base"], "is given twice"),
        (["x=adapters/one", "x=adapters/two", "--base", "base"], "'x' for several"),
        ([*ADAPTERS, "--data", "./nothing.jsonl"], "--data: ./nothing.jsonl is missing"),
        ([*ADAPTERS, "--data", "elsewhere/nothing.jsonl"], "--data: elsewhere/nothing.jsonl is missing"),
        ([*ADAPTERS, "--data", "tow=prompts.jsonl"], "--data: 'tow' is no task; did you mean two?"),
        ([*ADAPTERS, "--data", "one=prompts.jsonl"], "nothing is given for task 'two'"),
        ([*ADAPTERS, "--data", "prompts.jsonl", "--data", "one=prompts.jsonl"], "expected one of them"),
        ([*ADAPTERS, "--data", "adapters/one"], "holds an adapter"),
        ([*ADAPTERS, "--data", "prompts.jsonl", "--text", "anser"], "column 'anser' is not there; did you mean answer"),
        ([*ADAPTERS, "--method", "match"], "--method: match needs unlabelled inputs of every task, found none"),
        ([*ADAPTERS, "--method", "tie"], "did you mean ties?"),
        ([*ADAPTERS, "--revision", "main"], "--revision: is of a base on the hub"),
        ([*ADAPTERS, "--out", "-", "--json"], "--out: - prints the recipe alone"),
        (["--schema", "base"], "--schema: expected a file to write, found the folder base"),
        (["adapters/one", "--base", "base", "--schema", "adapters/two"], "adapters stand before --schema"),
        ([*ADAPTERS, "--schema", "base/config.json"], "--schema: base/config.json lies in base"),
        ([*ADAPTERS, "--schema", "recipe.yaml"], "--schema: recipe.yaml is the recipe itself"),
        ([*ADAPTERS, "--schema", "prompts.jsonl"], "--schema: prompts.jsonl is there and reads as no JSON schema"),
        ([*ADAPTERS, "--schema", "/proc/nowhere/s.json"], "--schema: /proc/nowhere/s.json cannot be written"),
        (["--schema", "/proc/nowhere/s.json"], "--schema: /proc/nowhere/s.json cannot be written"),
        ([*ADAPTERS, "--out", "/proc/nowhere/r.yaml"], "--out: /proc/nowhere/r.yaml cannot be written"),
        ([*ADAPTERS, "--out", "base"], "--out: expected a file to write, found the folder base"),
        ([*ADAPTERS, "--out", "base", "--force"], "--out: expected a file to write, found the folder base"),
        ([*ADAPTERS, "--out", "base/recipe.yaml"], "--out: base/recipe.yaml lies in base"),
        ([*ADAPTERS, "--out", "adapters/two/r.yaml"], "--out: adapters/two/r.yaml lies in adapters/two"),
        ([*ADAPTERS, "--text", "nocol"], "--text: is of raw data, but no --data is given"),
    ],
)
def test_what_cannot_be_written_is_one_line(at, capsys, arguments, message):
    at("llama")
    assert message in refused(capsys, *arguments)


def test_weights_are_not_read(at, tmp_path, capsys):
    place = at("llama")
    for name in ("base", "adapters"):
        shutil.copytree(place / name, tmp_path / name)
    for file in tmp_path.rglob("*.safetensors"):
        raw = bytearray(file.read_bytes())
        start = 8 + int.from_bytes(raw[:8], "little")
        raw[start:] = b"\xff" * (len(raw) - start)
        file.write_bytes(raw)
    out = str(tmp_path / "recipe.yaml")
    assert main(["init", str(tmp_path / "adapters" / "one"), "--base", str(tmp_path / "base"), "--out", out]) == 0
    capsys.readouterr()
    # Where they are read, numbers that are none are refused.
    assert main(["run", out, "--dry-run"]) == 1
    assert "holds values that are not finite" in capsys.readouterr().err


TEXTS = st.text(max_size=30)
KEYS = st.one_of(TEXTS.filter(bool), st.text(min_size=120, max_size=200))
# A task's data with keys of its own, too.
OWN = st.fixed_dictionaries({"source": TEXTS, "text": TEXTS})
# Names of modules, such as 0.
LISTS = st.lists(st.one_of(TEXTS, st.sampled_from(["0", "null", "q_proj"])), max_size=2)
VALUES = st.one_of(TEXTS, st.integers(), st.floats(allow_nan=False), OWN, LISTS)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.tuples(KEYS, VALUES, TEXTS), max_size=3))
def test_comments_never_change_what_is_written(rows):
    entries = {key: (value, note) for key, value, note in rows}
    made = Yaml()
    made.remark("".join(note for _, note in entries.values()))
    made.verbatim("under:")
    made.entries(entries, 2)
    assert yaml.safe_load(str(made))["under"] == ({key: value for key, (value, _) in entries.items()} or None)


def test_chats_of_preferences_are_taken_by_their_column(at, capsys):
    at("llama")
    said = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    rows = [{"chosen": said, "rejected": said, "margin": 1.0}] * 4
    Path("preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["init", *ADAPTERS, "--data", "preferences.jsonl"]) == 0
    assert written()["data"]["messages"] == "chosen"
    assert "text" not in written()["data"]
    assert main(["init", *ADAPTERS, "--data", "preferences.jsonl", "--text", "rejected", "--force"]) == 0
    assert written()["data"]["messages"] == "rejected"
    assert "the chats in column 'rejected'" in capsys.readouterr().out
    assert main(["run", "recipe.yaml", "--dry-run", "options.steps=1"]) == 0
    # Texts beside them go before.
    Path("preferences.jsonl").write_text(json.dumps({"prompt": "w1 w2", "chosen": said, "rejected": said}) + "\n")
    assert main(["init", *ADAPTERS, "--data", "preferences.jsonl", "--force"]) == 0
    assert (written()["data"]["text"], written()["data"].get("messages")) == ("prompt", None)
    capsys.readouterr()


def test_several_columns_of_text_are_told_with_the_option_that_names_one(at, capsys):
    at("llama")
    Path("rows.jsonl").write_text('{"title": "a b", "body": "c d"}\n')
    said = refused(capsys, *ADAPTERS, "--data", "rows.jsonl")
    assert "several columns of text and none is named: title ('a b'), body ('c d')" in said
    assert said.rstrip().endswith("; nsc-merge init has --text for it")
    assert main(["init", *ADAPTERS, "--data", "rows.jsonl", "--text", "body"]) == 0
    assert written()["data"]["text"] == "body"
