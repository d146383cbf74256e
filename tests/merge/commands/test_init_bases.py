"""The base, the adapters and the hub of a first recipe."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from init_cases import ADAPTERS, refused, written
from safetensors.torch import load_file, save_file

from nsc_merge.adapters.hub import Fetched
from nsc_merge.commands.main import main
from nsc_merge.recipes.first.findings import find
from nsc_merge.recipes.first.tasks import find_tasks
from nsc_merge.recipes.first.text import recipe_text
from nsc_merge.recipes.merge_recipe import load_recipe
from nsc_merge.recipes.yaml_keys import RecipeError
from nsc_merge.utils.yaml_text import from_yaml

pytestmark = pytest.mark.usefixtures("offline")


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


def test_another_base_than_the_adapters_name_is_a_warning(at, capsys):
    place = at("llama")
    shutil.copytree(place / "base", place / "moved", dirs_exist_ok=True)
    assert main(["init", "adapters/one", "--base", "moved"]) == 0
    shown = capsys.readouterr().out
    named = f"warning   one: trained on {place / 'base'}, by the adapter's own word, and not on {place / 'moved'}; if"
    assert named in shown
    assert "# WARNING one: trained on" in Path("recipe.yaml").read_text(encoding="utf-8")


def test_an_adapter_that_leaves_modules_out_is_a_warning(at, tmp_path, capsys):
    at("llama")
    part = shutil.copytree("adapters/two", tmp_path / "part")
    file = part / "adapter_model.safetensors"
    tensors = load_file(file)
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.0." not in name}
    save_file(kept, file)
    whole, some = (len(found) // 2 for found in (tensors, kept))
    assert 0 < some < whole
    assert main(["init", "adapters/one", str(part), "--base", "base", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["warnings"]
    assert said == [f"part: touches {some} of the {whole} modules; its coefficient is 0 in the others"]
    assert f"# WARNING {said[0][:40]}" in Path("recipe.yaml").read_text(encoding="utf-8")


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


def test_the_revision_of_a_base_is_written(at):
    at("llama")
    found = find(["adapters/one"], "base")
    assert "revision" not in from_yaml(recipe_text(found, Path.cwd(), "recipe.yaml", None))
    there = replace(found, base=replace(found.base, source="owner/base", local=False, revision="v1"))
    document = from_yaml(recipe_text(there, Path.cwd(), "recipe.yaml", None))
    assert (document["model"], document["revision"]) == ("owner/base", "v1")


def test_a_quantised_base_is_not_written_as_a_model(at, capsys):
    place = at("llama")
    base = shutil.copytree(place / "base", place / "packed", dirs_exist_ok=True)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    assert main(["init", "adapters/one", "--base", "packed"]) == 0
    assert "quantised (bitsandbytes)" in capsys.readouterr().out
    assert written()["output"]["formats"] == ["lora"]
    # How many bytes it takes stands in its files.
    assert main(["init", *ADAPTERS[:2], "--base", "packed", "--data", "prompts.jsonl", "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step_bytes"] is None
    assert "quantization" not in written()
    # Its codes have kernels without a gradient.
    config["quantization_config"] = {"quant_method": "fp8"}
    (base / "config.json").write_text(json.dumps(config))
    assert main(["init", "adapters/one", "--base", "packed", "--test", "prompts.jsonl", "--force"]) == 0
    assert written()["quantization"] == "dequantize"
    assert from_yaml(Path("evaluation.yaml").read_text())["quantization"] == "dequantize"


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
    # 500 steps of 2 samples.
    assert written()["data"] == {"samples": 1000, "max_length": 512, "seed": 0}
    recipe = load_recipe("recipe.yaml")
    assert (recipe.calibration["one"].source, recipe.calibration["one"].local) == ("someone/prompts", False)


def test_names_of_tasks_tell_folders_apart(at, tmp_path, monkeypatch):
    place = at("llama")
    monkeypatch.chdir(tmp_path)
    for run in ("no", "12"):
        shutil.copytree(place / "adapters" / "one", tmp_path / "runs" / run / "checkpoint-5")
    folders = [f"runs/{run}/checkpoint-5" for run in ("no", "12")]
    assert [task.name for task in find_tasks(folders)] == ["no", "12"]
    assert [task.name for task in find_tasks([folders[0], f"a=b={folders[1]}"[2:]])] == ["checkpoint-5", "b"]
    for given, found in (("={}", "an empty one"), ("b={} b={}", "'b' for several")):
        with pytest.raises(RecipeError, match=f"ADAPTER: expected a name for each task, found {found}"):
            find_tasks(given.format(*folders).split())
    # YAML would read both as something else.
    assert main(["init", *folders, "--base", str(place / "base")]) == 0
    assert list(load_recipe("recipe.yaml").adapters) == ["no", "12"]
