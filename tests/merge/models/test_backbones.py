"""Models of a backbone and what answers behind it, as transformers makes them of two: the latter is each task's."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    DetrModel,
    ResNetConfig,
    SwinConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)
from zoo import write_adapter

import nsc_merge
from nsc_merge.models.block_finding import trunk_of
from nsc_merge.recipes.first import findings

CLASSES = {"roads": 4, "crops": 6}
HEAD = "decode_head"


def segmenter(classes):
    torch.manual_seed(0)
    stages = [f"stage{number}" for number in range(1, 5)]
    towers = {"depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "embed_dim": 8, "window_size": 2, "image_size": 32}
    backbone = SwinConfig(**towers, patch_size=2, out_features=stages)
    sizes = {"hidden_size": 16, "pool_scales": [1, 2], "use_auxiliary_head": False}
    return UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, **sizes, num_labels=classes)).eval()


def adapters(tmp_path):
    """With heads of 4 and 6 classes, whose BatchNorms have seen something."""
    folders = {}
    for number, (task, count) in enumerate(CLASSES.items()):
        targets = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": [HEAD]}
        folders[task] = write_adapter(segmenter(count), tmp_path / task, 1 + number, r=2 + number, **targets)
        file = folders[task] / "adapter_model.safetensors"
        save_file({key: 2 * value if "running_" in key else value for key, value in load_file(file).items()}, file)
    return folders


def test_a_segmenter_s_head_stays_its_task_s(tmp_path):
    model, folders = segmenter(4), adapters(tmp_path)
    result = nsc_merge.merge(model, folders, method="task_arithmetic", scale=1.0)
    photos = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for task, count in CLASSES.items():
        assert all(name.startswith(HEAD) for name in result.adapters[task].trained)
        # The task's own model with the other's update of the trunk.
        wanted = PeftModel.from_pretrained(segmenter(count), folders[task]).eval()
        for path in result.paths:
            layer = wanted.base_model.model.get_submodule(path)
            others = [one.factors[path].delta() for name, one in result.adapters.items() if name != task]
            layer.base_layer.weight.data += sum(others).float()
        saved = result.save(tmp_path / f"{task}-model", "model", head=task)
        small = result.save(tmp_path / f"{task}-lora", "lora", head=task)
        loaded = UperNetForSemanticSegmentation.from_pretrained(saved)
        again = PeftModel.from_pretrained(segmenter(count), small).eval()
        with torch.no_grad():
            expected = wanted(pixel_values=photos).logits
            assert expected.shape[1] == count
            for one in (loaded, again):
                torch.testing.assert_close(one(pixel_values=photos).logits, expected, rtol=1e-4, atol=1e-6)


def test_a_first_recipe_says_whose_the_head_is():
    model = segmenter(4)
    trained = [f"{HEAD}.classifier", "backbone.hidden_states_norms.stage1"]
    assert findings._heads(SimpleNamespace(whole=trained), model) == [f"{HEAD}.classifier"]


def test_a_model_with_a_backbone_that_is_a_trunk_itself_is_its_own():
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", out_features=["stage1"])
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    model = DetrModel(DetrConfig(backbone_config=backbone, **sizes, num_queries=3))
    assert trunk_of(model) is model
    alone = copy.deepcopy(segmenter(4).backbone)
    assert trunk_of(alone) is alone.base_model


@pytest.mark.parametrize(("kind", "last"), [("CLIP", "encoder"), ("Siglip", "post_layernorm")])
def test_the_trunk_of_a_classifier_that_names_none_is_the_model_within(kind, last, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    config = getattr(tf, f"{kind}Config")(vision_config=vision, num_labels=3)
    model = getattr(tf, f"{kind}ForImageClassification")(config).eval()
    assert trunk_of(model) is model.vision_model
    targets = {"target_modules": ["q_proj", "v_proj"]}
    folders = {task: write_adapter(model, tmp_path / task, n, **targets) for n, task in enumerate("ab")}
    data = {task: [{"pixel_values": torch.randn(2, 3, 8, 8)}] for task in folders}
    options = {"steps": 1, "positions": "all", "progress": False}
    final = nsc_merge.merge(model, folders, data, "match", **options)
    named = nsc_merge.merge(model, folders, data, "match", features=[f"vision_model.{last}"], **options)
    assert final.history[0]["loss"] == named.history[0]["loss"]
    # An adapter of the tower alone, without the classifier around it.
    alone = write_adapter(copy.deepcopy(model.vision_model), tmp_path / "alone", 0, **targets)
    result = nsc_merge.merge(model, {"alone": alone}, method="task_arithmetic")
    assert result.paths == final.paths
    # Two models side by side are no trunk, and a model without a head has none.
    assert trunk_of(around := getattr(tf, f"{kind}Model")(config)) is around
    assert trunk_of(model.vision_model) is model.vision_model


def detector(classes):
    torch.manual_seed(0)
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", out_features=["stage1"])
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 3}
    config = DetrConfig(backbone_config=backbone, **sizes, **heads, num_labels=classes)
    return DetrForObjectDetection(config).eval()


def test_a_detector_s_head_has_one_output_more_than_classes(tmp_path):
    """Of other classes than the base, and beside boxes, which have as many outputs as the base has classes."""
    model = detector(4)
    saved = {"modules_to_save": ["class_labels_classifier", "bbox_predictor"]}
    folders = {
        task: write_adapter(detector(count), tmp_path / task, count, target_modules=["q_proj", "v_proj"], **saved)
        for task, count in CLASSES.items()
    }
    names = {"roads": ["car", "bus", "van", "tram"], "crops": list("abcdef")}
    result = nsc_merge.merge(model, folders, method="task_arithmetic", scale=1.0)
    saved = result.save(tmp_path / "out", ["model", "lora"], head="crops", labels=names)
    loaded = DetrForObjectDetection.from_pretrained(saved / "model")
    assert list(loaded.config.id2label.values()) == names["crops"]
    again = PeftModel.from_pretrained(detector(6), saved / "lora").eval()
    wanted = PeftModel.from_pretrained(detector(6), folders["crops"]).eval()
    for path, factor in result.adapters["roads"].factors.items():
        wanted.base_model.model.get_submodule(path).base_layer.weight.data += factor.delta().float()
    photos = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = wanted(pixel_values=photos)
        assert expected.logits.shape[-1] == 7
        for one in (loaded, again):
            found = one(pixel_values=photos)
            torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(found.pred_boxes, expected.pred_boxes, rtol=1e-4, atol=1e-6)
