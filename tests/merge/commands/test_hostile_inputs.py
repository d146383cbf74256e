"""Whatever stands where a recipe, a number or an argument is expected: one line, status 2, and nothing is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cli_cases import contents, make_place
from loop_cases import adapters_for, llama, text_batches
from zoo import build

from nsc_merge import merge
from nsc_merge.commands.main import main
from nsc_merge.demo.run import run_demo
from nsc_merge.utils.option_checks import check_bounds, check_count, check_number

HUGE = 10**90


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_place(build("llama-cls"), tmp_path_factory.mktemp("place"))


@pytest.fixture
def place(made, monkeypatch):
    """A place that every test leaves as it was."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(made)
    before = contents(made)
    yield made
    assert contents(made) == before


def refused(capsys, *arguments):
    """The one line, before which nothing was loaded."""
    assert main(list(arguments)) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    return line


RECIPES = {
    "zeros": (b"\0" * 64, "is not valid YAML"),
    "no UTF-8": (b"\xff\xfe\xfa" * 9, "is not valid YAML"),
    "empty": (b"", "expected keys and values, found NoneType"),
    "list": (b"[1]", "expected keys and values, found list"),
    "deep": (b"a: " + b"[" * 2000, "is not valid YAML"),
    "many digits": (b"batch_size: " + b"9" * 5000, "is not valid YAML"),
    "object": (b"a: !!python/object/apply:os.system ['true']", "is not valid YAML"),
    "unhashable": (b"? [1, 2]\n: 3\n", "is not valid YAML"),
    "number as a key": (b"3: 4\n", "3: no such key"),
}


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("command", ["run", "eval"])
def test_what_is_no_recipe_is_refused(place, tmp_path, capsys, kind, command):
    content, message = RECIPES[kind]
    (tmp_path / "recipe.yaml").write_bytes(content)
    assert message in refused(capsys, command, str(tmp_path / "recipe.yaml"))


@pytest.mark.parametrize("file", ["nowhere.yaml", "base", "recipe.yaml/recipe.yaml"])
@pytest.mark.parametrize("command", [["run"], ["eval"], ["analyse", "quartiles"]])
def test_what_is_no_file_is_refused(place, capsys, file, command):
    assert f"recipe: {file} is not a file" in refused(capsys, *command, file)


def test_a_file_of_tensors_is_no_recipe(place, capsys):
    assert "is not valid YAML" in refused(capsys, "run", "base/model.safetensors")


@pytest.mark.parametrize("value", [".nan", "-.inf", "1e400", "true", "-3", str(HUGE), "'x'", "[]", "{}", "null"])
@pytest.mark.parametrize("option", ["steps", "lr", "seed", "weight_decay", "state_every"])
def test_options_that_are_no_such_number_are_refused(place, capsys, option, value):
    line = refused(capsys, "run", "recipe.yaml", f"options.{option}={value}")
    assert f"options.{option}: expected a " in line
    assert len(line) < 250


@pytest.mark.parametrize("value", [".nan", "1e400", "true", str(HUGE), "[1, 2]", "{nli: .nan, topic: 1}", "{other: 1}"])
def test_initial_coefficients_that_are_none_are_refused(place, capsys, value):
    assert "options.init: expected " in refused(capsys, "run", "recipe.yaml", f"options.init={value}")


BOUND = ["analyse", "bound", "adapters/nli", "--model", "base", "--inputs", "x"]
ARGUMENTS = {
    "blocks": ([*BOUND, "--blocks", ""], "--blocks: expected last_quarter, a number, or numbers with commas, found ''"),
    "commas": ([*BOUND, "--blocks", ","], "--blocks: expected last_quarter, a number, or numbers with commas, f"),
    "seed": (["demo", "--seed", "-1"], "--seed: expected a whole number from 0"),
    "large seed": (["demo", "--seed", str(2**70)], "--seed: expected a whole number from 0"),
    "steps": (["demo", "--steps", "1e3"], "--steps: expected a whole number from 1"),
    "rank": (["export", "merged", "--format", "lora", "--out", "x", "--rank", "9" * 5000], "--rank: expected a whole"),
}


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_arguments_are_refused_where_they_are_read(place, capsys, kind):
    arguments, message = ARGUMENTS[kind]
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "merged", "--format=model", "--max-shard-size=abc", "--out=x"], "--max-shard-size: expected"),
        (["export", "merged", "--format=model", "--rank=3", "--out=x"], "--rank: only --format lora can be truncated"),
        (["demo", "--tasks", "depth,depth"], "--tasks: expected two or more different ones"),
    ],
)
def test_arguments_are_refused_before_anything_is_read(place, capsys, arguments, message):
    assert message in refused(capsys, *arguments)


ESCAPES = "\x1b]0;title\x07\x1b[2J\x9b31m\r\u202e"


def test_names_out_of_an_adapter_move_no_terminal(made, tmp_path, monkeypatch, capsys):
    place = Path(shutil.copytree(made, tmp_path / "place"))
    monkeypatch.chdir(place)
    config = place / "adapters" / "nli" / "adapter_config.json"
    told = {f"key{ESCAPES}\nnext: rm": 1, "peft_version": ESCAPES, "base_model_name_or_path": ESCAPES}
    config.write_text(json.dumps({**json.loads(config.read_text()), **told}))
    commands = (["inspect", "adapters/nli"], ["run", "recipe.yaml", "--dry-run"], ["run", "recipe.yaml"])
    for command in commands:
        assert main([*command]) == 0
    config.write_text(json.dumps({**json.loads(config.read_text()), "bias": ESCAPES, "peft_type": ESCAPES}))
    assert main(["inspect", "adapters/nli"]) == 1
    shown = "".join(capsys.readouterr())
    assert "not known here and without effect" in shown
    assert all(one.isprintable() or one == "\n" for one in shown)
    assert "\nnext: rm" not in shown


def test_a_deep_configuration_is_said_to_be_one(made, tmp_path, monkeypatch, capsys):
    place = Path(shutil.copytree(made, tmp_path / "place"))
    monkeypatch.chdir(place)
    config = place / "adapters" / "nli" / "adapter_config.json"
    config.write_text('{"a":' * 50_000)
    (place / "schema.json").write_text('{"a":' * 50_000)
    assert main(["init", "adapters/nli", "adapters/topic", "--out", "first.yaml"]) == 1
    assert "adapter_config.json is not valid JSON: values are nested deeper than 64" in capsys.readouterr().err
    assert main(["init", "--schema", "schema.json"]) == 2
    assert "schema.json is there and reads as no JSON schema" in capsys.readouterr().err


def test_the_demo_does_nothing_in_vain(tmp_path):
    said = []
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="out: expected a folder, found the file .*file$"):
        run_demo(tmp_path / "file" / "deep" / "out", log=said.append)
    with pytest.raises(OSError, match="out: /proc/nowhere/out cannot be written to: No such file"):
        run_demo(Path("/proc/nowhere/out"), log=said.append)
    for bad in ({"steps": 0}, {"steps": 2.5}, {"seed": -1}, {"seed": True}, {"seed": 2**70}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}: expected a whole number"):
            run_demo(tmp_path / "out", **bad, log=said.append)
    assert said == []
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


OPTIONS = [
    {"steps": 10.5},
    {"steps": True},
    {"steps": HUGE},
    {"lr": float("nan")},
    {"lr": HUGE},
    {"lr": 1e39},
    {"seed": -1},
    {"seed": 2**70},
    {"init": {"unknown": 1}},
    {"init": HUGE},
    {"init": {"a": 1, "b": 2, "c": float("inf")}},
]


@pytest.mark.parametrize("method", ["nsc", "adamerging", "match", "distill"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: f"{options!r:.30}")
def test_options_are_refused_in_python_too(method, options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"^{name}: expected .*, found ") as caught:
        merge(llama(), adapters_for(llama()), text_batches(1), method=method, **{"steps": 1, **options})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("model", ["owner/name", None, {}, 3])
@pytest.mark.parametrize("method", ["nsc", "task_arithmetic"])
def test_a_model_that_is_not_loaded_is_refused(model, method):
    with pytest.raises(TypeError, match=r"^model: expected a loaded model, as AutoModel\.from_pretrained gives it"):
        merge(model, {"a": "nowhere"}, method=method)


def test_numbers_are_those_that_a_float_holds():
    for bad in (True, HUGE, -HUGE, float("inf"), "1", None):
        with pytest.raises(ValueError, match="^x: expected a finite number, found "):
            check_number("x", bad)
    for bad in ((False, True), (0, HUGE), (0, float("nan")), (1, 1), (0, 1, 2), "ab"):
        with pytest.raises(ValueError, match="^x: expected a lower and a higher bound, found "):
            check_bounds("x", bad)
    check_count("x", 2**63 - 1)
    with pytest.raises(ValueError, match=r"^x: expected a whole number below 2\^63, found "):
        check_count("x", 2**63)
