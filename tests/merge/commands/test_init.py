"""A first recipe: what was found stands in it, and the dry run takes it."""

from __future__ import annotations

import gzip
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from init_cases import ADAPTERS, refused, summary_of, write_lines, written
from served_cases import WORDS, write_adapters

from nsc_merge.commands.main import main
from nsc_merge.methods import METHODS
from nsc_merge.methods.gradient.nsc_options import RECIPES
from nsc_merge.models.families import FAMILIES
from nsc_merge.recipes.first import findings
from nsc_merge.recipes.first.data import sources
from nsc_merge.recipes.first.findings import BATCH_SIZES
from nsc_merge.recipes.forecast.prospect import prospect_of
from nsc_merge.recipes.merge_recipe import load_recipe
from nsc_merge.recipes.yaml_keys import RecipeError

pytestmark = pytest.mark.usefixtures("offline")


@pytest.mark.parametrize(
    ("kind", "data", "preset", "steps", "batch_size"),
    [
        ("llama", "prompts.jsonl", "llm", 500, 2),
        ("vit", "photos", "vision", 100, 32),
        ("llava", "pairs.jsonl", "vlm", 500, 2),
    ],
)
def test_the_dry_run_takes_what_init_writes(at, capsys, kind, data, preset, steps, batch_size):
    at(kind)
    assert main(["init", *ADAPTERS, "--data", data]) == 0
    shown = capsys.readouterr().out
    assert f"preset {preset}" in shown
    assert shown.endswith("written   recipe.yaml\nnext      nsc-merge run recipe.yaml --dry-run\n")
    document = written()
    assert document["model"] == "base"
    assert document["adapters"] == {"one": "adapters/one", "two": "adapters/two"}
    assert document["calibration"] == {"one": data, "two": data}
    assert document["options"] == {"steps": steps, "lr": RECIPES[preset]["lr"]}
    assert document["batch_size"] == batch_size
    assert document["data"]["samples"] == min(1024, steps * batch_size)
    assert main(["run", "recipe.yaml", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["steps"] == steps
    assert {task: adapter["ranks"] for task, adapter in plan["tasks"].items()} == {"one": [3], "two": [4]}
    comments = Path("recipe.yaml").read_text(encoding="utf-8")
    for path in plan["measured_modules"]:
        assert path in comments
    # What the dry run estimates by formula, from the weights, init knew from shapes alone.
    said = json.loads(summary_of(capsys, "--data", data))
    way = plan["prospect"]["ways"][plan["prospect"]["way"]]
    assert said["measured_modules"] == plan["measured_modules"]
    assert said["step_bytes"] == pytest.approx(way["bytes"])


def test_what_was_found_of_tasks_is_said(at, capsys):
    at("vit")
    found = json.loads(summary_of(capsys, "--data", "photos"))
    assert found["family"] == "ViT"
    assert found["tasks"]["one"]["ranks"] == [3]
    assert found["tasks"]["one"]["alpha"] == 6
    assert found["tasks"]["one"]["targets"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert found["tasks"]["one"]["heads"] == ["classifier"]
    assert found["data"]["one"]["found"].startswith("6 images, such as ")
    assert found["warnings"] == []
    text = Path("recipe.yaml").read_text(encoding="utf-8")
    assert "all touch 12 modules: k_proj, o_proj, q_proj, v_proj." in " ".join(text.replace("#", "").split())
    assert "  one: adapters/one  # rank 3, alpha 6\n" in text
    assert "# Classes of one, as its folder says: cat, dog." in text
    assert "#   two: [first, second]" in text
    assert written()["output"] == {"dir": "merged", "formats": ["lora", "model"], "head": "one"}


def test_a_question_and_its_answer_are_the_text(at, capsys):
    at("llama")
    assert main(["init", *ADAPTERS, "--data", "prompts.jsonl"]) == 0
    shown = capsys.readouterr().out
    assert written()["data"]["text"] == "{question}\n{answer}"
    assert 'text: "{question}\\n{answer}"  #' in Path("recipe.yaml").read_text(encoding="utf-8")
    assert "12 rows of question, answer; a template over question, answer, about 3 tokens each" in shown
    # The recipe's own words mean the same in a run.
    recipe = load_recipe("recipe.yaml")
    assert recipe.calibration["one"].settings.text == "{question}\n{answer}"


@pytest.mark.parametrize(
    ("kind", "data", "writes"), [("llama", "prompts.jsonl", True), ("llama", "chats", True), ("vit", "photos", False)]
)
def test_what_is_advised_can_be_run(at, capsys, kind, data, writes):
    at(kind)
    assert main(["init", *ADAPTERS, "--data", data]) == 0
    advised = re.findall(r"^#   nsc-merge (run .* method=.*)$", Path("recipe.yaml").read_text(encoding="utf-8"), re.M)
    assert any("method=distill options.new_tokens=16" in line for line in advised) == writes
    # Only inputs of a task's own have a Gram matrix of its own.
    assert any("options.regmean=true" in line for line in advised) == (data == "chats")
    assert len(advised) == 2 + writes
    for line in advised:
        short = ["options.steps=1"] if "task_arithmetic" not in line else []
        assert main([*shlex.split(line), *short, "--dry-run"]) == 0, line
    capsys.readouterr()


def test_another_text_is_taken_where_it_is_named(at):
    at("llama")
    assert main(["init", *ADAPTERS, "--data", "prompts.jsonl", "--text", r"{answer}\n{question}"]) == 0
    assert written()["data"]["text"] == "{answer}\n{question}"
    assert main(["init", *ADAPTERS, "--data", "prompts.jsonl", "--text", "answer", "--force"]) == 0
    assert written()["data"]["text"] == "answer"


@pytest.mark.parametrize(
    "names", [("instruction", "input", "output"), ("instruction", "context", "response"), ("instruction", "output")]
)
def test_what_a_question_is_about_is_of_the_text(at, names):
    """Alpaca's columns, and Dolly's."""
    at("llama")
    write_lines(Path("rows.jsonl"), [dict(zip(names, words, strict=False)) for words in (WORDS[3:6], WORDS[4:7])])
    assert main(["init", *ADAPTERS, "--data", "rows.jsonl"]) == 0
    assert written()["data"]["text"] == "\n".join(f"{{{name}}}" for name in names)


def test_the_split_that_is_taken_of_a_folder_is_said(at, capsys):
    at("llama")
    Path("split").mkdir()
    for name, count in (("train", 3), ("test", 2)):
        write_lines(Path(f"split/{name}.jsonl"), [{"text": WORDS[3]}] * count)
    assert main(["init", *ADAPTERS, "--data", "split"]) == 0
    assert "3 rows of text in split train; column 'text'" in capsys.readouterr().out


def test_entries_of_a_folder_go_to_the_tasks_they_are_called_like(at, capsys):
    at("llama")
    assert main(["init", *ADAPTERS, "--data", "chats"]) == 0
    assert written()["calibration"] == {"one": "chats/one.jsonl", "two": "chats/two.jsonl"}
    assert "text" not in written()["data"]
    assert "the chats in column 'messages'" in capsys.readouterr().out
    shutil.copytree("chats", "some", dirs_exist_ok=True)
    Path("some/two.jsonl").unlink()
    Path("recipe.yaml").unlink()
    assert "expected one for task 'two', found none" in refused(capsys, *ADAPTERS, "--data", "some")


def test_packed_entries_of_a_folder_are_called_without_both_suffixes(at, tmp_path):
    at("llama")
    for task in ("one", "two"):
        packed = gzip.compress(Path(f"chats/{task}.jsonl").read_bytes())
        (tmp_path / f"{task}.JSONL.gz").write_bytes(packed)
    assert main(["init", *ADAPTERS, "--data", str(tmp_path)]) == 0
    assert {task: Path(file).name for task, file in written()["calibration"].items()} == {
        "one": "one.JSONL.gz",
        "two": "two.JSONL.gz",
    }


@pytest.mark.parametrize("file", ["a/b.jsonl.xz", "a/b.ndjson", "a/b.csv.bz2", "a/b.jsonl.zst"])
def test_a_mistyped_file_is_no_dataset_on_the_hub(at, capsys, file):
    at("llama")
    assert f"--data: {file} is missing" in refused(capsys, *ADAPTERS, "--data", file)


def test_each_task_may_have_data_of_its_own(at):
    at("llama")
    data = ["--data", "one=prompts.jsonl", "--data", "two=chats/two.jsonl"]
    assert main(["init", *ADAPTERS, *data]) == 0
    document = written()
    assert document["calibration"] == {
        "one": {"source": "prompts.jsonl", "text": "{question}\n{answer}"},
        "two": "chats/two.jsonl",
    }
    assert load_recipe("recipe.yaml").calibration["two"].settings.text is None


def test_inputs_in_safetensors_need_no_data_keys(at, capsys):
    at("llama")
    assert main(["init", *ADAPTERS, "--data", "inputs"]) == 0
    assert "safetensors, 3 rows of attention_mask, input_ids" in capsys.readouterr().out
    document = written()
    assert "data" not in document
    assert document["calibration"]["one"] == "inputs/one.safetensors"
    assert main(["run", "recipe.yaml", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    # As many rows as a batch has, of the three that are there, and padding among them as far as headers tell.
    said = json.loads(summary_of(capsys, "--data", "inputs"))
    assert said["step_bytes"] == pytest.approx(plan["prospect"]["ways"][plan["prospect"]["way"]]["bytes"])


def test_what_a_merge_keeps_is_a_recipe_too(at):
    at("llama")
    assert main(["init", *ADAPTERS, "--data", "prompts.jsonl"]) == 0
    changes = ["options.steps=1", "output.formats=coefficients", "output.plots=false", "output.dir=kept"]
    assert main(["run", "recipe.yaml", *changes, "--json"]) == 0
    assert written("kept/recipe.yaml")["calibration"]["one"]["text"] == "{question}\n{answer}"


@pytest.mark.parametrize(("count", "scale"), [(1, 1.0), (5, 0.4), (6, 1 / 6)])
def test_without_data_a_method_is_chosen_that_needs_none(at, capsys, count, scale):
    place = at("llama")
    names = [f"copy{number}" for number in range(count)]
    for name in names:
        shutil.copytree(place / "adapters" / "one", place / "copies" / name, dirs_exist_ok=True)
    assert main(["init", *(f"copies/{name}" for name in names), "--base", "base"]) == 0
    shown = capsys.readouterr().out
    assert "nsc, regmean and match choose coefficients by unlabelled data, and none was given" in shown
    document = written()
    assert document["method"] == "task_arithmetic"
    assert document["options"] == {"scale": scale}
    assert "calibration" not in document
    assert main(["run", "recipe.yaml", "--dry-run", "--json"]) == 0


@pytest.mark.parametrize("method", ["match", "regmean", "ties", "emr", "knots_ties", "zero_shot"])
def test_another_method_can_be_asked_for(at, method):
    at("llama")
    assert main(["init", *ADAPTERS, "--data", "inputs", "--method", method, "--force"]) == 0
    assert written()["method"] == method
    recipe = load_recipe("recipe.yaml")
    assert "lora" in recipe.formats or METHODS[method].gives in ("full rank", "nothing")
    METHODS[method].resolved(recipe.options, list(recipe.adapters))


def test_a_method_that_needs_no_data_is_taken_without(at, capsys):
    at("llama")
    assert main(["init", *ADAPTERS, "--method", "ties"]) == 0
    assert (written()["method"], "calibration" in written()) == ("ties", False)
    Path("recipe.yaml").unlink()
    needed = "--method: match needs unlabelled inputs of every task, found none; expected --data"
    capsys.readouterr()
    assert needed in refused(capsys, *ADAPTERS, "--method", "match")


def test_of_a_base_in_half_precision_no_merged_weights_are_counted(at, capsys):
    place = at("llama")
    base = shutil.copytree(place / "base", place / "half", dirs_exist_ok=True)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert main(["init", *ADAPTERS[:2], "--base", "half", "--data", "prompts.jsonl", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    found = prospect_of(load_recipe("recipe.yaml"))
    assert said["dtype"] == "bfloat16"
    assert said["step_bytes"] == found["ways"][found["way"]]["bytes"]


def test_dora_is_exact_and_said(at):
    place = at("llama")
    write_adapters(place / "base", place / "dora", "llama", use_dora=True)
    assert main(["init", "dora/one", "--base", "base"]) == 0
    assert written()["dora"] == "exact"
    assert main(["run", "recipe.yaml", "--dry-run", "--json"]) == 0


def test_where_no_usual_linear_has_an_adapter_others_are_measured(at, capsys):
    place = at("llama")
    write_adapters(place / "base", place / "mlp", "llama", target_modules=["up_proj"])
    assert main(["init", "mlp/one", "mlp/two", "--base", "base", "--data", "prompts.jsonl"]) == 0
    assert "measured  the input of model.layers.2.mlp.up_proj\n" in capsys.readouterr().out
    assert written()["options"]["score_modules"] == ["up_proj"]
    assert main(["run", "recipe.yaml", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["measured_modules"] == ["model.layers.2.mlp.up_proj"]


def test_data_of_another_kind_is_refused(at, places, capsys):
    at("vit")
    prompts = str(places["llama"] / "prompts.jsonl")
    assert "no column of images" in refused(capsys, *ADAPTERS, "--data", prompts)
    inputs = str(places["llama"] / "inputs")
    assert "takes no input ['input_ids']" in refused(capsys, *ADAPTERS, "--data", inputs)


def test_data_is_left_out_of_a_recipe_that_needs_none(at, capsys):
    at("llama")
    Path("blank.jsonl").write_text("\n")
    assert "blank.jsonl is empty" in refused(capsys, *ADAPTERS, "--data", "blank.jsonl")
    said = json.loads(summary_of(capsys, "--data", "blank.jsonl", "--method", "ties"))
    (warning,) = said["warnings"]
    assert warning.startswith("the data is left out: --data one: ")
    assert said["data"] == {}
    assert [task["heads"] for task in said["tasks"].values()] == [[], []]
    assert "calibration" not in written()


def test_what_does_not_fit_is_said(at, capsys, monkeypatch):
    """Where it is known how much there is."""
    at("llama")
    for there, warns in ((1000, 1), (10**12, 0), (0, 0)):
        monkeypatch.setattr(findings, "total_memory", lambda device, there=there: there)
        said = json.loads(summary_of(capsys, "--data", "prompts.jsonl"))
        assert said["device_bytes"] == there
        assert sum("a step does not fit the memory here" in one for one in said["warnings"]) == warns


def test_every_family_has_a_batch_size():
    assert {family.recipe for family in FAMILIES} == set(BATCH_SIZES)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(["one", "two", "three"]), min_size=1, unique=True), st.data())
def test_every_task_has_its_data_or_none(tmp_path_factory, tasks, data):
    folder = tmp_path_factory.getbasetemp() / "assigned"
    folder.mkdir(exist_ok=True)
    (folder / "file.txt").touch()
    given_to = data.draw(st.lists(st.sampled_from(tasks)))
    arguments = [f"{task}={folder / 'file.txt'}" for task in given_to]
    try:
        found = sources(arguments, tasks)
    except RecipeError:
        assert len(set(given_to)) < len(given_to) or 0 < len(given_to) < len(tasks)
    else:
        assert found == ({task: str(folder / "file.txt") for task in tasks} if given_to else {})
