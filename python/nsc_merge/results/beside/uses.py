"""What classes of transformers are for, by its own lists."""

from __future__ import annotations

import inspect
from typing import NamedTuple

from nsc_merge.models.traits import AUDIO


class Use(NamedTuple):
    """What a class of transformers is for.

    Attributes:
        table: where transformers lists such classes.
        auto: class that loads any of them.
        tag: the hub's name of the task, which is that of the pipeline.
    """

    table: str
    auto: str
    tag: str


TO_TEXT = "AutoModelForSeq2SeqLM"
SPEECH = "automatic-speech-recognition"
# A class counts as the first that lists it.
_USES = (
    Use("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "AutoModelForImageTextToText", "image-text-to-text"),
    Use("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "AutoModelForCausalLM", "text-generation"),
    Use("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "AutoModelForImageClassification", "image-classification"),
    Use("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "AutoModelForSequenceClassification", "text-classification"),
    Use("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", "AutoModelForTokenClassification", "token-classification"),
    Use("MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES", "AutoModelForSemanticSegmentation", "image-segmentation"),
    Use("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "AutoModelForSpeechSeq2Seq", SPEECH),
    Use("MODEL_FOR_CTC_MAPPING_NAMES", "AutoModelForCTC", SPEECH),
    Use("MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES", "AutoModelForAudioClassification", "audio-classification"),
    Use("MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES", "AutoModelForObjectDetection", "object-detection"),
    Use(
        "MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES",
        "AutoModelForZeroShotObjectDetection",
        "zero-shot-object-detection",
    ),
    Use("MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES", "AutoModelForUniversalSegmentation", "image-segmentation"),
    Use("MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES", "AutoModelForDepthEstimation", "depth-estimation"),
    Use("MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES", "AutoModelForVideoClassification", "video-classification"),
    Use("MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES", "AutoModelForQuestionAnswering", "question-answering"),
    # The hub has a tag for each task of these, and none for all.
    Use("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", TO_TEXT, ""),
    Use("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "AutoModelForMaskedLM", "fill-mask"),
    Use(
        "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES",
        "AutoModelForZeroShotImageClassification",
        "zero-shot-image-classification",
    ),
    Use("MODEL_MAPPING_NAMES", "AutoModel", "feature-extraction"),
)


def use_of(kind: str, remote: str | None = None) -> Use | None:
    """What a class of transformers is for, or one that the class ``remote`` loads with code that comes with a model;
    None of a class that no table lists.
    """
    from transformers.models.auto import modeling_auto

    if remote is not None:
        # What AutoModel loads may give anything.
        return next((use for use in _USES if use.auto == remote != "AutoModel"), None)
    for use in _USES:
        listed = getattr(modeling_auto, use.table).values()
        if any(kind == name or (isinstance(name, tuple | list) and kind in name) for name in listed):
            return use
    return None


def inputs_of(kind: str) -> set[str]:
    """What the forward of a class of transformers takes, by name."""
    import transformers

    return set(inspect.signature(getattr(transformers, kind).forward).parameters)


def reads_and_hears(kind: str) -> bool:
    """Whether a class of transformers takes audio in the midst of text, which pipelines of speech give no model. It
    lists such classes (Qwen2-Audio, Granite Speech) with those that have an encoder.
    """
    taken = inputs_of(kind)
    return "input_ids" in taken and "decoder_input_ids" not in taken and not taken.isdisjoint(AUDIO)
