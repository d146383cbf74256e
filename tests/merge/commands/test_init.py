"""A first recipe: what was found stands in it, and the dry run takes it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from served_cases import WORDS, picture, write_adapters, write_base
from zoo import text

from nsc_merge.adapters.hub import Fetched
from nsc_merge.commands.main import main
from nsc_merge.methods import METHODS
from nsc_merge.methods.gradient.nsc_options import RECIPES
from nsc_merge.models.families import FAMILIES
from nsc_merge.recipes.first.commented_yaml import Yaml
from nsc_merge.recipes.first.data import sources
from nsc_merge.recipes.first.findings import BATCH_SIZES
from nsc_merge.recipes.first.tasks import find_tasks
from nsc_merge.recipes.merge_recipe import load_recipe
from nsc_merge.recipes.schema import schema
from nsc_merge.recipes.yaml_keys import RecipeError
from nsc_merge.utils.yaml_text import from_yaml

VALIDATOR = jsonschema.Draft202012Validator(schema())
HEADS = {"vit": {"modules_to_save": ["classifier"]}, "llama": {}, "llava": {}}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """The command's own setting is undone."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """Kind -> folder with a base, adapters and raw data of every form."""
    found = {}
    for kind, config in HEADS.items():
        place = found[kind] = tmp_path_factory.mktemp(kind)
        base = write_base(kind, place / "base")
        write_adapters(base, place / "adapters", kind, task_type="CAUSAL_LM" if kind == "llama" else None, **config)
    rows = [{"question": f"{WORDS[n]} {WORDS[n + 1]}", "answer": WORDS[2 * n]} for n in range(12)]
    write_lines(found["llama"] / "prompts.jsonl", rows)
    chats = found["llama"] / "chats"
    chats.mkdir()
    for task in ("one", "two"):
        said = [{"role": "user", "content": f"{WORDS[3]} {task}"}, {"role": "assistant", "content": WORDS[4]}]
        write_lines(chats / f"{task}.jsonl", [{"messages": said}] * 3)
    inputs = found["llama"] / "inputs"
    inputs.mkdir()
    for task in ("one", "two"):
        save_file(text(1), inputs / f"{task}.safetensors")
    for folder in (found["vit"] / "photos", found["llava"] / "images"):
        folder.mkdir()
        for number in range(6):
            picture(number).save(folder / f"{number}.png")
    pairs = [{"image": f"images/{number}.png", "prompt": f"{WORDS[number]} {WORDS[7]}"} for number in range(6)]
    write_lines(found["llava"] / "pairs.jsonl", pairs)
    labels = {"id2label": {"0": "cat", "1": "dog"}}
    (found["vit"] / "adapters" / "one" / "config.json").write_text(json.dumps(labels))
    return found


def write_lines(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def at(places, monkeypatch):
    """Goes to the folder of a kind, in which there is no recipe yet."""

    def go(kind: str) -> Path:
        monkeypatch.chdir(places[kind])
        for file in ("recipe.yaml", "recipe.schema.json"):
            Path(file).unlink(missing_ok=True)
        return places[kind]

    return go


ADAPTERS = ("adapters/one", "adapters/two", "--base", "base")


def written(file: str = "recipe.yaml") -> dict:
    """The recipe that lies there, which the schema takes."""
    document = from_yaml(Path(file).read_text(encoding="utf-8"))
    assert [error.message for error in VALIDATOR.iter_errors(json.loads(json.dumps(document)))] == []
    return document


def refused(capsys, *arguments: str) -> str:
    """What an init says that writes nothing."""
    assert main(["init", *arguments]) != 0
    found = capsys.readouterr()
    assert found.out == ""
    assert len(found.err.splitlines()) == 1
    assert not Path("recipe.yaml").exists()
    return found.err


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


def summary_of(capsys, *arguments: str) -> str:
    assert main(["init", *ADAPTERS, *arguments, "--force", "--json"]) == 0
    return capsys.readouterr().out


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


def test_what_a_merge_keeps_is_a_recipe_too(at):
    at("llama")
    assert main(["init", *ADAPTERS, "--data", "prompts.jsonl"]) == 0
    changes = ["options.steps=1", "output.formats=coefficients", "output.plots=false", "output.dir=kept"]
    assert main(["run", "recipe.yaml", *changes, "--json"]) == 0
    assert written("kept/recipe.yaml")["calibration"]["one"]["text"] == "{question}\n{answer}"


@pytest.mark.parametrize(("count", "scale"), [(1, 1.0), (2, 0.4), (6, 1 / 6)])
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


def test_the_family_of_an_unlisted_base_is_found_and_said(at, capsys):
    place = at("llama")
    base = shutil.copytree(place / "base", place / "other", dirs_exist_ok=True)
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "gemma", "architectures": ["GemmaForCausalLM"], "head_dim": 8}
    (base / "config.json").write_text(json.dumps(config))
    assert main(["init", "adapters/one", "adapters/two", "--base", "other", "--data", "prompts.jsonl"]) == 0
    said = (
        r"found in GemmaForCausalLM: blocks ^(?:model\.layers)\.(\d+)\., measured self_attn.v_proj, "
        "inputs input_ids, attention_mask; the option family overrules it"
    )
    assert f"family    {said}" in capsys.readouterr().out
    document = written()
    assert document["method"] == "nsc"
    assert document["calibration"] == {"one": "prompts.jsonl", "two": "prompts.jsonl"}


def test_another_base_than_the_adapters_name_is_a_warning(at, capsys):
    place = at("llama")
    shutil.copytree(place / "base", place / "moved", dirs_exist_ok=True)
    assert main(["init", "adapters/one", "--base", "moved"]) == 0
    shown = capsys.readouterr().out
    named = f"warning   one: trained on {place / 'base'}, by the adapter's own word, and not on {place / 'moved'}; if"
    assert named in shown
    assert "# WARNING one: trained on" in Path("recipe.yaml").read_text(encoding="utf-8")


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


def test_a_quantised_base_is_not_written_as_a_model(at, capsys):
    place = at("llama")
    base = shutil.copytree(place / "base", place / "packed", dirs_exist_ok=True)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    assert main(["init", "adapters/one", "--base", "packed"]) == 0
    assert "quantised (bitsandbytes)" in capsys.readouterr().out
    assert written()["output"]["formats"] == ["lora"]


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


def naming(folder: Path, base: str | None, revision: str | None = None) -> str:
    """A copy of an adapter that names a base."""
    shutil.copytree("adapters/one", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": base, "revision": revision}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def test_without_a_base_the_adapters_own_is_taken(at, tmp_path, capsys, monkeypatch):
    place = at("llama")
    # A folder has no revisions, though trainers write one.
    adapters = [naming(tmp_path / task, str(place / "base"), "main") for task in ("three", "four")]
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert main(["init", adapters[0], f"four={adapters[1]}", "--out", str(place / "recipe.yaml")]) == 0
    # Nobody asked for the hub.
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert written()["model"] == "base"
    assert "revision" not in written()
    assert "trained on" not in capsys.readouterr().err


def test_of_a_base_on_the_hub_the_adapters_revision_is_taken(at, tmp_path, monkeypatch):
    at("llama")
    asked = {}

    def looked_up(source, *, local, revision):
        asked.update(source=source, local=local, revision=revision)
        raise OSError("offline")

    monkeypatch.setattr("nsc_merge.recipes.first.findings.architecture_of", looked_up)
    adapters = [naming(tmp_path / task, "owner/name", "v2") for task in ("three", "four")]
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert main(["init", *adapters]) != 0
    assert "HF_HUB_OFFLINE" not in os.environ
    assert asked == {"source": "owner/name", "local": False, "revision": "v2"}
    assert main(["init", *adapters, "--revision", "v3"]) != 0
    assert asked["revision"] == "v3"


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ((None,), (None,), "do not all name one (three: none; four: none)"),
        (("owner/name",), (None,), "do not all name one (three: owner/name; four: none)"),
        (("owner/name",), ("owner/other",), "(three: owner/name; four: owner/other)"),
        (("owner/name", "v1"), ("owner/name", "v2"), "(three: owner/name at v1; four: owner/name at v2)"),
        (("/moved/base",), ("/moved/base",), "trained on /moved/base, which is not here; expected where it is now"),
    ],
)
def test_a_base_that_the_adapters_do_not_say_is_asked_for(at, tmp_path, capsys, first, second, message):
    at("llama")
    adapters = [naming(tmp_path / "three", *first), naming(tmp_path / "four", *second)]
    found = refused(capsys, *adapters)
    assert "--base: " in found
    assert message in found


def test_adapters_of_another_model_are_refused(at, places, capsys):
    at("llama")
    assert "are not in LlamaForCausalLM" in refused(capsys, str(places["vit"] / "adapters" / "one"), "--base", "base")


def test_data_of_another_kind_is_refused(at, places, capsys):
    at("vit")
    prompts = str(places["llama"] / "prompts.jsonl")
    assert "no column of images" in refused(capsys, *ADAPTERS, "--data", prompts)
    inputs = str(places["llama"] / "inputs")
    assert "takes no input ['input_ids']" in refused(capsys, *ADAPTERS, "--data", inputs)


def test_names_of_tasks_tell_folders_apart(at, tmp_path, monkeypatch):
    place = at("llama")
    monkeypatch.chdir(tmp_path)
    for run in ("no", "12"):
        shutil.copytree(place / "adapters" / "one", tmp_path / "runs" / run / "checkpoint-5")
    folders = [f"runs/{run}/checkpoint-5" for run in ("no", "12")]
    assert [task.name for task in find_tasks(folders)] == ["no", "12"]
    assert [task.name for task in find_tasks([folders[0], f"a=b={folders[1]}"[2:]])] == ["checkpoint-5", "b"]
    # YAML would read both as something else.
    assert main(["init", *folders, "--base", str(place / "base")]) == 0
    assert list(load_recipe("recipe.yaml").adapters) == ["no", "12"]


def test_an_adapter_on_the_hub_is_fetched_and_called_by_its_id(at, monkeypatch):
    place = at("llama")
    asked = []

    def fetch(repo, name, *, revision=None, subfolder=None):
        asked.append((repo, name, revision))
        return Fetched(place / "adapters" / "one", f"{repo}@0123", ("adapter_config.json", "adapter_model.safetensors"))

    monkeypatch.setattr("nsc_merge.recipes.first.tasks.fetch", fetch)
    assert main(["init", "someone/legal@v1", "french=someone/other", "adapters/two", "--base", "base"]) == 0
    assert asked == [("someone/legal", "legal", "v1"), ("someone/other", "french", None)]
    assert written()["adapters"] == {
        "legal": "someone/legal@v1",
        "french": "someone/other",
        "two": "adapters/two",
    }


def test_a_dataset_on_the_hub_is_named_and_not_fetched(at):
    at("llama")
    assert main(["init", *ADAPTERS, "--data", "someone/prompts"]) == 0
    assert written()["calibration"] == {"one": "someone/prompts", "two": "someone/prompts"}
    recipe = load_recipe("recipe.yaml")
    assert (recipe.calibration["one"].source, recipe.calibration["one"].local) == ("someone/prompts", False)


def test_every_family_has_a_batch_size():
    assert {family.recipe for family in FAMILIES} == set(BATCH_SIZES)


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
VALUES = st.one_of(TEXTS, st.integers(), st.floats(allow_nan=False), OWN)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.tuples(KEYS, VALUES, TEXTS), max_size=3))
def test_comments_never_change_what_is_written(rows):
    entries = {key: (value, note) for key, value, note in rows}
    made = Yaml()
    made.remark("".join(note for _, note in entries.values()))
    made.verbatim("under:")
    made.entries(entries, 2)
    assert yaml.safe_load(str(made))["under"] == ({key: value for key, (value, _) in entries.items()} or None)


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
