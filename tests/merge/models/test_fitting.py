"""Adapters fitted to a model: old names, modules trained in full, DoRA, in-memory models."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from zoo import (
    ATTENTION,
    DECODER,
    DINOV2,
    DINOV2_NAMINGS,
    IMAGE,
    KINDS,
    LANGUAGE,
    WIDTH,
    build,
    outputs,
    write_adapter,
)

import nsc_merge
from nsc_merge.adapters import Factor
from nsc_merge.models.families import family_of, scored_paths
from nsc_merge.models.fitting import absent, fit

TOLERANCE = {"rtol": 5e-5, "atol": 5e-5}
WEIGHTS = "adapter_model.safetensors"

# What transformers before version 5 called today's modules.
OLD_VIT = [
    ("vit.layers.", "vit.encoder.layer."),
    (r"attention\.([qkv])_proj", r"attention.attention.\1"),
    (r"attention\.o_proj", "attention.output.dense"),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
]
LETTERS = {"q": "query", "k": "key", "v": "value"}


def renamed(folder, to, rules):
    """A copy of an adapter with its keys rewritten."""
    to.mkdir()
    weights = {}
    for key, value in load_file(folder / WEIGHTS).items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        key = re.sub(r"attention\.attention\.([qkv])\.", lambda found: f"attention.attention.{LETTERS[found[1]]}.", key)
        weights[key] = value
    save_file(weights, to / WEIGHTS)
    config = json.loads((folder / "adapter_config.json").read_text())
    # As whoever trained it under these names would have said it.
    config["target_modules"] = sorted({found[1] for key in weights if (found := re.search(r"([^.]+)\.lora_", key))})
    (to / "adapter_config.json").write_text(json.dumps(config))
    return to


def same_merge(model, new, old):
    merges = [
        nsc_merge.merge(model, {"a": folder}, method="task_arithmetic", scale=1.0) for folder in (new, old)
    ]
    assert merges[0].coefficients == merges[1].coefficients
    for path in merges[0].paths:
        assert torch.equal(merges[0].delta(path), merges[1].delta(path))


@pytest.mark.parametrize(
    ("kind", "targets", "rules"),
    [
        ("vit", [*ATTENTION, "fc1", "fc2"], OLD_VIT),
        ("clip", ["q_proj", "out_proj"], [(r"model\.encoder", "model.vision_model.encoder")]),
        ("llava", LANGUAGE, [(r"model\.language_model\.layers", "language_model.model.layers")]),
        ("llava", LANGUAGE, [(r"model\.language_model\.layers", "model.layers")]),
        (
            "llava",
            r".*vision_tower.*q_proj",
            [(r"model\.vision_tower\.encoder", "vision_tower.vision_model.encoder")],
        ),
        (
            "llava",
            r".*vision_tower.*q_proj",
            [(r"model\.vision_tower\.encoder", "model.vision_tower.vision_tower.vision_model.encoder")],
        ),
        ("llama", ["q_proj"], [(r"model\.model\.model\.", "model.model.")]),
    ],
)
def test_old_names_mean_the_same_modules(kind, targets, rules, tmp_path):
    model = build(kind)
    new = write_adapter(model, tmp_path / "new", 1, r=4, target_modules=targets)
    old = renamed(new, tmp_path / "old", rules)
    assert load_file(old / WEIGHTS).keys() != load_file(new / WEIGHTS).keys()
    same_merge(model, new, old)


def test_an_adapter_of_either_dinov2_naming_fits_the_installed_model(tmp_path):
    model = build("dinov2")
    (other,) = (naming for naming in DINOV2_NAMINGS if naming != DINOV2)
    own = write_adapter(model, tmp_path / "own", 1, r=4, target_modules=DINOV2)
    rules = [(rf"\.attention\.{re.escape(a)}\.", f".attention.{b}.") for a, b in zip(DINOV2, other, strict=True)]
    foreign = renamed(own, tmp_path / "foreign", rules)
    assert load_file(foreign / WEIGHTS).keys().isdisjoint(load_file(own / WEIGHTS))
    same_merge(model, own, foreign)


def dinov2_skeleton(attention):
    """A block's attention as some release of transformers, not the installed one, names it."""
    model = nn.Module()
    model.config = tf.Dinov2Config()
    for name in attention:
        parent = model
        *above, last = f"encoder.layer.0.attention.{name}".split(".")
        for part in above:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, nn.Linear(4, 4))
    return model


@pytest.mark.parametrize("of_model", DINOV2_NAMINGS)
@pytest.mark.parametrize("of_adapter", DINOV2_NAMINGS)
def test_dinov2_namings_are_fitted_and_measured_alike(of_model, of_adapter):
    model = dinov2_skeleton(of_model)
    ones = torch.ones(1, 4), torch.ones(4, 1)
    factors = {f"encoder.layer.0.attention.{name}": Factor(*ones, float(i)) for i, name in enumerate(of_adapter)}
    fitted = fit({"a": nsc_merge.Adapter("a", factors)}, model)["a"].factors
    paths = [f"encoder.layer.0.attention.{name}" for name in of_model]
    assert {path: factor.scaling for path, factor in fitted.items()} == dict(zip(paths, range(4), strict=True))
    assert scored_paths(family_of(model), model, fitted, None, 1) == paths[3:]


def test_an_adapter_fits_the_model_with_and_without_its_head(tmp_path):
    with_head = build("llama")
    folder = write_adapter(with_head, tmp_path / "a", 1, r=4, target_modules=["q_proj"])
    bare = nsc_merge.merge(with_head.model, {"a": folder}, method="task_arithmetic")
    whole = nsc_merge.merge(with_head, {"a": folder}, method="task_arithmetic")
    assert {f"model.{path}" for path in bare.coefficients} == set(whole.coefficients)


def test_two_names_for_one_module_are_refused(tmp_path):
    model = build("clip")
    folder = write_adapter(model, tmp_path / "a", 1, r=4, target_modules=["q_proj"])
    weights = load_file(folder / WEIGHTS)
    for key, value in list(weights.items()):
        weights[key.replace("model.encoder", "model.vision_model.encoder")] = value.clone()
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(ValueError, match="and another name both mean encoder.layers.0.self_attn.q_proj"):
        nsc_merge.merge(model, {"a": folder}, method="task_arithmetic")


def test_unknown_names_are_refused_by_name(tmp_path):
    model = build("vit")
    folder = write_adapter(model, tmp_path / "a", 1, r=4, target_modules=["q_proj"])
    old = renamed(folder, tmp_path / "old", [("q_proj", "qq_proj")])
    with pytest.raises(ValueError, match=r"adapted modules are not in .*qq_proj"):
        nsc_merge.merge(model, {"a": old}, method="task_arithmetic")


def test_heads_are_kept_per_task_and_restore_each_classifier(tmp_path):
    model = build("llama-cls")
    inputs = KINDS["llama-cls"].inputs(3)
    folders = {
        task: write_adapter(
            model, tmp_path / task, seed, r=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS"
        )
        for seed, task in enumerate(("nli", "topic"), 1)
    }
    result = nsc_merge.merge(model, {"nli": folders["nli"]}, method="task_arithmetic", scale=1.0)
    out = result.save(tmp_path / "out", "model")
    reloaded = tf.LlamaForSequenceClassification.from_pretrained(out)
    head = load_file(out / "heads" / "nli.safetensors")
    assert list(head) == ["score.weight"]
    reloaded.load_state_dict(head, strict=False)
    expected = outputs(PeftModel.from_pretrained(copy.deepcopy(model), folders["nli"]), inputs)
    torch.testing.assert_close(outputs(reloaded, inputs), expected, **TOLERANCE)

    both = nsc_merge.merge(model, folders, method="task_arithmetic").save(tmp_path / "both", "lora")
    heads = {file.stem: load_file(file)["score.weight"] for file in (both / "heads").glob("*.safetensors")}
    assert heads.keys() == folders.keys()
    assert not torch.equal(heads["nli"], heads["topic"])


def projector_adapters(model, tmp_path):
    return {
        task: write_adapter(
            model, tmp_path / task, seed, r=4, target_modules=LANGUAGE, modules_to_save=["multi_modal_projector"]
        )
        for seed, task in enumerate(("vqa", "caption"), 1)
    }


@pytest.mark.parametrize(("policy", "shares"), [("lambda", (0.3, 0.3)), ("mean", (0.5, 0.5)), ("first", (1, 0))])
def test_shared_projectors_by_policy(tmp_path, policy, shares):
    model = build("llava")
    inputs = KINDS["llava"].inputs(2)
    folders = projector_adapters(model, tmp_path)
    result = nsc_merge.merge(model, folders, method="task_arithmetic", scale=0.3, shared_modules=policy)
    expected = copy.deepcopy(model)
    lm_only = {
        task: nsc_merge.Adapter(
            task, {path: f for path, f in adapter.factors.items() if "language_model" in path}
        )
        for task, adapter in fit(result.adapters, model).items()
    }
    nsc_merge.merge(model, lm_only, method="task_arithmetic", scale=0.3).apply(expected)
    for share, folder in zip(shares, folders.values(), strict=True):
        for key, value in load_file(folder / WEIGHTS).items():
            name = key.removeprefix("base_model.model.")
            if "projector" in name:
                base = model.get_parameter(name)
                expected.get_parameter(name).data.add_(share * (value - base))
    wanted = outputs(expected, inputs)
    assert (wanted - outputs(model, inputs)).abs().max() > 0.05
    with nsc_merge.attach(model, result.adapters, 0.3):
        attached = outputs(model, inputs)
    torch.testing.assert_close(attached, wanted, **TOLERANCE)
    torch.testing.assert_close(outputs(result.apply(copy.deepcopy(model)), inputs), wanted, **TOLERANCE)
    lora = PeftModel.from_pretrained(copy.deepcopy(model), result.save(tmp_path / "out", "lora"))
    torch.testing.assert_close(outputs(lora, inputs), wanted, **TOLERANCE)
    has_coefficient = any("projector" in path for path in result.coefficients)
    assert has_coefficient == (policy == "lambda")


@pytest.mark.parametrize("policy", ["lambda", "mean", "first"])
def test_nsc_learns_projector_coefficients_only_by_policy_lambda(tmp_path, policy):
    model = build("llava")
    folders = projector_adapters(model, tmp_path)
    batches = {task: [KINDS["llava"].inputs(seed)] for seed, task in enumerate(folders)}
    result = nsc_merge.merge(
        model, folders, batches, steps=4, lr=0.01, shared_modules=policy, progress=False
    )
    learnt = [path for path in result.coefficients if "projector" in path]
    assert len(learnt) == (2 if policy == "lambda" else 0)
    for path in learnt:
        assert all(abs(value - 0.4) > 1e-3 for value in result.coefficients[path].values())
    loaded = type(model).from_pretrained(result.save(tmp_path / "out", "model"))
    inputs = KINDS["llava"].inputs(9)
    expected = outputs(result.apply(copy.deepcopy(model)), inputs)
    torch.testing.assert_close(outputs(loaded, inputs), expected, **TOLERANCE)


@pytest.mark.parametrize("kind", ["llava", "vit"])
def test_the_savings_of_the_loop_hold_for_projectors_and_biases(tmp_path, kind):
    model = build(kind)
    biased = {"r": 4, "target_modules": ATTENTION, "lora_bias": True}
    folders = (
        projector_adapters(model, tmp_path)
        if kind == "llava"
        else {task: write_adapter(model, tmp_path / task, seed, **biased) for seed, task in enumerate("ab")}
    )
    batches = {task: [KINDS[kind].inputs(seed)] for seed, task in enumerate(folders)}
    found = [
        nsc_merge.merge(model, folders, batches, steps=5, lr=0.01, progress=False, **options).coefficients
        for options in ({"early_exit": False, "cache_prefix": False}, {"batch_tasks": True}, {"checkpointing": True})
    ]
    for other in found[1:]:
        for path, row in found[0].items():
            assert other[path] == pytest.approx(row, abs=1e-5)


def test_bad_policies_are_refused(tmp_path):
    model = build("llama")
    folder = write_adapter(model, tmp_path / "a", 1, r=4, target_modules=["q_proj"], modules_to_save=["norm"])
    with pytest.raises(ValueError, match="shared_modules: expected one of"):
        nsc_merge.merge(model, {"a": folder}, method="task_arithmetic", shared_modules="max")


def test_dora_is_converted_on_request(tmp_path):
    model = build("llama")
    folder = write_adapter(model, tmp_path / "a", 1, r=4, target_modules=["q_proj", "v_proj"], use_dora=True)
    with pytest.raises(ValueError, match="use_dora=True is refused"):
        nsc_merge.merge(model, {"a": folder}, method="task_arithmetic", dora="refuse")
    result = nsc_merge.merge(model, {"a": folder}, method="task_arithmetic", scale=1.0, dora="convert")
    exact = PeftModel.from_pretrained(copy.deepcopy(model), folder).merge_and_unload()
    adapter = result.adapters["a"]
    assert len(adapter.notes) == len(adapter.factors)
    for path, note in zip(adapter.factors, adapter.notes, strict=True):
        delta = (exact.get_submodule(path).weight - model.get_submodule(path).weight).double()
        sigma = torch.linalg.svdvals(delta)
        error = float((delta - result.delta(path)).norm() / delta.norm())
        assert error == pytest.approx(float(sigma[4:].norm() / sigma.norm()), rel=1e-3)
        assert f"{path}: DoRA converted at rank 4, relative error {error:.2g}"[:-1] in note
    with (
        pytest.raises(ValueError, match="is a DoRA update"),
        nsc_merge.attach(model, {"a": nsc_merge.load_adapter(folder, "a", dora="convert")}, 0.4),
    ):
        pass
    with pytest.raises(ValueError, match="dora: expected one of "):
        nsc_merge.load_adapter(folder, "a", dora="ignore")


def test_a_peft_model_in_memory_gives_the_same_as_its_folder(tmp_path):
    model = build("qwen2")
    peft_model = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules=["q_proj"]), "one")
    peft_model.add_adapter("two", LoraConfig(r=2, use_rslora=True, target_modules=["v_proj"]))
    for name, value in peft_model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, std=0.1)
    peft_model.save_pretrained(tmp_path)
    for name in ("one", "two"):
        held, saved = nsc_merge.load_adapter(peft_model, name), nsc_merge.load_adapter(tmp_path / name, name)
        assert held.factors.keys() == saved.factors.keys()
        for path, factor in saved.factors.items():
            assert torch.equal(factor.delta(), held.factors[path].delta())
    with pytest.raises(ValueError, match=r"the PeftModel holds \['one', 'two'\]"):
        nsc_merge.load_adapter(peft_model, "three")
    settings = {"r": 4, "target_modules": ["q_proj"], "task_type": "SEQ_CLS"}
    classifier = get_peft_model(build("llama-cls"), LoraConfig(**settings))
    assert list(nsc_merge.load_adapter(classifier, "any").trained) == ["score.weight"]


def test_absent_modules_are_reported_and_stay_at_zero(tmp_path):
    model = build("llama")
    folders = {
        "q": write_adapter(model, tmp_path / "q", 1, r=4, target_modules=["q_proj"]),
        "both": write_adapter(model, tmp_path / "both", 2, r=4, target_modules=["q_proj", "v_proj"]),
    }
    result = nsc_merge.merge(model, folders, method="task_arithmetic")
    missing = absent(result.adapters)
    assert set(missing) == {f"model.layers.{block}.self_attn.v_proj" for block in range(3)}
    assert all(tasks == ["q"] for tasks in missing.values())
    assert all(result.coefficients[path]["q"] == 0 for path in missing)


def test_biases_without_a_place_go_into_the_adapter_only(tmp_path):
    """peft trains lora_bias on a linear without bias, with a warning; only an adapter can hold the merge."""
    model = build("llama")
    folder = write_adapter(model, tmp_path / "a", 1, r=4, target_modules=["q_proj"], lora_bias=True)
    inputs = KINDS["llama"].inputs(1)
    expected = outputs(PeftModel.from_pretrained(copy.deepcopy(model), folder), inputs)
    result = nsc_merge.merge(model, {"a": folder}, method="task_arithmetic", scale=1.0)
    out = result.save(tmp_path / "out", "lora")
    assert json.loads((out / "adapter_config.json").read_text())["lora_bias"] is True
    torch.testing.assert_close(
        outputs(PeftModel.from_pretrained(copy.deepcopy(model), out), inputs), expected, **TOLERANCE
    )
    with pytest.raises(ValueError, match="the linear has none to merge it into; use format 'lora'"):
        result.save(tmp_path / "model", "model")
    assert not (tmp_path / "model").exists()


def test_tied_weights_are_not_merged_into(tmp_path):
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER, tie_word_embeddings=True))
    folder = write_adapter(model, tmp_path / "a", 1, r=4, target_modules=["q_proj", "lm_head"])
    result = nsc_merge.merge(model, {"a": folder}, method="task_arithmetic")
    with pytest.raises(ValueError, match=r"lm_head: its weight is shared by .* copy.deepcopy\(result.model\)"):
        result.apply(model)


# Of transformers 5.17, which has base_model be the whole of this class, and of later ones.
@pytest.mark.parametrize("base_model_prefix", ["clip", "vision_model"])
def test_clip_with_a_projection_head(tmp_path, monkeypatch, base_model_prefix):
    monkeypatch.setattr(tf.CLIPVisionModelWithProjection, "base_model_prefix", base_model_prefix)
    torch.manual_seed(0)
    model = tf.CLIPVisionModelWithProjection(tf.CLIPVisionConfig(**WIDTH, intermediate_size=48, **IMAGE))
    folder = write_adapter(
        model, tmp_path / "a", 1, r=4, target_modules=["q_proj"], modules_to_save=["visual_projection"]
    )
    result = nsc_merge.merge(model.eval(), {"a": folder}, method="task_arithmetic")
    assert list(result.adapters["a"].trained) == ["visual_projection.weight"]
    bare = write_adapter(model.vision_model, tmp_path / "b", 1, r=4, target_modules=["q_proj"])
    assert set(nsc_merge.merge(model, {"b": bare}, method="task_arithmetic").coefficients) == set(result.coefficients)
