"""Convolutions and BatchNorms trained in full: the base's own merged in every format, a head kept with its buffers."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from zoo import outputs, write_adapter

import nsc_merge

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
WEIGHTS = "adapter_model.safetensors"
PIXELS = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    config = tf.ResNetConfig(embedding_size=6, hidden_sizes=[6, 10], depths=[1, 1], layer_type="basic", num_labels=3)
    return tf.ResNetForImageClassification(config).eval()


def written(model, folder, module, seed=1):
    targets = r".*layer\.0\.convolution"
    return write_adapter(model, folder, seed, r=3, target_modules=targets, modules_to_save=[module])


@pytest.mark.parametrize("module", ["shortcut.convolution", "embedder.convolution", "shortcut.normalization"])
def test_a_module_with_one_coefficient_of_1_is_the_trained_one(module, resnet, tmp_path):
    folder = written(resnet, tmp_path / "a", module)
    wanted = outputs(PeftModel.from_pretrained(copy.deepcopy(resnet), folder), PIXELS)
    assert (outputs(resnet, PIXELS) - wanted).abs().max() > 1e-3
    result = nsc_merge.merge(resnet, {"a": folder}, method="task_arithmetic", scale=1.0)
    (path,) = (path for path in result.paths if path.endswith(module))
    weight = resnet.get_submodule(path).weight
    assert result.delta(path).shape == (len(weight), weight[0].numel())
    torch.testing.assert_close(outputs(result.apply(copy.deepcopy(resnet)), PIXELS), wanted, **CLOSE)
    with nsc_merge.attach(resnet, result.adapters, 1.0):
        torch.testing.assert_close(outputs(resnet, PIXELS), wanted, **CLOSE)
    loaded = type(resnet).from_pretrained(result.save(tmp_path / "model", "model"))
    torch.testing.assert_close(outputs(loaded, PIXELS), wanted, **CLOSE)
    lora = PeftModel.from_pretrained(copy.deepcopy(resnet), result.save(tmp_path / "lora", "lora"))
    torch.testing.assert_close(outputs(lora, PIXELS), wanted, **CLOSE)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_convolutions_of_two_tasks_are_merged_as_their_matrices(method, resnet, tmp_path):
    folders = {task: written(resnet, tmp_path / task, "embedder.convolution", seed) for seed, task in enumerate("ab")}
    options = {"density": 1.0} if method == "ties" else {}
    result = nsc_merge.merge(resnet, folders, method=method, scale=0.5, **options)
    path = "resnet.embedder.embedder.convolution"
    base = resnet.get_submodule(path).weight
    deltas = [load_file(folder / WEIGHTS)[f"base_model.model.{path}.weight"] - base for folder in folders.values()]
    merged = result.apply(copy.deepcopy(resnet)).get_submodule(path).weight
    # Modules trained in full are merged by task arithmetic whatever the method is, divided as it divides.
    share = 0.25 if method == "ties" else 0.5
    torch.testing.assert_close(merged, base + share * (deltas[0] + deltas[1]), rtol=1e-5, atol=1e-6)


def test_statistics_that_training_moved_are_refused_where_all_tasks_share_them(resnet, tmp_path):
    folder = written(resnet, tmp_path / "a", "shortcut.normalization")
    weights = load_file(folder / WEIGHTS)
    (key,) = (key for key in weights if key.endswith("running_mean"))
    save_file({**weights, key: weights[key] + 0.5}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"shortcut.normalization was .* its running_mean is a buffer that differs"):
        nsc_merge.merge(resnet, {"a": folder}, method="task_arithmetic")
    (key,) = (key for key in weights if key.endswith("num_batches_tracked"))
    save_file({**weights, key: weights[key].to(torch.int32)}, folder / WEIGHTS)
    assert nsc_merge.merge(resnet, {"a": folder}, method="task_arithmetic").paths
    (key,) = (key for key in weights if key.endswith("normalization.weight"))
    save_file({**weights, key: weights[key].to(torch.int32)}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"normalization.weight: expected floating point, found torch.int32"):
        nsc_merge.merge(resnet, {"a": folder}, method="task_arithmetic")


def test_a_head_with_a_batch_norm_is_kept_with_its_statistics(tmp_path):
    """PEFT's example of semantic segmentation."""
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 1, 1]}
    config = tf.SegformerConfig(**sizes, decoder_hidden_size=16, num_labels=3)
    model = tf.SegformerForSemanticSegmentation(config).eval()
    trained = copy.deepcopy(model)
    norm = trained.decode_head.batch_norm
    norm.running_mean.normal_()
    norm.num_batches_tracked.fill_(7)
    folder = write_adapter(trained, tmp_path / "a", 1, target_modules=["q_proj"], modules_to_save=["decode_head"])
    wanted = outputs(PeftModel.from_pretrained(copy.deepcopy(trained), folder), PIXELS)
    result = nsc_merge.merge(model, {"a": folder}, method="task_arithmetic", scale=1.0)
    head = "decode_head.batch_norm: trained in full, the task's own head: kept in heads/, not merged"
    assert head in result.adapters["a"].notes
    out = result.save(tmp_path / "out", ["lora", "model"], head="a")
    kept = load_file(out / "heads" / "a.safetensors")
    assert torch.equal(kept["decode_head.batch_norm.running_mean"], norm.running_mean)
    lora = PeftModel.from_pretrained(copy.deepcopy(model), out / "lora")
    torch.testing.assert_close(outputs(lora, PIXELS), wanted, **CLOSE)
    loaded = type(model).from_pretrained(out / "model")
    torch.testing.assert_close(outputs(loaded, PIXELS), wanted, **CLOSE)
    assert int(loaded.decode_head.batch_norm.num_batches_tracked) == 7
    assert isinstance(loaded.decode_head.batch_norm, nn.BatchNorm2d)


@pytest.fixture(scope="module")
def sam():
    """Segments by points, and is adapted with its decoder of masks in full, which has transposed convolutions."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "image_size": 32, "patch_size": 8, "num_attention_heads": 2}
    seen = {"num_hidden_layers": 2, "mlp_dim": 24, "output_channels": 16, "num_pos_feats": 8, "window_size": 2}
    config = tf.SamConfig(
        vision_config=tf.SamVisionConfig(**sizes, **seen, global_attn_indexes=[1], initializer_range=0.2),
        prompt_encoder_config=tf.SamPromptEncoderConfig(
            hidden_size=16, image_size=32, patch_size=8, mask_input_channels=4
        ),
        mask_decoder_config=tf.SamMaskDecoderConfig(
            hidden_size=16, mlp_dim=24, num_attention_heads=2, iou_head_hidden_dim=16
        ),
    )
    return tf.SamModel(config).eval()


def test_transposed_convolutions_of_two_tasks_are_merged_in_every_format(sam, tmp_path):
    settings = {"target_modules": ["qkv"], "modules_to_save": ["mask_decoder"]}
    folders = {task: write_adapter(sam, tmp_path / task, n, r=n, **settings) for n, task in enumerate("ab", 1)}
    one = nsc_merge.merge(sam, {"a": folders["a"]}, method="task_arithmetic", scale=1.0).apply(copy.deepcopy(sam))
    trained = PeftModel.from_pretrained(copy.deepcopy(sam), folders["a"])
    points = {**PIXELS, "input_points": torch.full((2, 1, 1, 2), 9.0)}

    def masks(model):
        with torch.no_grad():
            return model(**points).pred_masks

    torch.testing.assert_close(masks(one), masks(trained.eval()), **CLOSE)
    result = nsc_merge.merge(sam, folders, method="task_arithmetic", scale=0.5)
    path = "mask_decoder.upscale_conv1"
    base = sam.get_submodule(path)
    whole = [load_file(folder / WEIGHTS) for folder in folders.values()]
    merged = result.apply(copy.deepcopy(sam))
    for part, own in base.named_parameters():
        wanted = own + 0.5 * sum(weights[f"base_model.model.{path}.{part}"] - own for weights in whole)
        torch.testing.assert_close(merged.get_submodule(path).get_parameter(part), wanted, rtol=1e-5, atol=1e-6)
    with nsc_merge.attach(sam, result.adapters, 0.5):
        torch.testing.assert_close(masks(sam), masks(merged), **CLOSE)
    out = result.save(tmp_path / "out", ["lora", "model"])
    torch.testing.assert_close(masks(tf.SamModel.from_pretrained(out / "model")), masks(merged), **CLOSE)
    lora = PeftModel.from_pretrained(copy.deepcopy(sam), out / "lora")
    torch.testing.assert_close(masks(lora.eval()), masks(merged), **CLOSE)


def test_nsc_measures_no_linears_that_were_trained_in_full_alone(sam, tmp_path):
    settings = {"target_modules": ["qkv"], "modules_to_save": ["mask_decoder"]}
    folders = {task: write_adapter(sam, tmp_path / task, n, r=2, **settings) for n, task in enumerate("ab", 1)}
    data = {task: [{**PIXELS, "input_points": torch.full((2, 1, 1, 2), 9.0)}] for task in folders}
    result = nsc_merge.merge(sam, folders, data, "nsc", steps=2, progress=False)
    assert len({lam for row in result.coefficients.values() for lam in row.values()}) > 1
    assert nsc_merge.merge(sam, folders, data, "match", steps=1, ratio_weight=1.0, progress=False).paths
