"""Samples made inputs of a model, by what the model takes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nsc_merge.calibration.on_disk import Keep, in_memory
from nsc_merge.calibration.raw.columns import Sample
from nsc_merge.calibration.raw.drawing import DECODED, DECODED_MASK, TOKENS, Encoded, Filling
from nsc_merge.calibration.raw.inputs.audio import Listening, audio_fillings, encode_audio
from nsc_merge.calibration.raw.inputs.images import encode_beside, encode_images
from nsc_merge.calibration.raw.inputs.pairs import Media, encode_pairs
from nsc_merge.calibration.raw.inputs.text import add_decoded, encode_text
from nsc_merge.calibration.raw.inputs.words import encode_words
from nsc_merge.calibration.raw.media.audio import AudioReader
from nsc_merge.calibration.raw.media.images import ImageReader
from nsc_merge.calibration.raw.preprocessors import (
    Base,
    extractor_in,
    feature_extractor_of,
    image_processor_of,
    processor_of,
    tokenizer_of,
)
from nsc_merge.calibration.raw.settings import DataSettings

# Characters of the first sample that are kept to be shown.
_SHOWN = 300


@dataclass(frozen=True)
class Made:
    """Samples made inputs.

    Attributes:
        encoded: inputs of every sample.
        padded: how those that are padded are padded; None of images alone.
        first: the first sample as text.
        tokenizer: by which texts were made tokens; None where there are none.
        words: of samples of words, of every token the number of its word, None of special ones.
    """

    encoded: list[Encoded]
    padded: dict[str, Filling] | None
    first: str
    tokenizer: Any = None
    words: list[list[int | None]] = field(default_factory=list)


def encode(
    samples: Sequence[Sample],
    base: Base,
    settings: DataSettings,
    folder: Path | None,
    argument: str,
    keep: Keep = in_memory,
) -> tuple[Made, dict[str, str]]:
    """What a base takes of samples, and the digest of the images or audio that were opened, by what it is called.

    Args:
        folder: that paths in the samples are relative to.
        argument: how messages call the data.
        keep: where what is made of images and recordings is held.

    Raises:
        ValueError, OSError: naming a sample, or what its tokenizer or processor lacks.
    """
    images, audio = ImageReader(folder, grey=base.grey), AudioReader(folder)
    if base.text:
        made = _text(samples, base, settings, images, audio, argument, keep)
    elif base.audio:
        made = _audio(samples, base, settings, audio, argument, keep)
    else:
        made = _images(samples, base, settings, images, argument, keep)
    opened = {"images": images.sha256, "audio": audio.sha256}
    return made, {name: sha256 for name, sha256 in opened.items() if sha256 is not None}


def _images(
    samples: Sequence[Sample], base: Base, settings: DataSettings, reader: ImageReader, argument: str, keep: Keep
) -> Made:
    """Images, with what a decoder reads where there is one."""
    processor = image_processor_of(base, settings, argument)
    encoded, first = encode_images(samples, processor, base, reader, keep), _shown(samples[0].images[0], "an image")
    if not base.decodes:
        return Made(encoded, None, first[:_SHOWN])
    encoded = [{name: value[None] for name, value in one.items()} for one in encoded]
    return _behind(encoded, {}, first, samples, base, settings, argument)


def _text(
    samples: Sequence[Sample],
    base: Base,
    settings: DataSettings,
    images: ImageReader,
    audio: AudioReader,
    argument: str,
    keep: Keep,
) -> Made:
    """Text, with images and recordings where there are some."""
    words: list[list[int | None]] = []
    with_media = any(
        sample.images or sample.audio or any(isinstance(turn["content"], list) for turn in sample.messages or ())
        for sample in samples
    )
    if (base.apart or base.in_front) and not with_media:
        raise ValueError(f"{argument}: holds text alone, and the base takes an image beside it; expected both in a row")
    if (base.images or base.audio) and with_media:
        processor = processor_of(base, settings, argument)
        tokenizer = processor.tokenizer
        if hasattr(processor, "image_token") or hasattr(processor, "audio_token"):
            extractor = extractor_in(processor)
            longest = getattr(processor, "max_audio_len", None)
            heard = None if extractor is None else Listening(extractor, settings, audio, longest)
            media = Media(images, heard)
            encoded = encode_pairs(samples, processor, base, settings, media, keep)
        elif base.audio:
            raise ValueError(
                f"{argument}: {type(processor).__name__} has no token for audio in a text; write inputs as .safetensors"
            )
        else:
            encoded = encode_beside(samples, processor, base, settings, images, keep)
    else:
        tokenizer = tokenizer_of(base, settings, argument)
        if samples[0].words is not None:
            encoded, words = encode_words(samples, tokenizer, base, settings, argument)
        else:
            encoded = encode_text(samples, tokenizer, base, settings)
    if base.decodes:
        add_decoded(encoded, samples, tokenizer, base, settings)
    # An image's token stands there as often as the image has patches.
    first = re.sub(r"(<[^<>\s]+>)(\s*\1)+", r"\1", tokenizer.decode(encoded[0][TOKENS]))
    return Made(encoded, paddings(encoded[0], tokenizer, base, settings), first[:_SHOWN], tokenizer, words)


def _audio(
    samples: Sequence[Sample], base: Base, settings: DataSettings, reader: AudioReader, argument: str, keep: Keep
) -> Made:
    """Audio, with what a decoder reads where there is one."""
    extractor = feature_extractor_of(base, settings, argument)
    encoded = encode_audio(samples, extractor, base, settings, reader, keep)
    padded, first = audio_fillings(encoded, extractor), _shown(samples[0].audio[0], "audio")
    if not base.decodes:
        return Made(encoded, padded, first[:_SHOWN])
    return _behind(encoded, padded, first, samples, base, settings, argument)


def _behind(
    encoded: list[Encoded],
    padded: dict[str, Filling],
    first: str,
    samples: Sequence[Sample],
    base: Base,
    settings: DataSettings,
    argument: str,
) -> Made:
    """The same with what the decoder reads behind an encoder of images or audio."""
    tokenizer = tokenizer_of(base, settings, argument)
    add_decoded(encoded, samples, tokenizer, base, settings)
    decoded = {name: value for name, value in encoded[0].items() if name in (DECODED, DECODED_MASK)}
    said = f"{first}: {tokenizer.decode(encoded[0][DECODED])}"
    return Made(encoded, padded | paddings(decoded, tokenizer, base, settings), said[:_SHOWN], tokenizer)


def _shown(value: Any, otherwise: str) -> str:
    return str(value) if isinstance(value, (str, Path)) else otherwise


def paddings(one: Encoded, tokenizer: Any, base: Base, settings: DataSettings) -> dict[str, Filling]:
    """How the inputs of samples with texts are padded, as those of ``one`` are called."""
    # Where the mask is 0 any token will do; none is ever added to a tokenizer for it.
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    filler = next(number for number in known if number is not None)
    padded = {}
    for name, value in one.items():
        # Others of one dimension count images or recordings.
        if value.dim() == 1 and (name in (DECODED, DECODED_MASK) or len(value) == len(one[TOKENS])):
            # An answer begins where the decoder does.
            side = "right" if base.writes and name in (DECODED, DECODED_MASK) else settings.padding_side
            padded[name] = Filling(filler if name in (TOKENS, DECODED) else 0, side)
    return padded
