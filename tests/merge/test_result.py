"""Applying and saving a result: every form gives the same outputs as the attached merge."""

from __future__ import annotations

import copy
import dataclasses
import json
import os

import pytest
import torch
from peft import PeftModel
from transformers import ViTModel

import nsc_merge
from nsc_merge.export import serving_notes


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


def test_what_a_server_must_be_told(result):
    assert serving_notes(result) == ["the adapter has rank 11; vLLM: --enable-lora --max-lora-rank 16"]
    assert "--max-lora-rank 8" in serving_notes(result, 5)[0]


def test_heads_whose_names_collide_are_refused(result, tmp_path):
    head = {"classifier.weight": torch.zeros(2, 2)}
    adapters = {
        name: dataclasses.replace(adapter, trained=head)
        for name, adapter in zip(("a/b", "a_b", "../c"), result.adapters.values(), strict=True)
    }
    rows = {path: dict(zip(adapters, row.values(), strict=True)) for path, row in result.coefficients.items()}
    renamed = dataclasses.replace(result, adapters=adapters, coefficients=rows)
    with pytest.raises(ValueError, match=r"adapters\['a_b'\]: another task's head is kept as a_b"):
        renamed.save(tmp_path / "out", "coefficients")
    del adapters["a_b"]
    folder = renamed.save(tmp_path / "out", "coefficients")
    assert sorted(path.name for path in (folder / "heads").iterdir()) == ["_c.safetensors", "a_b.safetensors"]
