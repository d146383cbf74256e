"""Images made inputs: alone, beside a text, and in its midst."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nsc_merge.calibration.raw.chats import in_parts
from nsc_merge.calibration.raw.columns import Sample
from nsc_merge.calibration.raw.drawing import TOKENS, Encoded
from nsc_merge.calibration.raw.inputs.checks import (
    ENDS,
    add_mask,
    check_tokens,
    check_unicode,
    longest,
    processed,
    say_cut,
)
from nsc_merge.calibration.raw.inputs.text import encode_text, rendered
from nsc_merge.calibration.raw.media.images import ImageReader
from nsc_merge.calibration.raw.preprocessors import Base
from nsc_merge.calibration.raw.settings import DataSettings

# Images that are open at the same time.
_AT_ONCE = 32
# What stands for an image in texts that are made for no certain model.
_PLACE = "<image>"


def encode_images(samples: Sequence[Sample], processor: Any, base: Base, reader: ImageReader) -> list[Encoded]:
    """What the image processor makes of the one image of every sample."""
    found: list[Encoded] = []
    for start in range(0, len(samples), _AT_ONCE):
        some = samples[start : start + _AT_ONCE]
        images = []
        for sample in some:
            if len(sample.images) != 1:
                raise ValueError(f"{sample.where}: expected one image, found {len(sample.images)}")
            images.append(reader.open(sample.images[0], sample.where))
        try:
            encoded = processed(processor, images)
        except ValueError as error:
            raise ValueError(
                f"{some[0].where} and the next: the image processor refuses them: {' '.join(str(error).split()):.200}"
            ) from None
        names = [name for name in encoded if name in base.takes]
        found += [{name: encoded[name][number] for name in names} for number in range(len(some))]
    return found


def encode_beside(
    samples: Sequence[Sample], processor: Any, base: Base, settings: DataSettings, reader: ImageReader
) -> list[Encoded]:
    """Text and image of every sample, each by itself, for models whose text has no place for an image (CLIP)."""
    texts = encode_text(samples, processor.tokenizer, base, settings)
    images = encode_images(samples, processor.image_processor, base, reader)
    pairs = zip(texts, images, strict=True)
    return [{**text, **{name: value[None] for name, value in image.items()}} for text, image in pairs]


def encode_pairs(
    samples: Sequence[Sample], processor: Any, base: Base, settings: DataSettings, reader: ImageReader
) -> list[Encoded]:
    """What the processor makes of text and images of every sample, without padding.

    Raises:
        ValueError: naming a sample with more or fewer places for images than images, or with too many tokens.
    """
    processor.tokenizer.truncation_side = settings.truncation_side
    most = longest(base, settings)
    cut: list[Sample] = []
    found = [_pair(sample, processor, base, settings, reader, most, cut) for sample in samples]
    say_cut(cut, len(samples), most, ENDS[settings.truncation_side])
    return found


def _pair(
    sample: Sample,
    processor: Any,
    base: Base,
    settings: DataSettings,
    reader: ImageReader,
    most: int,
    cut: list[Sample],
) -> Encoded:
    """What the processor makes of one sample, which is added to ``cut`` where that is not all of its text."""
    text, references = _image_text(sample, processor, base)
    check_unicode(text, sample.where)
    images = [reader.open(one, sample.where) for one in references]
    bos = processor.tokenizer.bos_token
    given: dict[str, Any] = {"text": [text], "images": images or None}
    if bos and text.startswith(bos):
        given["add_special_tokens"] = False
    encoded = processed(processor, **given)
    # What stands in the text, and what it becomes, which is another in Gemma 3.
    of_an_image = [one for one in (processor.image_token_id, base.image_token) if one is not None]
    of_images = int(torch.isin(encoded[TOKENS], torch.tensor(of_an_image, device="cpu")).sum())
    # The model's positions are for both; what is asked for is of text.
    room = min(most, (base.positions or most + of_images) - of_images)
    if room < 1:
        raise ValueError(f"{sample.where}: its images are {of_images} tokens, the model has {base.positions} positions")
    if settings.truncation and encoded[TOKENS].shape[1] > of_images + room:
        cut.append(sample)
        try:
            encoded = processed(processor, **given, truncation=True, max_length=of_images + room)
        except ValueError:
            raise ValueError(
                f"{sample.where}: {room} tokens of text would cut an image off; expected a larger max_length, or "
                "images at the other end"
            ) from None
    shape = encoded[TOKENS].shape
    # Labels, which PaliGemma's processor makes, are of training.
    taken = {name: value for name, value in encoded.items() if name in base.takes and name != "labels"}
    one = {name: value[0] if value.shape == shape else value for name, value in taken.items()}
    add_mask(one, base)
    check_tokens(one[TOKENS], len(one[TOKENS]) - of_images, room, sample.where, base)
    return one


def _image_text(sample: Sample, processor: Any, base: Base) -> tuple[str, list[Any]]:
    """Text with a token in the place of every image, and the images in their order."""
    token = processor.image_token
    references = list(sample.images)

    def placed(said: str) -> str:
        # As data for LLaVA say it, whatever the model calls the place of an image.
        return said.replace(_PLACE, token) if references else said

    text = placed(str(sample.text))
    plain = not references or token in str(sample.text) or not getattr(processor, "chat_template", None)
    if sample.messages is None and plain:
        # A line of its own, as LLaVA was trained; PaliGemma was without.
        line = "\n" if references and base.config.model_type != "paligemma" else ""
        text = text if token in text else token * len(references) + line + text
    else:
        turns = sample.messages or [{"role": "user", "content": text}]
        said = (placed(one["content"]) if isinstance(one["content"], str) else one["content"] for one in turns)
        messages = in_parts([{**one, "content": what} for one, what in zip(turns, said, strict=True)], token)
        parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
        if not parts and references:
            first = next((one for one in messages if one["role"] == "user"), messages[0])
            first["content"] = [*({"type": "image"} for _ in references), *first["content"]]
        elif any("image" in part for part in parts):
            left = iter(references)
            references = [part["image"] if "image" in part else next(left, None) for part in parts]
        text = rendered(sample, processor, messages)
    if text.count(token) != len(references) or any(one is None for one in references):
        raise ValueError(
            f"{sample.where}: expected as many images as places for them, found {len(references)} images and "
            f"{text.count(token)} times {token!r}"
        )
    return text, references
