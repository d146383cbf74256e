"""The code of cards runs for models of sound, encoder-decoders and two towers, and there is none that could not."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import served_cases
import torch
import transformers as tf
from PIL import Image
from test_card_code import blocks, run
from test_model_card import metadata
from zoo import write_adapter

import nsc_merge
from nsc_merge.results.beside.next_commands import next_commands

SMALL = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BLOCK = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0, **SMALL}
IMAGES = {"image_size": 8, "patch_size": 4}
SIZE = {"height": 8, "width": 8}
SOUND = {
    **BLOCK, "vocab_size": 64, "pad_token_id": 0, "num_feat_extract_layers": 1, "conv_dim": (16,), "num_labels": 3,
    "conv_kernel": (400,), "conv_stride": (160,), "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
WAVE = np.random.default_rng(0).standard_normal(16_000).astype(np.float32)


def clip():
    text = {**BLOCK, **SMALL, "max_position_embeddings": 32}
    return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config={**BLOCK, **IMAGES}, projection_dim=16))


def captioner():
    sees, writes = tf.ViTConfig(**BLOCK, **IMAGES), tf.BertConfig(**BLOCK, **SMALL, is_decoder=True)
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(sees, writes)
    config.decoder.add_cross_attention = True
    return tf.VisionEncoderDecoderModel(config)


def detector():
    config = tf.YolosConfig(**BLOCK, image_size=[8, 8], patch_size=4, num_detection_tokens=3, num_labels=4)
    return tf.YolosForObjectDetection(config)


def depth():
    stages = {"num_hidden_layers": 4, "out_features": ["stage1", "stage2", "stage3", "stage4"]}
    backbone = tf.Dinov2Config(**{**BLOCK, **IMAGES, **stages}, reshape_hidden_states=False)
    sizes = {"reassemble_hidden_size": 32, "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "head_hidden_size": 8}
    return tf.DepthAnythingForDepthEstimation(tf.DepthAnythingConfig(backbone_config=backbone, **sizes, patch_size=4))


def pictures():
    return tf.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})


KINDS = {
    "ctc": (lambda: tf.Wav2Vec2ForCTC(tf.Wav2Vec2Config(**SOUND)), "q_proj", tf.Wav2Vec2FeatureExtractor),
    "sounds": (
        lambda: tf.Wav2Vec2ForSequenceClassification(tf.Wav2Vec2Config(**SOUND)), "q_proj", tf.Wav2Vec2FeatureExtractor
    ),
    "t5": (lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)), "q", None),
    "clip": (clip, "q_proj", pictures),
    "boxes": (detector, ["query", "q_proj"], partial(tf.YolosImageProcessor, size=SIZE)),
    "depth": (depth, ["query", "q_proj"], partial(tf.DPTImageProcessor, size=SIZE)),
    "words": (lambda: tf.BertForMaskedLM(tf.BertConfig(**BLOCK, **SMALL)), "query", None),
    "bare sound": (lambda: tf.Wav2Vec2Model(tf.Wav2Vec2Config(**SOUND)), "q_proj", tf.Wav2Vec2FeatureExtractor),
    "bare t5": (lambda: tf.T5Model(tf.T5Config(**T5)), "q", None),
    "captioner": (captioner, "query", pictures),
}  # fmt: skip


def merge(kind, place):
    """A merge on a base with tokenizer and processor, and its model in memory."""
    build, target, processor = KINDS[kind]
    torch.manual_seed(0)
    model = build().eval()
    model.save_pretrained(place / "base")
    if kind not in ("boxes", "depth"):
        # Beside a detector, a pipeline would look for words.
        served_cases.tokenizer(template=None).save_pretrained(place / "base")
    if processor is not None:
        processor().save_pretrained(place / "base")
    model = type(model).from_pretrained(place / "base").eval()
    targets = {"target_modules": target if isinstance(target, list) else [target]}
    folders = {str(n): write_adapter(model, place / str(n), n, r=4, **targets) for n in (1, 2)}
    return nsc_merge.merge(model, folders, method="task_arithmetic")


@pytest.fixture(autouse=True)
def heard(monkeypatch):
    """Sound is read from files by ffmpeg, which is no part of an installation."""
    for name in ("automatic_speech_recognition", "audio_classification"):
        monkeypatch.setattr(f"transformers.pipelines.{name}.ffmpeg_read", lambda *_: WAVE)


@pytest.mark.parametrize(
    ("kind", "made", "tag"),
    [
        ("ctc", "transcribe", "automatic-speech-recognition"),
        ("sounds", "classify", "audio-classification"),
        ("clip", "classify", "zero-shot-image-classification"),
        ("t5", "tokens", None),
    ],
)
def test_it_says_what_the_merged_model_does(kind, made, tag, tmp_path):
    result = merge(kind, tmp_path)
    out = result.save(tmp_path / "out", ["lora", "model"])
    assert metadata(out).get("pipeline_tag") == tag
    model = result.apply(copy.deepcopy(result.model))
    (out / "speech.wav").touch()
    for code in blocks(out):
        found = run(code, out)
        if kind == "t5":
            words = found["tokenizer"]("Once upon a time", return_tensors="pt", return_token_type_ids=False)
            assert torch.equal(found["tokens"], model.generate(**words, max_new_tokens=32))
            continue
        loaded = found[made].model.eval()
        given = {"pixel_values": torch.rand(1, 3, 8, 8), "input_ids": torch.tensor([[7, 8, 2]])}
        given = given if kind == "clip" else {"input_values": torch.from_numpy(WAVE)[None]}
        there = {name: value.to(loaded.device) for name, value in given.items()}
        torch.testing.assert_close(loaded(**there)[0].cpu(), model(**given)[0], rtol=1e-4, atol=1e-5)


def test_a_command_transcribes_with_the_merged_model(tmp_path):
    result = merge("ctc", tmp_path)
    result.save(tmp_path / "out", "model")
    command, _ = next_commands(result, tmp_path / "out", ["config.json", "preprocessor_config.json"], pushed=False)
    assert 'pipeline("automatic-speech-recognition", model=' in command
    assert '("speech.wav")' in command


@pytest.mark.parametrize(
    ("kind", "made", "tag"), [("boxes", "detect", "object-detection"), ("depth", "estimate", "depth-estimation")]
)
def test_pictures_are_more_than_classified(kind, made, tag, tmp_path):
    result = merge(kind, tmp_path)
    out = result.save(tmp_path / "out", ["lora", "model"])
    assert metadata(out)["pipeline_tag"] == tag
    Image.new("RGB", (8, 8), "red").save(out / "picture.png")
    photo = {"pixel_values": torch.rand(1, 3, 8, 8)}
    wanted = result.apply(copy.deepcopy(result.model))(**photo)
    for code in blocks(out):
        found = run(code, out)[made].model.eval()(**photo)
        for name in ("logits", "pred_boxes", "predicted_depth"):
            if name in wanted:
                torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5)
    files = [f"model/{name}" for name in ("config.json", "preprocessor_config.json")]
    command, _ = next_commands(result, out, files, pushed=False)
    assert f'pipeline("{tag}", model=' in command


def test_a_masked_language_model_is_tagged_and_loaded_as_one(tmp_path):
    out = merge("words", tmp_path).save(tmp_path / "out", "model")
    assert metadata(out)["pipeline_tag"] == "fill-mask"
    assert "AutoModelForMaskedLM" in blocks(out)[0]


@pytest.mark.parametrize("kind", ["bare sound", "bare t5", "captioner"])
def test_there_is_no_code_that_could_not_run(kind, tmp_path):
    out = merge(kind, tmp_path).save(tmp_path / "out", "model")
    (code,) = blocks(out)
    assert not [name for name in ("tokenizer", "prepare", "processor") if name in code]
    assert type(run(code, out)["model"]).__name__ == type(KINDS[kind][0]()).__name__
