"""Images made inputs: alone, and beside a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nsc_merge.calibration.on_disk import Keep, in_memory
from nsc_merge.calibration.raw.columns import Sample
from nsc_merge.calibration.raw.drawing import Encoded
from nsc_merge.calibration.raw.inputs.checks import counting, processed
from nsc_merge.calibration.raw.inputs.text import encode_text
from nsc_merge.calibration.raw.media.images import ImageReader
from nsc_merge.calibration.raw.preprocessors import Base
from nsc_merge.calibration.raw.settings import DataSettings

# Images that are open at the same time.
_AT_ONCE = 32


def encode_images(
    samples: Sequence[Sample], processor: Any, base: Base, reader: ImageReader, keep: Keep = in_memory
) -> list[Encoded]:
    """What the image processor makes of the one image of every sample."""
    found: list[Encoded] = []
    with counting(samples) as progress:
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
                reason = " ".join(str(error).split())
                raise ValueError(
                    f"{some[0].where} and the next: the image processor refuses them: {reason:.200}"
                ) from None
            names = [name for name in encoded if name in base.takes]
            odd = next((name for name in names if len(encoded[name]) != len(some)), None)
            if odd is not None:
                # As of a processor of videos, for which several images are the frames of one.
                raise ValueError(
                    f"{some[0].where} and the next: {type(processor).__name__} makes {len(encoded[odd])} {odd} of "
                    f"{len(some)} images, expected one of each; write inputs as .safetensors"
                )
            kept = keep({name: encoded[name] for name in names})
            found += [{name: value[number] for name, value in kept.items()} for number in range(len(some))]
            progress.update(len(some))
    return found


def encode_beside(
    samples: Sequence[Sample],
    processor: Any,
    base: Base,
    settings: DataSettings,
    reader: ImageReader,
    keep: Keep = in_memory,
) -> list[Encoded]:
    """Text and image of every sample, each by itself, for models whose text has no place for an image (CLIP)."""
    texts = encode_text(samples, processor.tokenizer, base, settings)
    images = encode_images(samples, processor.image_processor, base, reader, keep)
    pairs = zip(texts, images, strict=True)
    return [{**text, **{name: value[None] for name, value in image.items()}} for text, image in pairs]
