"""Applying and saving a result: every form gives the same outputs as the attached merge."""

from __future__ import annotations

import copy
import dataclasses
import json
import os

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import ViTModel
from zoo import build

import nsc_merge


@pytest.fixture
def result(model, folders, calibration):
    return nsc_merge.merge(model, folders, calibration, steps=5, lr=0.05, progress=False)


@pytest.fixture
def expected(model, result, images):
    with nsc_merge.attach(model, result.adapters, 0.4) as merged, torch.no_grad():
        for path, module in merged.items():
            module.lam.copy_(torch.tensor(list(result.coefficients[path].values())))
        return model(pixel_values=images).last_hidden_state


def outputs(model, images):
    with torch.no_grad():
        return model.eval()(pixel_values=images).last_hidden_state


def test_it_prints_as_what_it_is_and_not_as_its_numbers(result):
    adapter = next(iter(result.adapters.values()))
    factor = nsc_merge.Factor(torch.zeros(2, 8), torch.zeros(4, 2, dtype=torch.bfloat16), 0.5)
    assert repr(result).startswith("MergeResult(method='nsc', options={")
    assert repr(adapter).startswith("Adapter(name=")
    assert max(len(repr(result)), len(repr(adapter))) < 2500
    assert repr(factor) == "Factor(A: [2, 8] torch.float32, B: [4, 2] torch.bfloat16, scaling: 0.5)"


def test_apply(model, result, expected, images):
    torch.testing.assert_close(
        outputs(result.apply(copy.deepcopy(model)), images), expected, rtol=2e-5, atol=2e-5
    )


def test_lora_reloads_through_peft_with_the_same_outputs(model, result, expected, images, tmp_path):
    folder = result.save(tmp_path / "merged", format="lora")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == 4 + 3 + 4
    assert set(config["rank_pattern"].values()) == {4 + 3, 4 + 6}
    peft_model = PeftModel.from_pretrained(copy.deepcopy(model), folder)
    torch.testing.assert_close(outputs(peft_model, images), expected, rtol=2e-5, atol=2e-5)


def test_lora_can_be_merged_again(model, result, expected, images, tmp_path):
    folder = result.save(tmp_path / "merged", format="lora")
    again = nsc_merge.merge(model, {"all": folder}, method="task_arithmetic", scale=1.0)
    torch.testing.assert_close(
        outputs(again.apply(copy.deepcopy(model)), images), expected, rtol=2e-5, atol=2e-5
    )


def test_model_reloads_through_transformers(model, result, expected, images, tmp_path):
    before = copy.deepcopy(model.state_dict())
    folder = result.save(tmp_path / "full", format="model")
    reloaded = ViTModel.from_pretrained(folder, add_pooling_layer=False)
    torch.testing.assert_close(outputs(reloaded, images), expected, rtol=2e-5, atol=2e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_coefficients_and_history(result, tmp_path):
    folder = result.save(tmp_path / "c", format="coefficients")
    document = json.loads((folder / "coefficients.json").read_text())
    assert document["coefficients"] == result.coefficients
    assert document["tasks"] == result.tasks
    assert document["dead"] == result.dead
    lines = (folder / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.history
    assert set(result.history[0]) == {
        "step",
        "objective",
        "omega",
        "lambda_min",
        "lambda_mean",
        "lambda_max",
        "seconds",
    }


def test_single_adapter_at_one_is_that_adapter(model, folders, images):
    for task, folder in folders.items():
        alone = nsc_merge.merge(model, {task: folder}, method="task_arithmetic", scale=1.0)
        oracle = PeftModel.from_pretrained(copy.deepcopy(model), folder)
        ours = outputs(alone.apply(copy.deepcopy(model)), images)
        torch.testing.assert_close(ours, outputs(oracle, images), rtol=2e-5, atol=2e-5)


def test_a_failed_save_leaves_the_folder_untouched(result, tmp_path, monkeypatch):
    out = tmp_path / "kept"
    result.save(out, format="coefficients")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match="format: expected one of"):
        result.save(out, format="gguf")

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        result.save(out, format="lora")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert os.listdir(tmp_path).count("kept") == 1
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".kept")]


def test_apply_to_another_model_fails_before_writing(result, model):
    other = ViTModel(
        type(model.config)(**{**model.config.to_dict(), "hidden_size": 16}), add_pooling_layer=False
    )
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="to fit the model"):
        result.apply(other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_what_no_dtype_holds_is_refused_before_anything_is_written(model, folders, tmp_path):
    """Coefficients are numbers of float64, weights are not."""
    huge = nsc_merge.merge(model, folders, method="task_arithmetic", scale=1e39)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"\.weight: the merged values are not finite in torch.float32"):
        huge.apply(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for form in ("lora", "model"):
        with pytest.raises(ValueError, match=r"(lora_[AB]\.weight: |merged values are )not finite in torch.float32"):
            huge.save(tmp_path / form, format=form)
        assert not (tmp_path / form).exists()
    half = copy.deepcopy(model).half()
    with pytest.raises(ValueError, match=r"not finite in torch.float16"):
        nsc_merge.merge(model, folders, method="task_arithmetic", scale=1e6).apply(half)


def test_model_and_adapter_do_not_share_a_folder(result, tmp_path):
    result.save(tmp_path / "lora", format="lora")
    with pytest.raises(ValueError, match="holds an adapter"):
        result.save(tmp_path / "lora", format="model")
    result.save(tmp_path / "model", format="model")
    with pytest.raises(ValueError, match="holds a model"):
        result.save(tmp_path / "model", format="lora")


def test_shards_of_an_earlier_save_go(model, result, expected, images, tmp_path):
    folder = result.save(tmp_path / "model", "model", max_shard_size="20KB")
    (folder / "mine.safetensors").write_bytes(b"kept")
    assert len(list(folder.glob("model-*"))) > 1
    result.save(folder, "model")
    assert sorted(path.name for path in folder.glob("*.safetensors*")) == ["mine.safetensors", "model.safetensors"]
    reloaded = ViTModel.from_pretrained(folder, add_pooling_layer=False)
    torch.testing.assert_close(outputs(reloaded, images), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "0.5", "abc", "5GiB", ""])
def test_a_size_that_is_none_is_refused_before_anything_is_written(result, tmp_path, size):
    with pytest.raises(ValueError, match=f"^max_shard_size: expected bytes, or a size such as '5GB', found {size!r}$"):
        result.save(tmp_path / "model", "model", max_shard_size=size)
    assert not list(tmp_path.glob("model*"))


def test_truncation_is_the_best_of_its_rank_and_exact_at_full_rank(model, result, images, tmp_path):
    assert set(result.rank_errors(11).values()) == {0.0}
    for path, error in result.rank_errors(2).items():
        sigma = torch.linalg.svdvals(result.delta(path))
        assert error == pytest.approx(float(sigma[2:].norm() / sigma.norm()), rel=1e-6)
    folder = result.save(tmp_path / "two", "lora", rank=2)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 2
    truncated = nsc_merge.load_adapter(folder, "two").factors
    for path, error in result.rank_errors(2).items():
        exact = result.delta(path)
        assert float((truncated[path].delta() - exact).norm() / exact.norm()) == pytest.approx(error, abs=1e-6)
    PeftModel.from_pretrained(copy.deepcopy(model), folder)


def test_the_card_counts_the_errors_of_every_task(model, folders, tmp_path):
    folder = nsc_merge.merge(model, folders, method="finetuned").save(tmp_path / "alone", "lora", rank=2)
    errors = {
        f"tasks/{task}/{path}": error
        for task in folders
        for path, error in json.loads((folder / "tasks" / task / "truncation.json").read_text())[
            "relative_error"
        ].items()
    }
    worst = max(errors, key=errors.get)
    told = f"{sum(errors.values()) / len(errors):.3g} on average, {errors[worst]:.3g} at most (`{worst}`)"
    assert told in (folder / "README.md").read_text()


def test_the_card_says_how_the_update_was_found(model, folders, calibration, tmp_path):
    ties = nsc_merge.merge(model, folders, method="ties").save(tmp_path / "ties", "lora", rank=2)
    found = "Method: `ties` (TIES-Merging, Yadav et al. 2023, arXiv 2306.01708). All settings are in `recipe.yaml`."
    assert found in (ties / "README.md").read_text()
    learnt = nsc_merge.merge(model, folders, calibration, steps=2, progress=False)
    cards = [learnt.save(tmp_path / "nsc", "lora"), learnt.scaled(0.5).save(tmp_path / "half", "lora")]
    found, half = [(folder / "README.md").read_text() for folder in cards]
    # The objective was measured at the coefficients found, and not at half of them.
    assert f"{learnt.course}." in found.splitlines()
    assert "null-space ratio" not in half
    for card in (found, half):
        assert "The coefficients were found by null-space compression" in card
        assert "Method:" not in card


def test_biases_beside_an_embedding_are_no_adapter_that_peft_loads(tmp_path):
    """Biases are of a whole adapter there: what was saved of the two tasks could not be loaded."""
    model = build("llama-cls")
    for name, options in (("rows", {"target_modules": ["embed_tokens"]}), ("biased", {"target_modules": ["q_proj"]})):
        config = LoraConfig(r=2, lora_bias=name == "biased", init_lora_weights=False, **options)
        get_peft_model(build("llama-cls"), config).save_pretrained(tmp_path / name)
    result = nsc_merge.merge(model, {name: tmp_path / name for name in ("rows", "biased")}, method="task_arithmetic")
    with pytest.raises(ValueError, match=r"embed_tokens is an embedding, .* no adapter with biases .* format 'model'"):
        result.save(tmp_path / "lora", "lora")
    assert not (tmp_path / "lora").exists()
    alone = nsc_merge.merge(model, {"rows": tmp_path / "rows"}, method="task_arithmetic").save(tmp_path / "one", "lora")
    PeftModel.from_pretrained(build("llama-cls"), alone)


@pytest.mark.parametrize(("method", "rank"), [("svd", None), ("ties", 2)])
def test_a_bias_without_an_update_is_saved_and_read_again(model, write_adapter, method, rank, tmp_path):
    adapter = nsc_merge.load_adapter(write_adapter("a", 1, lora_bias=True), "a")
    for factor in adapter.factors.values():
        factor.B.zero_()
    result = nsc_merge.merge(model, {"a": adapter}, method=method)
    folder = result.save(tmp_path / "out", "lora", rank=rank)
    PeftModel.from_pretrained(copy.deepcopy(model), folder)
    for path, factor in nsc_merge.load_adapter(folder, "out").factors.items():
        assert not factor.delta().any()
        torch.testing.assert_close(factor.bias_delta(), adapter.factors[path].bias_delta())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": []}, "format: expected one or more of"),
        ({"format": ["lora", "gguf"]}, "format: expected one of .* found 'gguf'"),
        ({"format": "lora", "rank": 0}, "rank: expected a whole number of at least 1, found 0"),
        ({"format": "model", "rank": 4}, "rank: only format 'lora' can be truncated"),
    ],
)
def test_bad_arguments_of_save_write_nothing(result, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        result.save(tmp_path / "out", **arguments)
    assert list(tmp_path.glob("*out*")) == []


def test_what_needs_the_base_is_refused_after_apply_changed_it(model, result, expected, images, folders, tmp_path):
    other, base = nsc_merge.merge(model, folders, method="task_arithmetic"), copy.deepcopy(model)
    result.apply(copy.deepcopy(model))
    result.save(tmp_path / "before", "model")
    result.apply(model)
    for made_before in (result, result.scaled(0.5), other, copy.deepcopy(result)):
        with pytest.raises(ValueError, match="model: apply has changed it since this merge was made"):
            made_before.save(tmp_path / "after", "model")
    assert not (tmp_path / "after").exists()

    lora = PeftModel.from_pretrained(base, result.save(tmp_path / "lora", "lora"))
    torch.testing.assert_close(outputs(lora, images), expected, rtol=2e-5, atol=2e-5)
    again = nsc_merge.merge(model, folders, method="task_arithmetic", scale=0.1)
    reloaded = ViTModel.from_pretrained(again.save(tmp_path / "again", "model"), add_pooling_layer=False)
    torch.testing.assert_close(outputs(reloaded, images), outputs(again.apply(model), images), rtol=2e-5, atol=2e-5)


def test_an_adapter_that_holds_whole_linears_needs_the_base_too(model, write_adapter, tmp_path):
    folder = write_adapter("whole", 1, target_modules=["q_proj"], modules_to_save=["o_proj"])
    result = nsc_merge.merge(model, {"whole": folder}, method="task_arithmetic")
    assert {path.rpartition(".")[2] for path in result.rank_errors(2)} == {"q_proj"}
    result.apply(model)
    with pytest.raises(ValueError, match="model: apply has changed it"):
        result.save(tmp_path / "out", "lora")
    result.save(tmp_path / "out", "coefficients")


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("inside", [False, True])
def test_another_merge_leaves_nothing_of_the_one_before(model, folders, result, tmp_path, monkeypatch, inside):
    heads = {
        task: dataclasses.replace(adapter, trained={"classifier.weight": torch.zeros(2, 2)})
        for task, adapter in result.adapters.items()
    }
    out = tmp_path / "out"
    dataclasses.replace(result, adapters=heads).save(out, ["lora", "model"], rank=2, plots=True)
    mine = {"notes.txt", "model/tokenizer.json", "lora/deep/x", "heads/mine.safetensors", "tasks/plan"}
    for name in mine:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    if inside:
        monkeypatch.chdir(out)
    nsc_merge.merge(model, folders, method="finetuned").save(out, ["lora"])
    ours = {"recipe.yaml", "README.md"}
    kinds = ("config.json", "model.safetensors")
    of_tasks = {f"tasks/{task}/lora/adapter_{kind}" for task in folders for kind in kinds}
    assert files(out) == ours | of_tasks | mine
    nsc_merge.merge(model, folders, method="ties").save(out, ["model"])
    assert files(out) == ours | {"model/config.json", "model/model.safetensors"} | mine
    assert not (out / "tasks" / "plain").exists()
    assert {(out / name).read_text() for name in mine} == {"mine"}


def test_what_is_recorded_is_there_and_a_truncation_that_is_no_more_leaves_no_errors(result, tmp_path):
    out = result.save(tmp_path / "out", "lora", rank=2)
    assert "truncation.json" in files(out)
    result.save(out, "lora")
    assert "truncation.json" not in files(out)
    assert set(yaml.safe_load((out / "recipe.yaml").read_text())["record"]["files"]) == files(out)


def test_one_merge_can_be_saved_to_one_folder_in_turns(model, folders, result, tmp_path):
    out = result.save(tmp_path / "out", "coefficients", plots=True)
    before = files(out)
    result.save(out, "lora")
    assert files(out) == before | {"adapter_config.json", "adapter_model.safetensors"}
    nsc_merge.merge(model, folders, method="task_arithmetic").save(out, ["lora"])
    assert files(out) == before - {"history.jsonl", "ratios.png", "coefficients.png"} | {
        "lora/adapter_config.json",
        "lora/adapter_model.safetensors",
    }


def test_a_recipe_that_is_no_record_of_ours_and_files_beside_it_stay(result, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("config.json", "model.safetensors", "truncation.json"):
        (out / name).write_text("mine")
    (out / "recipe.yaml").write_text("model: .\nrecord: {files: [config.json]}\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml is there and no earlier merge's"):
        result.save(out, ["lora"])
    (out / "recipe.yaml").unlink()
    result.save(out, ["lora"])
    assert {(out / name).read_text() for name in ("config.json", "model.safetensors", "truncation.json")} == {"mine"}


def test_coefficients_of_another_method_than_the_recipe_are_refused(model, folders, result, tmp_path):
    model.save_pretrained(tmp_path / "base")
    model = ViTModel.from_pretrained(tmp_path / "base", add_pooling_layer=False)
    out = nsc_merge.merge(model, folders, method="task_arithmetic").save(tmp_path / "out", "coefficients")
    assert nsc_merge.load_result(out).method == "task_arithmetic"
    document = json.loads((out / "coefficients.json").read_text())
    (out / "coefficients.json").write_text(json.dumps({**document, "method": "nsc"}))
    with pytest.raises(ValueError, match=r"parts of two merges: coefficients.json is of method 'nsc', recipe.yaml of"):
        nsc_merge.load_result(out)
