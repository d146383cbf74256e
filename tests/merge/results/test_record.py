"""What a saved merge says that it came from is what it came from."""

from __future__ import annotations

import hashlib
import json
import shutil

import peft
import pytest
import torch
import yaml
from cli_cases import contents, make_place
from safetensors.torch import load_file, save_file
from zoo import build, write_adapter

import nsc_merge
from nsc_merge.commands.main import main
from nsc_merge.models.bases.loading import files_of
from nsc_merge.recipes import run
from nsc_merge.recipes.saved_result import load_result
from nsc_merge.results.beside.record import digests_in
from nsc_merge.utils.provenance import hashes, quick

pytestmark = pytest.mark.usefixtures("offline")

WEIGHTS = "adapter_model.safetensors"
SHORT = ["output.formats=coefficients", "options.steps=1"]


@pytest.fixture
def place(tmp_path):
    return make_place(build("llama-cls"), tmp_path)


def digest(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def double(file):
    save_file({name: value * 2 for name, value in load_file(file).items()}, file, metadata={"format": "pt"})


def record(folder):
    return yaml.safe_load((folder / "recipe.yaml").read_text())["record"]


def test_files_that_are_replaced_while_a_recipe_runs_are_not_vouched_for(place, monkeypatch):
    files = {
        "adapters": place / "adapters" / "nli" / WEIGHTS,
        "calibration": place / "inputs" / "nli.safetensors",
        "model": place / "base" / "model.safetensors",
    }
    merged = {kind: digest(file) for kind, file in files.items()}
    before = run.merge

    def replaced(*arguments, **options):
        shutil.copytree(place, place / "kept", ignore=shutil.ignore_patterns("kept", "merged*"))
        for file in files.values():
            double(file)
        return before(*arguments, **options)

    monkeypatch.setattr(run, "merge", replaced)
    assert main(["run", str(place / "recipe.yaml"), *SHORT, "--full-hash"]) == 0
    found = record(place / "merged")["sha256"]
    assert found["adapters"]["nli"][WEIGHTS] == merged["adapters"]
    assert found["calibration"]["nli"] == {"nli.safetensors": merged["calibration"]}
    assert found["model"]["model.safetensors"] == merged["model"]
    with pytest.raises(ValueError, match=r"adapters\.nli: .* has changed since it was merged"):
        load_result(place / "merged")
    shutil.copy(place / "kept" / "adapters" / "nli" / WEIGHTS, files["adapters"])
    with pytest.raises(ValueError, match="model: .*base has changed since it was merged"):
        load_result(place / "merged")
    shutil.copy(place / "kept" / "base" / "model.safetensors", files["model"])
    # Exported again, it is still of the batches that it was merged with.
    load_result(place / "merged").save(place / "again", "coefficients")
    assert record(place / "again")["sha256"] == found


def test_of_a_base_that_was_handed_over_the_record_says_when_it_was_hashed(place):
    base = place / "base"
    model = type(build("llama-cls")).from_pretrained(base)
    result = nsc_merge.merge(model, {"nli": place / "adapters" / "nli"}, method="task_arithmetic")
    double(place / "adapters" / "nli" / WEIGHTS)
    result.save(place / "out", "coefficients")
    found = record(place / "out")
    assert "model" not in found["sha256"]
    assert found["sha256_when_saved"]["model"] == {"config.json": digest(base / "config.json")}
    assert found["headers_when_saved"]["model"] == {"model.safetensors": quick(base / "model.safetensors")}
    assert found["sha256"]["adapters"]["nli"][WEIGHTS] != digest(place / "adapters" / "nli" / WEIGHTS)
    with pytest.raises(ValueError, match=r"adapters\.nli: .* has changed since it was merged"):
        load_result(place / "out")


def test_a_base_is_told_by_header_and_size_unless_its_bytes_were_asked_for(place):
    weights = place / "base" / "model.safetensors"
    assert main(["run", str(place / "recipe.yaml"), *SHORT]) == 0
    found = record(place / "merged")
    assert found["headers"] == {"model": {"model.safetensors": quick(weights)}}
    assert set(found["sha256"]["model"]) == {"config.json"}
    double(weights)
    again = load_result(place / "merged")
    assert digests_in(found) == files_of(again.model)
    values = load_file(weights)
    save_file(values | {"more": next(iter(values.values())).clone()}, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model: .*base has changed since it was merged \(its digests differ\)"):
        load_result(place / "merged")


def test_a_record_of_an_earlier_release_is_compared_by_all_bytes(place):
    assert main(["run", str(place / "recipe.yaml"), *SHORT]) == 0
    recipe = yaml.safe_load((place / "merged" / "recipe.yaml").read_text())
    del recipe["full_hash"], recipe["record"]["headers"]
    recipe["record"]["sha256"]["model"] = hashes(place / "base")
    (place / "merged" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    load_result(place / "merged").save(place / "again", "coefficients")
    assert record(place / "again")["sha256"]["model"] == hashes(place / "base")
    assert "headers" not in record(place / "again")
    double(place / "base" / "model.safetensors")
    with pytest.raises(ValueError, match="model: .*base has changed since it was merged"):
        load_result(place / "merged")


@pytest.mark.parametrize("headers", [{"model": ["model.safetensors"]}, ["model"]])
def test_a_record_that_is_none_is_refused(place, headers):
    assert main(["run", str(place / "recipe.yaml"), *SHORT]) == 0
    recipe = yaml.safe_load((place / "merged" / "recipe.yaml").read_text())
    recipe["record"]["headers"] = headers
    (place / "merged" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ValueError, match=r"result: .*recipe\.yaml: record\.headers: expected digests by file name"):
        load_result(place / "merged")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "expected format nsc_merge.coefficients version 1, found 'other'"),
        ({"version": 2}, "expected version 1 of the format, found 2; read it with the nsc_merge that wrote it"),
        ({"method": None}, "expected a method's name and its options"),
        ({"options": []}, "expected a method's name and its options"),
        ({"tasks": ["nli", "nli"]}, "expected names of tasks, each once"),
        ({"tasks": [], "coefficients": {"a": {}}}, "expected names of tasks, each once"),
        ({"dead": {"a": ["other"]}}, "dead: expected names of tasks by module"),
        ({"coefficients": {"a": {"nli": True, "topic": 1.0}}}, "a: nli: expected a number, found True"),
        ({"coefficients": {"a": {"nli": float("nan"), "topic": 1.0}}}, "a: nli: expected a number, found nan"),
    ],
)
def test_documents_that_do_not_hold_together_are_refused(tmp_path, change, message):
    good = {"format": "nsc_merge.coefficients", "version": 1, "method": "nsc", "options": {}, "dead": {}}
    good |= {"tasks": ["nli", "topic"], "coefficients": {"a": {"nli": 0.5, "topic": 0.5}}}
    (tmp_path / "coefficients.json").write_text(json.dumps({**good, **change}))
    with pytest.raises(ValueError, match=f"result: .*{message}"):
        load_result(tmp_path)
    (tmp_path / "coefficients.json").write_text(json.dumps(good)[:-1] + ', "method": "dare"}')
    with pytest.raises(ValueError, match="the key 'method' is given twice"):
        load_result(tmp_path)


def test_a_merge_of_relative_paths_is_saved_alike_from_another_folder(tmp_path, monkeypatch):
    model = build("llama-cls")
    model.save_pretrained(tmp_path / "there" / "models" / "base")
    (tmp_path / "there" / "models" / "base" / "tokenizer.json").write_text("{}")
    write_adapter(model, tmp_path / "there" / "adapters" / "a", seed=1, target_modules=["q_proj"], r=2)
    # Another base and another adapter by the same names, where the save is made.
    (tmp_path / "here" / "models" / "base").mkdir(parents=True)
    (tmp_path / "here" / "models" / "base" / "tokenizer.json").write_text('{"other": 1}')
    (tmp_path / "here" / "adapters" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "there")
    result = nsc_merge.merge(type(model).from_pretrained("models/base"), {"a": "adapters/a"}, method="task_arithmetic")
    one = result.save(tmp_path / "one", "lora")
    monkeypatch.chdir(tmp_path / "here")
    other = result.save(tmp_path / "other", "lora")
    assert contents(one) == contents(other)
    assert (other / "tokenizer.json").read_text() == "{}"
    told = yaml.safe_load((other / "recipe.yaml").read_text())
    assert told["model"] == str(tmp_path / "there" / "models" / "base")
    assert told["adapters"] == {"a": str(tmp_path / "there" / "adapters" / "a")}


def test_an_embedding_of_rank_1_is_saved(tmp_path):
    """Its factor lies across, and is contiguous to PyTorch for all that: the record's digest of it raised."""
    model = build("llama-cls")
    config = peft.LoraConfig(r=1, target_modules=["embed_tokens"], init_lora_weights=False)
    peft.get_peft_model(build("llama-cls"), config).save_pretrained(tmp_path / "adapter")
    result = nsc_merge.merge(model, {"a": tmp_path / "adapter"}, method="task_arithmetic", scale=1.0)
    result.save(tmp_path / "merged", format="lora")
    merged = load_file(tmp_path / "merged" / WEIGHTS)
    (update,) = (result.delta(path) for path in result.adapters["a"].factors)
    A, B = (next(value for name, value in merged.items() if f"embedding_{part}" in name) for part in "AB")
    torch.testing.assert_close((B @ A).t().double(), update.double().reshape(A.shape[1], B.shape[0]))
