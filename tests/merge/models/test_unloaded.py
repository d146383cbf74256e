"""A base whose weights stay in its files: shapes, dtypes and ties as if loaded, numbers when asked for."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
import zoo
from safetensors.torch import load_file, save_file

import nsc_merge
from nsc_merge.models.bases.loading import base_files, load_model
from nsc_merge.models.bases.placement import Placement
from nsc_merge.models.bases.stored_weights import numbers_of, sharing, stored
from nsc_merge.models.bases.unloaded import Rewritten, saved_names

FILE = "model.safetensors"


def load(folder, **settings):
    return load_model(str(folder), local=True, placement=Placement(device="cpu", **settings))


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**zoo.DECODER, **zoo.TOKENS, tie_word_embeddings=True)).bfloat16()
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    return tmp_path / "base"


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_every_number_is_that_of_the_loaded_model(folder, dtype):
    found, loaded = load(folder, numbers=False, dtype=dtype), load(folder, dtype=dtype)
    assert {value.device.type for value in found.parameters()} == {"meta"}
    assert sharing(found) == sharing(loaded)
    assert found.config.to_dict() == loaded.config.to_dict()
    assert base_files(found) == base_files(loaded)
    state = found.state_dict()
    assert state.keys() == loaded.state_dict().keys()
    for name, value in loaded.state_dict().items():
        assert (state[name].dtype, state[name].shape) == (value.dtype, value.shape)
        assert torch.equal(numbers_of(found, name, state[name]), value)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(stored(found, name).rows(3, 7), loaded.get_parameter(name)[3:7])


@pytest.mark.parametrize("dora", ["exact", "convert"])
def test_what_the_fit_looks_at_is_read_from_the_files(folder, tmp_path, dora):
    """DoRA's norms need the weight, and a module trained in full is its update plus the base."""
    base = load(folder)
    scaled = zoo.write_adapter(base, tmp_path / "dora", 1, target_modules=["v_proj"], use_dora=True)
    full = zoo.write_adapter(base, tmp_path / "full", 2, target_modules=["q_proj"], modules_to_save=["o_proj"])
    results = [
        nsc_merge.merge(model, {"dora": scaled, "full": full}, method="task_arithmetic", dora=dora)
        for model in (base, load(folder, numbers=False))
    ]
    for format, file in (("lora", "adapter_model.safetensors"), ("coefficients", "coefficients.json")):
        places = [one.save(tmp_path / f"{format}{at}", format) for at, one in enumerate(results)]
        assert (places[0] / file).read_bytes() == (places[1] / file).read_bytes()


def test_it_can_be_neither_changed_nor_run(folder, tmp_path):
    model = load(folder, numbers=False)
    adapter = zoo.write_adapter(load(folder), tmp_path / "a", 1, target_modules=["v_proj"])
    result = nsc_merge.merge(model, {"a": adapter}, method="task_arithmetic")
    for change in (lambda: result.apply(model), lambda: nsc_merge.attach(model, result.adapters, 1.0).__enter__()):
        with pytest.raises(ValueError, match="model: its weights were left in their files.*AutoModel.from_pretrained"):
            change()
    # Whatever is made of it otherwise has no numbers.
    with pytest.raises(ValueError, match="found the meta device"):
        nsc_merge.merge(copy.deepcopy(model), {"a": adapter}, method="task_arithmetic").save(tmp_path / "out", "model")
    # Where it is loaded, it is the same merge.
    assert torch.isfinite(zoo.outputs(result.apply(load(folder)), zoo.text(0))).all()


def test_ties_that_depend_on_the_numbers_are_loaded(folder, caplog):
    held = {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
    for file in folder.glob(f"{FILE[:5]}*"):
        file.unlink()
    save_file({**held, "lm_head.weight": held["model.embed_tokens.weight"] + 1}, folder / FILE, {"format": "pt"})
    caplog.set_level("INFO", logger="nsc_merge")
    model = load(folder, numbers=False)
    assert "is loaded with its weights: its files hold lm_head.weight beside model.embed_tokens.weight" in caplog.text
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def halved(state):
    name = "model.layers.0.mlp.up_proj.weight"
    first, second = state.pop(name).chunk(2)
    return {**state, f"{name}.0": first.clone(), f"{name}.1": second.clone()}


def joined(state):
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    return {**state, "qkv": torch.cat([state.pop(name) for name in names])}


def shifted(state):
    return {**state, "model.norm.weight": state["model.norm.weight"] - 1}


@pytest.mark.parametrize("change", [halved, joined, shifted])
def test_tensors_that_are_not_saved_as_they_are_are_noticed(folder, tmp_path, monkeypatch, change):
    """And what was saved in the place of weights is gone."""
    model = load(folder)
    as_they_are = model.save_pretrained
    monkeypatch.setattr(
        model, "save_pretrained", lambda place, state_dict: as_they_are(place, state_dict=change(dict(state_dict)))
    )
    (tmp_path / "out").mkdir()
    with pytest.raises(Rewritten, match="transformers makes .* of one or more tensors"):
        saved_names(model, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_saved_merge_is_exported_without_them(folder, tmp_path):
    adapter = zoo.write_adapter(load(folder), tmp_path / "a", 1, target_modules=["v_proj"])
    merge = nsc_merge.merge(load(folder), {"a": adapter}, method="task_arithmetic")
    kept = merge.save(tmp_path / "kept", "coefficients")
    result = nsc_merge.load_result(kept, numbers=False)
    assert {value.device.type for value in result.model.parameters()} == {"meta"}
    out = [one.save(tmp_path / str(at), "model") for at, one in enumerate((result, nsc_merge.load_result(kept)))]
    for file in out[0].glob("model*"):
        assert file.read_bytes() == (out[1] / file.name).read_bytes()
