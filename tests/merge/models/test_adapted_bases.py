"""A base that holds adapters of PEFT stands for itself without them."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers as tf
from accelerate import cpu_offload
from peft import IA3Config, LoHaConfig, LoraConfig, PromptTuningConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from zoo import build, filled, outputs, text, write_adapter

import nsc_merge

TARGETS = ["q_proj", "v_proj"]


def base():
    return build("llama").double()


def wrapped():
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
    return filled(get_peft_model(base(), config, autocast_adapter_dtype=False))


@pytest.mark.parametrize("put", ["PeftModel", "inject_adapter_in_model", "add_adapter", "modules_to_save", "tokens"])
@pytest.mark.parametrize(
    ("method", "options"),
    [("task_arithmetic", {"scale": 0.4}), ("ties", {}), ("nsc", {"steps": 2, "lr": 1e-2, "progress": False})],
)
def test_a_base_with_adapters_unwraps_itself(put, method, options, tmp_path):
    """Merged with a folder and with the model's own adapter, on what is under it: as on a clean base."""
    folder = write_adapter(build("llama"), tmp_path / "a", 1, r=4, target_modules=TARGETS)
    trained = {"modules_to_save": {"modules_to_save": ["up_proj"]}, "tokens": {"trainable_token_indices": [3, 5]}}
    config = LoraConfig(r=3, target_modules=["o_proj", "v_proj"], **trained.get(put, {}))
    if put == "add_adapter":
        model = base()
        model.add_adapter(config, "own")
    else:
        model = get_peft_model(base(), config, "own")
    filled(model)
    if put == "inject_adapter_in_model":
        model = model.get_base_model()
    own = nsc_merge.load_adapter(model, "own")
    data = {"a": [text(5)], "own": [text(6)]} if method == "nsc" else None
    before, objects = outputs(model, text(3)), dict(model.named_modules())
    result = nsc_merge.merge(model, {"a": folder, "own": model}, data, method, **options)
    clean = base()
    wanted = nsc_merge.merge(clean, {"a": folder, "own": own}, data, method, **options)
    assert wanted.paths == result.paths
    for path in wanted.paths:
        assert torch.equal(result.delta(path), wanted.delta(path))
    # The base is what it was, and the model keeps its adapters.
    assert torch.equal(outputs(result.model, text(3)), outputs(clean, text(3)))
    assert torch.equal(outputs(model, text(3)), before)
    assert {path: id(one) for path, one in model.named_modules()} == {path: id(one) for path, one in objects.items()}
    result.save(tmp_path / "model")
    result.save(tmp_path / "lora", "lora", rank=2)
    read = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    merged = outputs(wanted.apply(clean), text(3))
    torch.testing.assert_close(outputs(read, text(3)), merged, rtol=1e-10, atol=1e-10)
    # As by merge_and_unload: the base's weights are the merged ones, and what comes back has no adapters.
    applied = result.apply(model)
    assert not any(isinstance(one, LoraLayer) for one in applied.modules())
    torch.testing.assert_close(outputs(applied, text(3)), merged, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="apply has changed it since this merge was made"):
        result.save(tmp_path / "again")
    assert not hasattr(applied, "peft_config")
    applied.save_pretrained(tmp_path / "applied")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "applied", dtype=torch.float64)
    torch.testing.assert_close(outputs(again, text(3)), merged, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("by", ["load_adapter", "delete_adapter", "from_pretrained"])
def test_a_base_into_which_transformers_loaded_an_adapter_is_saved_under_its_own_names(by, tmp_path):
    clean = base()
    clean.save_pretrained(tmp_path / "base")
    folder = write_adapter(build("llama"), tmp_path / "a", 1, r=4, target_modules=TARGETS)
    if by != "from_pretrained":
        model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model.load_adapter(str(folder))
        if by == "delete_adapter":
            model.delete_adapter("default")
    else:
        settings = json.loads((folder / "adapter_config.json").read_text())
        settings["base_model_name_or_path"] = str(tmp_path / "base")
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    result = nsc_merge.merge(model, {"a": folder}, method="task_arithmetic", scale=0.5)
    result.save(tmp_path / "model")
    result.apply(model).save_pretrained(tmp_path / "applied")
    nsc_merge.merge(clean, {"a": folder}, method="task_arithmetic", scale=0.5).apply(clean)
    for name in ("model", "applied"):
        held = load_file(tmp_path / name / "model.safetensors")
        assert held.keys() == load_file(tmp_path / "base" / "model.safetensors").keys()
        assert all(torch.equal(value, clean.state_dict()[key]) for key, value in held.items())


def test_tied_weights_come_apart_under_adapters_as_in_a_clean_base(tmp_path):
    held = filled(get_peft_model(tied(), LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])))
    clean = tied()
    wanted = nsc_merge.merge(clean, {"a": held}, method="task_arithmetic", scale=0.5)
    result = nsc_merge.merge(held, {"a": held}, method="task_arithmetic", scale=0.5)
    assert torch.equal(outputs(result.model, text(3)), outputs(clean, text(3)))
    torch.testing.assert_close(
        outputs(result.apply(copy.deepcopy(result.model)), text(3)),
        outputs(wanted.apply(copy.deepcopy(wanted.model)), text(3)), rtol=0, atol=0,
    )
    result.save(tmp_path / "model")
    # It shares the rest with the base under the adapters, of which apply is noticed.
    other = nsc_merge.merge(held, {"a": nsc_merge.load_adapter(wrapped(), "a")}, method="task_arithmetic")
    other.apply(held)
    with pytest.raises(ValueError, match="apply has changed it"):
        result.save(tmp_path / "model")


def tied():
    config = copy.deepcopy(base().config)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(config).double()


def test_offloaded_and_compiled_bases_unwrap_themselves():
    clean = nsc_merge.merge(base(), {"a": wrapped()}, method="ties")
    offloaded = wrapped()
    before = outputs(offloaded, text(3))
    cpu_offload(offloaded)
    result = nsc_merge.merge(offloaded, {"a": wrapped()}, method="ties")
    assert all(torch.equal(result.delta(path), clean.delta(path)) for path in clean.paths)
    assert torch.equal(outputs(offloaded, text(3)), before)
    assert {value.device.type for value in result.model.parameters()} == {"meta"}
    torch.testing.assert_close(
        outputs(result.apply(result.model), text(3)), outputs(clean.apply(clean.model), text(3)), rtol=1e-10, atol=1e-10
    )
    with pytest.raises(ValueError, match="torch.compile"):
        nsc_merge.merge(torch.compile(wrapped().unload()), {"a": wrapped()}, method="ties")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.merge_adapter(), r"\['default'\] are merged into its weights.*unmerge_adapter\(\)"),
        ({"bias": "all"}, "model: adapter 'default' has bias='all', which changed its biases"),
        ({"init_lora_weights": "pissa"}, "adapter 'default' has init_lora_weights='pissa', which changed its weights"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "has layer_replication=.*which changed its layers.*the base anew"),
    ],
)
def test_a_base_that_adapters_changed_is_refused(change, message):
    model = wrapped() if callable(change) else get_peft_model(
        build("llama").float(), LoraConfig(r=4, target_modules=TARGETS, **change)
    )
    if callable(change):
        change(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        nsc_merge.merge(model, {"a": wrapped()}, method="task_arithmetic")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if callable(change):
        model.unmerge_adapter()
        assert nsc_merge.merge(model, {"a": wrapped()}, method="task_arithmetic").paths


def test_adapters_of_other_kinds_unwrap_too():
    for config in (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), LoHaConfig(target_modules=["q_proj"])):
        model = get_peft_model(base(), config)
        result = nsc_merge.merge(model, {"a": wrapped()}, method="task_arithmetic")
        assert torch.equal(outputs(result.model, text(3)), outputs(base(), text(3)))
    prompts = get_peft_model(base(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert nsc_merge.merge(prompts, {"a": wrapped()}, method="task_arithmetic").model is prompts.get_base_model()
