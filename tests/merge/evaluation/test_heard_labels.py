"""Classes of recordings."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
import zoo
from audio_cases import audio_base, model_of, noise, write_wave
from test_raw_labels import suite_of

pytestmark = pytest.mark.usefixtures("offline")


def test_classes_of_a_head_of_two_layers_are_the_bases(tmp_path):
    """wav2vec 2.0 and its kin have a projector before their classifier, and behind it by name."""
    model = model_of("without a mask")
    model.config.id2label = dict(enumerate(("yes", "no", "stop")))
    model.save_pretrained(tmp_path / "base")
    tf.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / "base")
    heads = ["projector", "classifier"]
    zoo.write_adapter(model, tmp_path / "adapter", 1, r=2, target_modules=["q_proj"], modules_to_save=heads)
    for number, name in enumerate(("stop", "yes", "no")):
        write_wave(tmp_path / "clips" / name / f"{number}.wav", noise(0.1, number))
    labels = suite_of(tmp_path, {"test": "clips", "metric": "accuracy"}).labelled("t", "test")
    assert sorted(torch.cat([label for _, label in labels]).tolist()) == [0, 1, 2]


def test_a_folder_is_no_transcript(tmp_path):
    model = model_of("whisper")
    model.save_pretrained(tmp_path / "base")
    audio_base(tmp_path / "base", "whisper")
    zoo.write_adapter(model, tmp_path / "adapter", 1, r=2, target_modules=["q_proj"])
    write_wave(tmp_path / "clips" / "yes" / "0.wav", noise(0.1))
    with pytest.raises(ValueError, match="row 1: no column of labels, such as answer, in audio; expected labels: COL"):
        suite_of(tmp_path, {"test": "clips", "metric": "wer", "generate": True})
