"""The model types of transformers, and a small random model of each with a batch that it computes."""

from __future__ import annotations

import contextlib
import copy
import signal
from collections.abc import Iterator
from types import FrameType

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from bench.sweeps import media_inputs, own_media, text_inputs
from bench.sweeps.small_configs import CUTS, small

TEXT = ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "TEXT_ENCODING")
MEDIA = (
    "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SPEECH_SEQ_2_SEQ", "CTC", "RNNT", "TDT", "AUDIO_CLASSIFICATION",
    "IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION", "SEMANTIC_SEGMENTATION", "UNIVERSAL_SEGMENTATION",
    "INSTANCE_SEGMENTATION", "IMAGE_SEGMENTATION", "OBJECT_DETECTION", "ZERO_SHOT_OBJECT_DETECTION", "DEPTH_ESTIMATION",
    "ZERO_SHOT_IMAGE_CLASSIFICATION", "MASK_GENERATION", "KEYPOINT_DETECTION", "KEYPOINT_MATCHING", "POSE_ESTIMATION",
    "TEXT_TO_SPECTROGRAM", "TEXT_TO_WAVEFORM", "TIME_SERIES_PREDICTION", "TIME_SERIES_CLASSIFICATION",
    "DOCUMENT_QUESTION_ANSWERING", "VISUAL_QUESTION_ANSWERING", "MASKED_IMAGE_MODELING", "PRETRAINING",
)  # fmt: skip
# Of texts also heads that are each task's own.
HEADS = {
    "text": TEXT,
    "media": MEDIA,
    "sequences": ("SEQUENCE_CLASSIFICATION",),
    "tokens": ("TOKEN_CLASSIFICATION",),
    "questions": ("QUESTION_ANSWERING",),
}
LARGEST = 100_000_000


def classes(heads: str) -> dict[str, str]:
    """Model type -> class, of every type that has one of these heads; of media also the types that have none."""
    found: dict[str, str] = {}
    for head in HEADS[heads]:
        names = getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES")
        found.update({kind: _first(name) for kind, name in names.items() if kind not in found})
    if heads == "media":
        text = classes("text")
        found = {kind: name for kind, name in found.items() if kind not in text or "image" in kind}
        bare = modeling_auto.MODEL_MAPPING_NAMES
        found.update({kind: _first(name) for kind, name in bare.items() if kind not in found and kind not in text})
    return found


def _first(name: str | tuple[str, ...]) -> str:
    return name if isinstance(name, str) else name[0]


def build(kind: str, name: str, heads: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A small model with random numbers and a batch that it computes, with no more of it cut than it allows.

    Raises:
        Exception: of the model, which is its own.
    """
    try:
        return _built(kind, name, heads, CUTS[0])
    except Exception as error:
        first = error
    for cut in CUTS[1:]:
        with contextlib.suppress(Exception):
            return _built(kind, name, heads, cut)
    raise first


def _built(kind: str, name: str, heads: str, cut: str) -> tuple[nn.Module, dict[str, Tensor]]:
    if kind in own_media.TOO_LARGE:
        raise ValueError("images too large for a sweep")
    make = getattr(transformers, name)
    with limited(90):
        own = make.config_class or CONFIG_MAPPING[kind]
        config = own(**small(own(), cut))
        for part in (config, getattr(config, "text_config", config)) if heads != "media" else ():
            if getattr(part, "pad_token_id", None) is None:
                part.pad_token_id = 0  # which classifiers need, to tell where a text ends
            if part.is_encoder_decoder and getattr(part, "decoder_start_token_id", None) is None:
                part.decoder_start_token_id = 0
        # Some write what they derive into it.
        kept = copy.deepcopy(config)
        with torch.device("meta"):
            size = sum(value.numel() for value in make(config).parameters())
        if size > LARGEST:
            raise ValueError(f"{size:,} parameters")
        torch.manual_seed(0)
        model = make(kept).eval()
        batch = media_inputs.inputs(model, config) if heads == "media" else text_inputs.inputs(model)
        with torch.no_grad():
            model(**batch)
    return model, batch


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """No more than so many seconds for what is inside, a :class:`TimeoutError` else."""

    def stop(_: int, __: FrameType | None) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
