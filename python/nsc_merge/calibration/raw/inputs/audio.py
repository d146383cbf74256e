"""Audio made inputs by a model's feature extractor: samples, or frames of a spectrogram."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nsc_merge.calibration.raw.columns import Sample
from nsc_merge.calibration.raw.drawing import MASK, Encoded, Filling
from nsc_merge.calibration.raw.inputs.checks import ENDS, processed
from nsc_merge.calibration.raw.media.audio import AudioReader, Taken
from nsc_merge.calibration.raw.preprocessors import Base
from nsc_merge.calibration.raw.settings import DataSettings
from nsc_merge.utils.errors import logger


def encode_audio(
    samples: Sequence[Sample], extractor: Any, base: Base, settings: DataSettings, reader: AudioReader
) -> list[Encoded]:
    """What the feature extractor makes of every recording by itself, at its own rate.

    An input whose first dimension is time is as long as the recording and to be padded (:func:`audio_fillings`); every
    other has a first dimension of one recording.

    Raises:
        ValueError: naming a sample that cannot be decoded, or is too long where none may be cut, or too short.
    """
    most = _most(extractor, settings)
    taken = Taken(extractor.sampling_rate, most, settings.truncation_side)
    found, cut = [], []
    for sample in samples:
        wave, longer = reader.open(sample.audio, sample.where, taken)
        if longer and not settings.truncation:
            raise ValueError(
                f"{sample.where}: expected at most {most / taken.rate:g} s of audio, found more; give truncation: "
                "true, or a larger max_seconds where the model takes more"
            )
        if longer:
            cut.append(sample)
        found.append(_features(wave, sample.where, extractor, base))
    if cut:
        logger.warning(
            "%s: longer than %g s, as are %d of the %d recordings; cut at the %s (max_seconds, truncation_side)",
            cut[0].where, most / taken.rate, len(cut), len(samples), ENDS[settings.truncation_side],
        )  # fmt: skip
    return found


def audio_fillings(encoded: Sequence[Encoded], extractor: Any) -> dict[str, Filling]:
    """How the inputs of recordings are padded: as the extractor pads them, at the end."""
    filler = getattr(extractor, "padding_value", 0.0)
    one = encoded[0]
    return {name: Filling(0 if name == MASK else filler, "right") for name in one if _over_time(one, name)}


def _features(wave: Any, where: str, extractor: Any, base: Base) -> Encoded:
    least = _least(base)
    if len(wave) < least:
        raise ValueError(f"{where}: expected at least {least} samples of audio, found {len(wave)}")
    try:
        made = processed(extractor, [wave], sampling_rate=extractor.sampling_rate)
    except ValueError as error:
        raise ValueError(f"{where}: the feature extractor refuses it: {' '.join(str(error).split()):.200}") from None
    one = {name: value[0] for name, value in made.items() if name in base.takes}
    odd = next((name for name, value in one.items() if not value.isfinite().all()), None)
    if odd is not None:
        # As of silence that is divided by how far it is spread.
        raise ValueError(f"{where}: the feature extractor makes {odd} of it that is not finite; leave it out")
    if MASK in one:
        one[MASK] = one[MASK].long()
    return {name: value if _over_time(one, name) else value[None] for name, value in one.items()}


def _over_time(one: Encoded, name: str) -> bool:
    """Whether an input's first dimension is time, of which recordings have more or less: samples, or what the mask
    counts. Spectrograms that a model takes at one length (Whisper's) have that last.
    """
    value = one[name]
    return value.dim() == 1 or (MASK in one and one[MASK].dim() == 1 and len(value) == len(one[MASK]))


def _most(extractor: Any, settings: DataSettings) -> int:
    """Samples that are taken of a recording: as many as are asked for, and no more than the extractor leaves."""
    rate = extractor.sampling_rate
    asked = max(1, round(settings.max_seconds * rate))
    if type(extractor).__name__ == "ASTFeatureExtractor":
        # Frames of 25 ms, one each 10 ms.
        return min(asked, round(rate * (0.010 * (extractor.max_length - 1) + 0.025)))
    # Whisper's and others that fill up to so many samples and cut there.
    return min(asked, getattr(extractor, "n_samples", asked))


def _least(base: Base) -> int:
    """Samples of which convolutions over samples make one position (wav2vec 2.0 and its kin)."""
    of_samples = "input_values" in base.takes
    kernels, strides = (getattr(base.config, f"conv_{name}", ()) if of_samples else () for name in ("kernel", "stride"))
    least = 1
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        least = (least - 1) * stride + kernel
    return least
