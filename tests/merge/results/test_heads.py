"""What is said of heads, and refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers as tf
import yaml
import zoo
from peft import PeftModel
from safetensors.torch import load_file

import nsc_merge
from nsc_merge.adapters import About
from nsc_merge.results.beside.heads import heads_of


def merge(kind, place, trained, about=None, **options):
    """A merge of two adapters, of which the first brought what was trained and says of it what it says."""
    model = zoo.build(kind)
    folders = [zoo.write_adapter(model, place / name, 1, target_modules=zoo.KINDS[kind].targets) for name in "ab"]
    adapters = {name: nsc_merge.load_adapter(folder, name) for name, folder in zip("ab", folders, strict=True)}
    adapters["a"] = replace(adapters["a"], trained=trained, about=about or About())
    return nsc_merge.merge(model, adapters, **{"method": "task_arithmetic", **options})


def vit_head(count):
    return {"classifier.weight": torch.ones(count, 32), "classifier.bias": torch.zeros(count)}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return merge("vit", tmp_path_factory.mktemp("vit"), vit_head(3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": {"a": ["x", "y"]}}, r"labels\['a'\]: expected 3 names, one per output of its head, found 2"),
        ({"labels": {"a": ["x", "y", "x"]}}, r"labels\['a'\]: expected different names, found 'x' more than once"),
        ({"labels": {"a": "xyz"}}, r"labels\['a'\]: expected a list of names, found 'xyz'"),
        ({"labels": {"a": ["x", "", "y"]}}, r"labels\['a'\]: expected a list of names"),
        ({"labels": {"b": ["x"]}}, r"labels\['b'\]: expected a task that brought a head, of \['a'\]"),
        ({"head": "b"}, r"head: expected a task that brought a head, of \['a'\], found 'b'"),
        ({"head": "a", "format": "coefficients"}, "head: only formats 'lora' and 'model' hold a head"),
    ],
)
def test_wrong_labels_and_heads_are_refused_before_anything_is_written(result, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        result.save(tmp_path / "out", **{"format": "lora", **arguments})
    assert not (tmp_path / "out").exists()


def test_labels_are_the_user_s_or_the_adapter_s_or_the_base_s(tmp_path):
    about = About(id2label={0: "p", 1: "q"})
    brought = merge("vit", tmp_path / "1", vit_head(2), about)
    brought.model.config.id2label = {0: "no", 1: "yes"}
    assert heads_of(brought, {"a": ["x", "y"]})["a"].labels == ("x", "y")
    assert heads_of(brought)["a"].labels == ("p", "q")
    other = replace(brought.adapters["a"], about=About(id2label={0: "p", 1: "q", 2: "r"}))
    fitting = replace(brought, adapters={**brought.adapters, "a": other})
    assert (heads_of(fitting)["a"].labels, heads_of(fitting)["a"].named) == (("no", "yes"), True)
    larger = replace(other, trained=vit_head(4))
    head = heads_of(replace(brought, adapters={"a": larger}))["a"]
    assert (head.labels, head.named) == (("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"), False)


def test_a_head_is_described_beside_its_weights(result, tmp_path):
    out = result.save(tmp_path / "out", "lora", labels={"a": ["é", "x/y", "z"]})
    assert json.loads((out / "heads" / "a.json").read_text(encoding="utf-8")) == {
        "architecture": "ViTForImageClassification",
        "num_labels": 3,
        "id2label": {"0": "é", "1": "x/y", "2": "z"},
        "label2id": {"é": 0, "x/y": 1, "z": 2},
        "problem_type": None,
    }
    recorded = yaml.safe_load((out / "recipe.yaml").read_text(encoding="utf-8"))
    assert recorded["labels"] == {"a": ["é", "x/y", "z"]}
    assert {"heads/a.json", "heads/a.safetensors"} <= set(recorded["record"]["files"])
    # What another merge left there goes.
    without = {name: replace(one, trained={}) for name, one in result.adapters.items()}
    replace(result, adapters=without).scaled(0.5).save(out, "lora")
    assert not (out / "heads").exists()


def test_a_single_output_is_a_regression(tmp_path):
    found = merge("llama-cls", tmp_path, {"score.weight": torch.ones(1, 32)})
    found.model.config.problem_type = "single_label_classification"
    out = found.save(tmp_path / "out", "model", head="a")
    config = tf.AutoConfig.from_pretrained(out)
    assert (config.num_labels, config.problem_type) == (1, "regression")


def test_what_is_no_classifier_has_weights_alone(tmp_path):
    found = merge("vit", tmp_path, {"decoder.weight": torch.ones(5, 32, 1, 1)})
    with pytest.raises(ValueError, match="labels.*expected none, as the head that the task brought is no classifier"):
        found.save(tmp_path / "out", "lora", labels={"a": ["x"] * 5})
    with pytest.raises(ValueError, match=r"head: ViTForImageClassification has no place for 'decoder.weight'"):
        found.save(tmp_path / "out", "lora", head="a")
    out = found.save(tmp_path / "out", "lora")
    assert [file.name for file in (out / "heads").iterdir()] == ["a.safetensors"]


def test_a_head_is_not_put_where_a_linear_that_was_merged_is_missing(tmp_path):
    """A language model's head was adapted; as a classifier it would be lost."""
    model = zoo.build("llama")
    folder = zoo.write_adapter(model, tmp_path / "a", 1, target_modules=["q_proj", "lm_head"])
    adapter = replace(nsc_merge.load_adapter(folder, "a"), trained={"score.weight": torch.ones(2, 32)})
    found = nsc_merge.merge(model, {"a": adapter}, method="task_arithmetic")
    with pytest.raises(ValueError, match="head: lm_head is adapted, and LlamaForSequenceClassification has no such"):
        found.save(tmp_path / "out", "model", head="a")


def test_the_head_of_a_task_goes_to_the_update_of_that_task(tmp_path):
    found = merge("vit", tmp_path, vit_head(3), method="finetuned")
    out = found.save(tmp_path / "out", "model", head="a")
    assert [tf.AutoConfig.from_pretrained(out / "tasks" / task).num_labels for task in "ab"] == [3, 2]
    state = tf.ViTForImageClassification.from_pretrained(out / "tasks" / "a").state_dict()
    assert torch.equal(state["classifier.weight"], torch.ones(3, 32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_head_takes_the_dtype_of_the_model(dtype, tmp_path):
    found = merge("vit", tmp_path, vit_head(3))
    found.model.to(dtype)
    out = found.save(tmp_path / "out", "model", head="a")
    served = tf.ViTForImageClassification.from_pretrained(out)
    assert {value.dtype for value in served.parameters()} == {dtype}
    assert {value.dtype for value in load_file(out / "model.safetensors").values()} == {dtype}
    assert "label_names" not in json.loads((out / "config.json").read_text())


def test_a_head_is_a_module_below_the_model_or_what_owns_tensors_within_its_trunk(result):
    head, number = heads_of(result)["a"], torch.ones(1)
    for names, paths in (
        (["classifier.dense.weight", "classifier.out_proj.weight", "classifier.out_proj.bias"], ["classifier"]),
        (["vit.head.fc.weight", "vit.head.fc.bias"], ["vit.head.fc"]),
    ):
        assert replace(head, tensors=dict.fromkeys(names, number)).modules(result.model) == paths


def test_a_head_with_one_of_its_name_in_it_is_loaded_by_peft(tmp_path):
    """As of DPT, whose head holds a ``head``: PEFT loads neither its own adapters of it, nor one of both names."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}
    more = {"image_size": 16, "patch_size": 8, "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
    taken = {"is_hybrid": False, "backbone_out_indices": [0, 1, 2, 3]}
    torch.manual_seed(0)
    model = tf.DPTForDepthEstimation(tf.DPTConfig(**sizes, **more, initializer_range=0.1, **taken))
    targets = {"target_modules": ["query", "q_proj"], "modules_to_save": ["head"]}
    folder = zoo.write_adapter(model.eval(), tmp_path / "a", 1, **targets)
    result = nsc_merge.merge(model, {"a": folder}, method="task_arithmetic", scale=1.0)
    saved = result.save(tmp_path / "out", ["lora", "model"], head="a")
    photos = {"pixel_values": torch.rand(2, 3, 16, 16)}
    with torch.no_grad():
        base = model(**photos).predicted_depth
        wanted = tf.DPTForDepthEstimation.from_pretrained(saved / "model")(**photos).predicted_depth
        found = PeftModel.from_pretrained(model, saved / "lora").eval()(**photos).predicted_depth
    assert (wanted - base).abs().max() > 0.01 * wanted.max()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5 * float(wanted.max()))
