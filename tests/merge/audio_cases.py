"""Small models of audio with the feature extractors and tokenizers that they have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import transformers as tf
from served_cases import tokenizer
from tokenizers import processors

RATE = 16_000
WHISPER_WORDS = ["<|endoftext|>", *"abcdefgh", "\u0120", *(f"<|{one}|>" for one in (
    "startoftranscript", "en", "zh", "de", "translate", "transcribe", "notimestamps"))]  # fmt: skip
START = WHISPER_WORDS.index("<|startoftranscript|>")

_LAYERS = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
_FFN = {"encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
_WAV2VEC = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8,
    "conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": 64, "num_labels": 3,
}
_NUMBERS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_WHISPER = {
    **_LAYERS, **_FFN, **_NUMBERS, "d_model": 8, "vocab_size": 64, "num_mel_bins": 4,
    "max_source_positions": 100, "max_target_positions": 12, "classifier_proj_size": 8, "num_labels": 3,
    "decoder_start_token_id": START, "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip

# Class, configuration, feature extractor.
MODELS: Mapping[str, tuple[str, Mapping[str, Any], Callable[[], Any]]] = {
    "whisper": (
        "WhisperForConditionalGeneration", _WHISPER, lambda: tf.WhisperFeatureExtractor(feature_size=4, chunk_length=2)
    ),
    "whisper classifier": (
        "WhisperForAudioClassification", _WHISPER, lambda: tf.WhisperFeatureExtractor(feature_size=4, chunk_length=2)
    ),
    # Norms over time would see padding, which is why those that have them are not given a mask.
    "ctc": (
        "Wav2Vec2ForCTC",
        {**_WAV2VEC, "feat_extract_norm": "layer"},
        lambda: tf.Wav2Vec2FeatureExtractor(return_attention_mask=True),
    ),
    "without a mask": ("HubertForSequenceClassification", _WAV2VEC, lambda: tf.Wav2Vec2FeatureExtractor()),
    "ast": (
        "ASTForAudioClassification",
        {
            "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 8, "patch_size": 4,
            "num_mel_bins": 16, "max_length": 64, "frequency_stride": 4, "time_stride": 4, "num_labels": 3,
        },
        lambda: tf.ASTFeatureExtractor(num_mel_bins=16, max_length=64),
    ),
    "speech to text": (
        "Speech2TextForConditionalGeneration",
        {
            **_LAYERS, **_FFN, **_NUMBERS, "d_model": 8, "vocab_size": 64, "input_feat_per_channel": 8,
            "max_source_positions": 300, "max_target_positions": 12, "conv_channels": 8, "num_conv_layers": 2,
        },
        lambda: tf.Speech2TextFeatureExtractor(feature_size=8, num_mel_bins=8),
    ),
}  # fmt: skip
CONFIGS = {"whisper": "whisper", "whisper classifier": "whisper", "ctc": "wav2vec2", "without a mask": "hubert",
           "ast": "audio-spectrogram-transformer", "speech to text": "speech_to_text"}  # fmt: skip


def audio_base(folder: Path, name: str, **changed: Any) -> Path:
    """A folder without weights, with a feature extractor, and a tokenizer where it writes."""
    kind, sizes, extractor = MODELS[name]
    tf.AutoConfig.for_model(CONFIGS[name], architectures=[kind], **{**sizes, **changed}).save_pretrained(folder)
    extractor().save_pretrained(folder)
    if "decoder_start_token_id" in sizes:
        (whisper_words() if name == "whisper" else words()).save_pretrained(folder)
    return folder


def model_of(name: str, **changed: Any) -> Any:
    kind, sizes, _ = MODELS[name]
    torch.manual_seed(0)
    config = tf.AutoConfig.for_model(CONFIGS[name], **{**sizes, **changed})
    return getattr(tf, kind)(config).eval()


def words() -> Any:
    made = tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    return made


def whisper_words() -> Any:
    """Whisper's own class, which puts start, language and task in front of what it reads."""
    vocabulary = {word: number for number, word in enumerate(WHISPER_WORDS)}
    made = tf.WhisperTokenizer(vocab=vocabulary, merges=[], language="de", task="transcribe")
    special = [word for word in WHISPER_WORDS if word.startswith("<|")]
    made.add_special_tokens({"additional_special_tokens": special})
    made.set_prefix_tokens(language="de", task="transcribe")
    return made


def noise(seconds: float, seed: int = 0, rate: int = RATE) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(round(seconds * rate))).astype(np.float32)


def write_wave(file: Path, wave: np.ndarray, rate: int = RATE) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(file, wave, rate, subtype="FLOAT" if file.suffix == ".wav" else None)
    return file
