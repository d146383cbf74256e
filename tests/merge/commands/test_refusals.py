"""What the command line refuses, before it has worked for nothing or lost what was there."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from cli_cases import contents, interrupted, make_place
from safetensors.torch import load_file, save_file
from zoo import KINDS, build

import nsc_merge
from nsc_merge.commands.main import main
from nsc_merge.methods import METHODS
from nsc_merge.recipes import run
from nsc_merge.recipes.merge_recipe import load_recipe
from nsc_merge.recipes.saved_result import load_result
from nsc_merge.recipes.yaml_keys import read_document

ELSEWHERE = pytest.mark.skipif(torch.backends.mps.is_available(), reason="the device is there")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return make_place(build("llama-cls"), tmp_path)


def refusal(capsys, *arguments, status=2):
    """The one line of an error, and whether the base had been loaded before."""
    assert main(list(arguments)) == status
    shown = capsys.readouterr()
    assert shown.out == ""
    *before, line = shown.err.splitlines()
    return line, any(one.startswith("loading ") for one in before)


def plain(**changes):
    """Overrides that change the method, whose options the recipe's are not."""
    return ["options=", *(f"{key}={value}" for key, value in changes.items())]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adapters:\n  nli: a\n  nli: c\n", "the key 'nli' is given twice in \"<unicode string>\", line 3, column 3"),
        ("batch_size: 1\nbatch_size: 2\n", "the key 'batch_size' is given twice in \"<unicode string>\", line 2,"),
        ("adapters: {1: a, '1': b}\n", "the key '1' is given twice in"),
        ("model: base\nadapters: {no: adapters/nli}\n", "adapters: expected names of tasks, found False"),
        ("model: base\nadapters: {1: adapters/nli}\n", "adapters: expected names of tasks, found 1"),
    ],
)
def test_keys_that_yaml_would_lose_are_refused(place, capsys, text, message):
    (place / "recipe.yaml").write_text(text)
    assert message in refusal(capsys, "run", "recipe.yaml", "output.dir=out")[0]


def test_keys_that_an_override_would_lose_are_refused(place, capsys):
    assert "the key 'lr' is given twice" in refusal(capsys, "run", "recipe.yaml", "options={lr: 1, lr: 2}")[0]


def test_merge_keys_of_merge_keys_are_no_repetition(tmp_path):
    text = "base: &a {x: 1, y: 2}\ndeep: {inner: &b {<<: *a, x: 2}}\nuse: {<<: *b, y: 3}\n"
    (tmp_path / "some.yaml").write_text(text)
    found = read_document(tmp_path / "some.yaml", [], lambda document, _: document)
    assert found["use"] == {"x": 2, "y": 3}


@pytest.mark.parametrize("keys", [("x", "y"), ("steps", "lr")])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("use: {<<: *a}", (1, 2)),
        ("use: {<<: *a, X: 5}", (5, 2)),
        ("use: {X: 5, <<: *a}", (5, 2)),
        ("use: {<<: [*a, *b]}", (1, 2)),
        ("use: {<<: [*b, *a]}", (3, 2)),
        ("use: {<<: [*b, *c, *a]}", (3, 4)),
        ("use: &use {<<: *use, X: 5, Y: 6}", (5, 6)),
        ("own: &own {<<: *a, X: 5}\nuse: {<<: *own}", (5, 2)),
        ("own: &own {<<: [*b, *a], Y: 6}\nuse: {<<: [*own, *c]}", (3, 6)),
    ],
)
def test_merge_keys_are_read_as_yaml_defines_them(tmp_path, text, expected, keys):
    """Own keys win over merged ones and earlier mappings over later ones, in every release of PyYAML."""
    written = f"a: &a {{X: 1, Y: 2}}\nb: &b {{X: 3}}\nc: &c {{X: 4, Y: 4}}\n{text}\n"
    (tmp_path / "some.yaml").write_text(written.replace("X", keys[0]).replace("Y", keys[1]))
    found = read_document(tmp_path / "some.yaml", [], lambda document, _: document)
    assert found["use"] == dict(zip(keys, expected, strict=True))


@pytest.mark.parametrize(("text", "found"), [("a: {<<: 3}", "scalar"), ("b: {x: 1}\na: {<<: [{y: 1}, 3]}", "scalar")])
def test_only_mappings_are_merged(place, capsys, text, found):
    (place / "recipe.yaml").write_text(text)
    message = refusal(capsys, "run", "recipe.yaml")[0]
    assert f"expected keys and values, or a list of such, to merge (<<), found a {found}" in message


def test_a_saved_recipe_is_read_as_any_recipe_is(place):
    assert main(["run", "recipe.yaml", "output.formats=coefficients"]) == 0
    recipe = place / "merged" / "recipe.yaml"
    line, merged = "\nshared_modules: lambda\n", "\n<<: [{shared_modules: lambda}, {shared_modules: mean}]\n"
    assert line in recipe.read_text()
    recipe.write_text(recipe.read_text().replace(line, merged))
    assert load_result(place / "merged").inputs["shared_modules"] == "lambda"


def test_merged_keys_may_still_be_overridden(place):
    text = (place / "recipe.yaml").read_text().replace("options:", "options: &o")
    (place / "recipe.yaml").write_text(text + "record: {<<: *o, lr: 3}\n")
    assert load_recipe(place / "recipe.yaml").options == {"lr": 0.01, "steps": 4}


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["options.steps=ten"], "options.steps: expected a whole number"),
        (["options.lr=abc"], "options.lr: expected a finite number"),
        (["options.schedule=[cosine]"], "options.schedule: expected one of"),
        (["options.init=x"], "options.init: expected"),
        (["options.recipe=[1]"], "options.recipe: expected one of"),
        (["options.seed=x"], "options.seed: expected a whole number"),
        (["options.step=3"], "; did you mean steps?"),
        (["options.state_to=x"], "options.state_to: is chosen by nsc-merge run"),
        (plain(method="ties", options="{density: 5}", **{"output.rank": 2}), "options.density: expected"),
        (plain(method="ties"), "output.rank: the update of method 'ties' is of full rank"),
        (plain(method="emr"), "output.rank: the update of method 'emr' is of full rank"),
        (plain(method="zero_shot"), "output.formats: method 'zero_shot' has no update"),
        (plain(method="svd", **{"output.formats": "coefficients"}), "output.formats: method 'svd' gives no"),
        (["output.max_shard_size=abc"], "output.max_shard_size: expected a size such as 5GB"),
        (["output.dir=recipe.yaml/out"], "output.dir: no folder can be made in"),
        pytest.param(["device=mps"], "finds, found mps, which it does not", marks=ELSEWHERE),
        (["device=cdua"], "device: expected auto, cpu, cuda, cuda:N or mps, found 'cdua'"),
        (["device=cuda:99"], "device: expected cpu or one of the"),
    ],
)
def test_what_would_fail_in_the_end_is_refused_at_once(place, capsys, flags, overrides, message):
    before = contents(place)
    line, loaded = refusal(capsys, "run", "recipe.yaml", *overrides, *flags)
    assert message in line
    assert not loaded
    assert contents(place) == before


def test_options_that_only_the_model_can_tell_to_be_wrong_are_wrong_usage_too(place, capsys):
    line, loaded = refusal(capsys, "run", "recipe.yaml", "options.score_blocks=99")
    assert loaded
    assert "options.score_blocks: expected 1 to 3 last blocks, found 99" in line


def test_an_install_without_the_extra_is_told_of_it():
    run_it = "from nsc_merge.commands import main; exit(main.main(['run', 'recipe.yaml']))"
    without = f"import sys; sys.modules['yaml'] = None; {run_it}"
    run = subprocess.run([sys.executable, "-c", without], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == "nsc-merge: error: yaml is not installed: pip install 'nsc-kernels[merge]'\n"


def test_a_method_that_is_misspelt_gets_the_nearest(place, capsys):
    line, _ = refusal(capsys, "run", "recipe.yaml", "method=task_arithmatic")
    assert line.endswith("did you mean task_arithmetic?")
    with pytest.raises(ValueError, match="scal: not an option of .*; did you mean scale"):
        nsc_merge.merge(build("llama-cls"), {"nli": "adapters/nli"}, method="task_arithmetic", scal=1)


def test_names_of_tasks_are_text_in_python_too(place):
    with pytest.raises(TypeError, match=r"adapters: expected names of tasks \(str\), found 1"):
        nsc_merge.merge(build("llama-cls"), {1: "adapters/nli"}, method="task_arithmetic")


def test_what_methods_are_said_to_give_is_what_they_give(place):
    model = build("llama-cls")
    adapters = {task: place / "adapters" / task for task in ("nli", "topic")}
    calibration = {task: [KINDS["llama-cls"].inputs(seed)] for seed, task in enumerate(adapters)}
    for name, method in METHODS.items():
        options = {"steps": 1, "progress": False} if "steps" in method.option_names else {}
        result = nsc_merge.merge(model, adapters, calibration, method=name, **options)
        merges = [result.for_task(task) for task in result.per_task] or [result]
        factors = [factor for one in merges if not one.coefficients for factor in one.factors.values()]
        found = "low rank" if any(factor.rank for factor in factors) else "nothing"
        found = "full rank" if any(factor.dense is not None for factor in factors) else found
        assert method.gives == ("coefficients" if result.coefficients else found), name


@pytest.fixture
def unfinished(place, monkeypatch, capsys):
    """The place after Ctrl-C in a run, and the bytes of its state."""
    with interrupted(monkeypatch):
        assert main(["run", "recipe.yaml"]) == 130
    capsys.readouterr()
    state = run.state_file(load_recipe(place / "recipe.yaml"))
    return place, state, state.read_bytes()


def change_of(place, kind):
    """Overrides for another run than the unfinished one, and what must be named."""
    if kind == "calibration":
        weights = load_file(place / "inputs" / "nli.safetensors")
        save_file({name: value.flip(0).contiguous() for name, value in weights.items()}, place / "other.safetensors")
        return ["calibration.nli=other.safetensors"], "calibration.nli."
    if kind == "calibration content":
        file = place / "inputs" / "nli.safetensors"
        save_file({name: value.flip(0).contiguous() for name, value in load_file(file).items()}, file)
        return [], "calibration.nli.nli.safetensors="
    if kind == "base":
        shutil.copytree(place / "base", place / "base2")
        file = place / "base2" / "model.safetensors"
        save_file({name: 1.1 * value for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
        return ["model=base2"], "model.model.safetensors.mtime_ns="
    return {
        "batch size": (["batch_size=3"], "batch_size=2, and this is batch_size=3"),
        "dtype": (["dtype=float64"], "dtype='float32', and this is dtype='float64'"),
        "shared modules": (["shared_modules=mean"], "shared_modules='lambda', and this is shared_modules='mean'"),
        "option": (["options.lr=0.02"], "lr=0.01, and this is lr=0.02"),
    }[kind]


@pytest.mark.parametrize(
    "kind", ["calibration", "calibration content", "base", "batch size", "dtype", "shared modules", "option"]
)
def test_a_run_of_something_else_is_not_resumed(unfinished, capsys, kind):
    place, state, content = unfinished
    overrides, named = change_of(place, kind)
    line, _ = refusal(capsys, "run", "recipe.yaml", *overrides, "--resume", status=1)
    assert f"was saved with {named}" in line
    assert "take those, or remove the state to start anew" in line
    assert ("the file was written to since" in line) == (kind == "base")
    assert state.read_bytes() == content
    assert not (place / "merged").exists()


def test_an_unfinished_run_is_not_replaced_unasked(unfinished, capsys):
    _, state, content = unfinished
    line, loaded = refusal(capsys, "run", "recipe.yaml", "options.lr=0.02")
    assert "is the state of an unfinished run: --resume goes on from it" in line
    assert not loaded
    assert state.read_bytes() == content
    assert main(["run", "recipe.yaml", "--dry-run"]) == 0
    assert "is the state of an unfinished run" in capsys.readouterr().out


def test_a_method_without_a_state_is_not_resumed_and_leaves_that_of_another(unfinished, capsys, monkeypatch):
    _, state, content = unfinished
    overrides = plain(method="task_arithmetic")
    for dry in ([], ["--dry-run"]):
        line, loaded = refusal(capsys, "run", "recipe.yaml", *overrides, "--resume", *dry)
        assert "--resume: method 'task_arithmetic' keeps no state to go on from" in line
        assert not loaded
    assert main(["run", "recipe.yaml", *overrides]) == 0
    capsys.readouterr()

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nsc_merge.recipes.run.save", interrupt)
        assert main(["run", "recipe.yaml", *overrides]) == 130
    assert "--resume" not in capsys.readouterr().err
    assert state.read_bytes() == content


def test_the_summary_lists_what_was_written(place, capsys):
    (place / "merged").mkdir()
    (place / "merged" / "mine.txt").write_text("kept")
    assert main(["run", "recipe.yaml"]) == 0
    first = capsys.readouterr().out
    assert "history.jsonl" in first
    assert "mine.txt" not in first
    assert main(["run", "recipe.yaml", *plain(method="svd")]) == 0
    assert "coefficients.json" not in capsys.readouterr().out
    assert not {"coefficients.json", "history.jsonl"} & set(contents(place / "merged"))
    for command in (["plot", "merged"], ["export", "merged", "--format", "lora", "--out", "small"]):
        said = refusal(capsys, *command, status=1)[0]
        assert "coefficients.json is missing, so that nothing can be made of this merge anew" in said
    again = said.partition("saved; nsc-merge ")[2].partition(" merges again")[0]
    assert main(shlex.split(again.replace("=DIR", f"={place / 'again'}"))) == 0
    assert (place / "again" / "lora" / "adapter_config.json").is_file()


def test_an_export_beside_the_merge_that_it_is_of_takes_nothing_away(place, capsys):
    assert main(["run", "recipe.yaml", "dtype=bfloat16", "output.formats=coefficients"]) == 0
    before = contents(place / "merged")
    assert main(["export", "merged", "--format", "lora", "--out", "merged"]) == 0
    assert set(contents(place / "merged")) == {*before, "adapter_config.json", "adapter_model.safetensors"}


def test_bytes_that_the_locale_does_not_know_are_read_as_utf8(place):
    name = "ü".encode().decode("ascii", "surrogateescape")
    assert load_recipe(place / "recipe.yaml", [f"output.dir={name}"]).out == place / "ü"
    with pytest.raises(ValueError, match=r"the value of .* is not valid YAML"):
        load_recipe(place / "recipe.yaml", ["output.dir=\udcff"])


def test_a_merge_whose_base_was_moved_says_where_its_path_stands(place, capsys):
    assert main(["run", str(place / "recipe.yaml"), "options.steps=1"]) == 0
    (place / "base").rename(place / "elsewhere")
    out = load_recipe(place / "recipe.yaml", [f"model={place / 'elsewhere'}"]).out
    capsys.readouterr()
    assert main(["export", str(out), "--format", "lora", "--out", "copy"]) != 0
    said = capsys.readouterr().err
    assert "model: expected a folder or a hub id" in said
    assert f"(so it stands in {out / 'recipe.yaml'}: where base, adapters or data were moved, change" in said


def module(*arguments, **settings):
    return subprocess.run([sys.executable, "-m", "nsc_merge", *arguments], timeout=120, **settings)


def test_the_package_runs_as_a_module_and_tells_its_version():
    done = module("--version", capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()[0]) == (0, "nsc-merge")
    assert done.stdout.split()[1][0].isdigit()


@pytest.mark.parametrize("arguments", [["methods"], ["--version"]])
def test_a_closed_output_is_no_error(arguments):
    read, write = os.pipe()
    os.close(read)
    done = module(*arguments, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("arguments", ["methods", "--version"])
def test_no_output_at_all_is_no_error(arguments):
    command = shlex.join([sys.executable, "-m", "nsc_merge", arguments])
    done = subprocess.run(["sh", "-c", f"{command} >&-"], stderr=subprocess.PIPE, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")


def test_overrides_are_not_required(capsys):
    with pytest.raises(SystemExit):
        main(["run"])
    assert capsys.readouterr().err.endswith("the following arguments are required: recipe\n")


def test_the_recipe_lists_what_was_written(place):
    assert main(["run", "recipe.yaml", "output.formats=lora"]) == 0
    record = yaml.safe_load((place / "merged" / "recipe.yaml").read_text())["record"]
    assert record["files"] == sorted(contents(place / "merged"))
