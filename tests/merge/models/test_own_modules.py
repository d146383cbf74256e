"""Modules trained in full: the base's own are merged, a task's head is kept, and weights beside an adapter count."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file, save_file
from zoo import DECODER, KINDS, LANGUAGE, build, outputs, text, write_adapter

import nsc_merge
from nsc_merge.models.fitting import fit
from nsc_merge.recipes.run import remarks_on

TOLERANCE = {"rtol": 5e-5, "atol": 5e-5}
WEIGHTS = "adapter_model.safetensors"
CONVERTED = "non_lora_trainables.safetensors"
SHARED = "trained in full, the base's own: shared and merged"


def head_adapters(model, tmp_path, kind="llama"):
    targets = LANGUAGE if kind == "llava" else ["q_proj", "v_proj"]
    return {
        task: write_adapter(model, tmp_path / task, seed, r=4, target_modules=targets, modules_to_save=["lm_head"])
        for seed, task in enumerate(("code", "chat"), 1)
    }


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "llava"])
def test_one_trained_head_with_coefficient_1_is_the_trained_model(kind, tmp_path):
    model, inputs = build(kind), KINDS[kind].inputs(3)
    folder = head_adapters(model, tmp_path, kind)["code"]
    wanted = outputs(PeftModel.from_pretrained(copy.deepcopy(model), folder), inputs)
    result = nsc_merge.merge(model, {"code": folder}, method="task_arithmetic", scale=1.0)
    assert result.adapters["code"].trained == {}
    torch.testing.assert_close(outputs(result.apply(copy.deepcopy(model)), inputs), wanted, **TOLERANCE)
    with nsc_merge.attach(model, result.adapters, 1.0):
        torch.testing.assert_close(outputs(model, inputs), wanted, **TOLERANCE)
    loaded = type(model).from_pretrained(result.save(tmp_path / "model", "model"))
    torch.testing.assert_close(outputs(loaded, inputs), wanted, **TOLERANCE)
    lora = PeftModel.from_pretrained(copy.deepcopy(model), result.save(tmp_path / "lora", "lora"))
    torch.testing.assert_close(outputs(lora, inputs), wanted, **TOLERANCE)
    assert f"code: lm_head: {SHARED}" in (tmp_path / "lora" / "README.md").read_text()
    in_memory = PeftModel.from_pretrained(copy.deepcopy(model), folder)
    again = nsc_merge.merge(model, {"code": in_memory}, method="task_arithmetic", scale=1.0)
    assert all(torch.equal(again.delta(path), result.delta(path)) for path in result.paths)
    assert f"code: lm_head: {SHARED} (shared_modules)" in remarks_on(model, result.adapters)


@pytest.mark.parametrize(("policy", "shares"), [("mean", (0.5, 0.5)), ("first", (1.0, 0.0)), ("lambda", (0.3, 0.3))])
def test_heads_of_a_language_model_by_policy(policy, shares, tmp_path):
    model = build("llama")
    folders = head_adapters(model, tmp_path)
    result = nsc_merge.merge(model, folders, method="task_arithmetic", scale=0.3, shared_modules=policy)
    base = model.lm_head.weight.double()
    heads = [load_file(folder / WEIGHTS)["base_model.model.lm_head.weight"].double() for folder in folders.values()]
    wanted = base + sum(share * (head - base) for share, head in zip(shares, heads, strict=True))
    merged = result.apply(copy.deepcopy(model)).lm_head.weight
    torch.testing.assert_close(merged.double(), wanted, rtol=1e-6, atol=1e-7)


def test_a_classifier_is_the_task_s_and_says_so(tmp_path):
    model = build("llama-cls")
    folder = write_adapter(model, tmp_path / "a", 1, r=4, target_modules=["q_proj"], task_type="SEQ_CLS")
    fitted = fit({"a": nsc_merge.load_adapter(folder, "a")}, model)
    assert list(fitted["a"].trained) == ["score.weight"]
    assert fitted["a"].notes == ("score: trained in full, the task's own head: kept in heads/, not merged",)
    # A recipe fits when it loads, and when it merges.
    assert fit(fitted, model)["a"].notes == fitted["a"].notes


def test_a_tied_head_trained_on_its_own_is_refused_where_nobody_unties_the_base(tmp_path):
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER, tie_word_embeddings=True)).eval()
    adapters = {"code": nsc_merge.load_adapter(head_adapters(model, tmp_path)["code"], "code")}
    with pytest.raises(ValueError, match=r"lm_head was trained in full .* is model.embed_tokens.weight too \(tied\)"):
        fit(adapters, model)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    assert "lm_head" in fit(adapters, model)["code"].factors


def test_other_kinds_of_modules_trained_in_full_are_refused_with_the_cure(tmp_path):
    model = build("vit")
    folder = write_adapter(model, tmp_path / "a", 1, r=4, target_modules="all-linear", modules_to_save=["embeddings"])
    with pytest.raises(ValueError, match=r"found ViTEmbeddings with .*cls_token.*train without it in modules_to_save"):
        nsc_merge.merge(model, {"a": folder}, method="task_arithmetic")


WHOLE = ["embed_tokens", "norm", "input_layernorm", "lm_head"]


def test_embeddings_and_norms_are_merged_as_peft_runs_them(tmp_path):
    model, inputs = build("llama"), text(3)
    folders = {
        task: write_adapter(model, tmp_path / task, seed, r=4, target_modules=["q_proj"], modules_to_save=WHOLE)
        for seed, task in enumerate(("a", "b"), 1)
    }
    wanted = outputs(PeftModel.from_pretrained(copy.deepcopy(model), folders["b"]).double(), inputs)
    result = nsc_merge.merge(model, folders, method="task_arithmetic", scale={"a": 0.0, "b": 1.0})
    exact = copy.deepcopy(model).double()
    with nsc_merge.attach(exact, result.adapters, {"a": 0.0, "b": 1.0}):
        torch.testing.assert_close(outputs(exact, inputs), wanted, rtol=1e-5, atol=1e-6)
    loaded = type(model).from_pretrained(result.save(tmp_path / "model", "model"))
    torch.testing.assert_close(outputs(loaded.double(), inputs), wanted, rtol=1e-5, atol=1e-6)
    lora = PeftModel.from_pretrained(copy.deepcopy(model), result.save(tmp_path / "lora", "lora"))
    torch.testing.assert_close(outputs(lora.double(), inputs), wanted, rtol=1e-5, atol=1e-6)
    halves = nsc_merge.merge(model, folders, method="task_arithmetic", shared_modules="mean")
    norms = [load_file(folder / WEIGHTS)["base_model.model.model.norm.weight"] for folder in folders.values()]
    merged = halves.apply(copy.deepcopy(model)).model.norm.weight
    torch.testing.assert_close(merged, (norms[0] + norms[1]) / 2, rtol=1e-6, atol=1e-6)


def test_modules_saved_in_full_with_the_base_s_values_are_left_out(tmp_path):
    """As mergekit-extract-lora writes: what it does not decompose is in modules_to_save, mostly as the base has it."""
    model, inputs = build("llama"), text(3)
    folder = write_adapter(model, tmp_path / "a", 1, r=4, target_modules=["q_proj"], modules_to_save=WHOLE)
    weights = load_file(folder / WEIGHTS)
    held = model.state_dict()
    for key in weights:
        name = key.removeprefix("base_model.model.")
        if name in held and name != "model.norm.weight":
            weights[key] = held[name].clone()
    save_file(weights, folder / WEIGHTS)
    wanted = outputs(PeftModel.from_pretrained(copy.deepcopy(model), folder), inputs)
    result = nsc_merge.merge(model, {"a": folder}, method="task_arithmetic", scale=1.0)
    assert [path for path in result.paths if "q_proj" not in path] == ["model.norm"]
    assert "lm_head: saved in full with the base's values: left out" in result.adapters["a"].notes
    torch.testing.assert_close(outputs(result.apply(model), inputs), wanted, **TOLERANCE)


def test_a_head_that_the_bare_model_lacks_is_kept_and_named(tmp_path):
    model = build("llama")
    folder = head_adapters(model, tmp_path)["code"]
    result = nsc_merge.merge(model.model, {"code": folder}, method="task_arithmetic")
    (note,) = result.adapters["code"].notes
    assert note == "lm_head: trained in full, not in LlamaModel: kept in heads/, not merged"


def test_what_is_not_in_the_model_is_no_head(tmp_path):
    model = build("llama")
    folder = write_adapter(model, tmp_path / "a", 1, r=4, target_modules=["q_proj"], modules_to_save=["up_proj"])
    weights = load_file(folder / WEIGHTS)
    weights = {key.replace("up_proj", "xup_proj"): value for key, value in weights.items()}
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"mlp.xup_proj.weight was trained in full, .*no such parameter"):
        nsc_merge.merge(model, {"a": folder}, method="task_arithmetic")


def llava_folder(model, tmp_path, prefix="base_model.model.model.", dtype=torch.float32):
    """An adapter as LLaVA's training code writes it, with its projector converted; and the trained model."""
    folder = write_adapter(
        model, tmp_path / "llava", 1, r=4, target_modules=LANGUAGE, modules_to_save=["multi_modal_projector"]
    )
    trained = PeftModel.from_pretrained(copy.deepcopy(model), folder)
    lora, beside = {}, {}
    for key, value in load_file(folder / WEIGHTS).items():
        for number, name in enumerate(("linear_1", "linear_2")):
            projector = f"base_model.model.model.multi_modal_projector.{name}."
            if key.startswith(projector):
                beside[f"{prefix}mm_projector.{2 * number}.{key.removeprefix(projector)}"] = value.to(dtype)
        if "projector" not in key:
            lora[key.replace("model.language_model.layers", "model.layers")] = value
    assert len(beside) == 4
    save_file(lora, folder / WEIGHTS)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"modules_to_save": None, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(beside, folder / CONVERTED)
    return folder, trained


@pytest.mark.parametrize("prefix", ["base_model.model.model.", "model.", ""])
def test_llava_s_projector_beside_the_adapter_is_merged(prefix, tmp_path):
    model, inputs = build("llava"), KINDS["llava"].inputs(3)
    folder, trained = llava_folder(model, tmp_path, prefix)
    wanted = outputs(trained, inputs)
    result = nsc_merge.merge(model, {"vqa": folder}, method="task_arithmetic", scale=1.0)
    projectors = [f"model.multi_modal_projector.linear_{number}" for number in (1, 2)]
    assert [path for path in result.paths if "projector" in path] == projectors
    torch.testing.assert_close(outputs(result.apply(copy.deepcopy(model)), inputs), wanted, **TOLERANCE)
    lora = PeftModel.from_pretrained(copy.deepcopy(model), result.save(tmp_path / "out", "lora"))
    torch.testing.assert_close(outputs(lora, inputs), wanted, **TOLERANCE)


def test_a_projector_of_another_shape_or_place_is_refused(tmp_path):
    model = build("llava")
    folder, _ = llava_folder(model, tmp_path)
    beside = load_file(folder / CONVERTED)
    save_file({key: value[:5].clone() for key, value in beside.items()}, folder / CONVERTED)
    with pytest.raises(ValueError, match=r"multi_modal_projector.linear_1.*: expected shape \[32.*found \[5"):
        nsc_merge.merge(model, {"vqa": folder}, method="task_arithmetic")
    save_file({key.replace(".2.", ".4."): value for key, value in beside.items()}, folder / CONVERTED)
    with pytest.raises(ValueError, match=r"model.mm_projector.4.* was trained in full, but Llava.* has no such"):
        nsc_merge.merge(model, {"vqa": folder}, method="task_arithmetic")
    (folder / CONVERTED).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not valid safetensors"):
        nsc_merge.merge(model, {"vqa": folder}, method="task_arithmetic")


@pytest.mark.parametrize("file", ["non_lora_trainables.bin", "mm_projector.bin"])
def test_pickled_weights_beside_an_adapter_are_refused_with_the_command_that_converts_them(file, tmp_path, monkeypatch):
    model, inputs = build("llava"), KINDS["llava"].inputs(3)
    folder, trained = llava_folder(model, tmp_path)
    torch.save(load_file(folder / CONVERTED), folder / file)
    (folder / CONVERTED).unlink()
    with pytest.raises(ValueError, match=rf"{file} holds weights trained beside LoRA.* python -c") as error:
        nsc_merge.merge(model, {"vqa": folder}, method="task_arithmetic")
    monkeypatch.chdir(folder)
    exec(str(error.value).split('python -c "')[1].removesuffix('"'), {})
    result = nsc_merge.merge(model, {"vqa": folder}, method="task_arithmetic", scale=1.0)
    torch.testing.assert_close(outputs(result.apply(model), inputs), outputs(trained, inputs), **TOLERANCE)


def test_what_longlora_trained_beside_is_refused_and_read_once_it_is_converted(tmp_path, monkeypatch):
    """Embeddings and norms, under the base's names; they were left out with a note."""
    model, inputs, own = build("llama"), KINDS["llama"].inputs(3), ["embed_tokens", "norm", "input_layernorm"]
    folder = write_adapter(model, tmp_path / "a", 1, r=4, target_modules=["q_proj"], modules_to_save=own)
    wanted = outputs(PeftModel.from_pretrained(copy.deepcopy(model), folder), inputs)
    held = load_file(folder / WEIGHTS)
    save_file({key: value for key, value in held.items() if "lora_" in key}, folder / WEIGHTS)
    beside = {key.removeprefix("base_model.model."): value for key, value in held.items() if "lora_" not in key}
    torch.save(beside, folder / "trainable_params.bin")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": None}))
    with pytest.raises(ValueError, match=r"trainable_params.bin holds weights trained beside.* python -c") as error:
        nsc_merge.merge(model, {"long": folder}, method="task_arithmetic")
    monkeypatch.chdir(folder)
    exec(str(error.value).split('python -c "')[1].removesuffix('"'), {})
    assert nsc_merge.load_adapter(folder, "long").notes == ()
    result = nsc_merge.merge(model, {"long": folder}, method="task_arithmetic", scale=1.0)
    torch.testing.assert_close(outputs(result.apply(model), inputs), wanted, **TOLERANCE)


def test_other_files_beside_an_adapter_are_refused_or_noted(tmp_path):
    folder = write_adapter(build("llama"), tmp_path / "a", 1, r=4, target_modules=["q_proj"])
    for file in ("optimizer.pt", "rng_state_0.pth", "random_states_0.pkl", "training_args.bin", "tokenizer.json"):
        (folder / file).write_bytes(b"")
    assert nsc_merge.load_adapter(folder, "a").notes == ()
    (folder / "adapter_model.bin").write_bytes(b"")
    (note,) = nsc_merge.load_adapter(folder, "a").notes
    assert note.startswith("adapter_model.bin lies beside the adapter and is not read")
    # As SetFit calls its classifier.
    (folder / "model_head.pkl").write_bytes(b"")
    assert nsc_merge.load_adapter(folder, "a").notes[1:] == (note.replace("adapter_model.bin", "model_head.pkl"),)
    (folder / "new_embeddings.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"new_embeddings.safetensors holds rows for tokens"):
        nsc_merge.load_adapter(folder, "a")
