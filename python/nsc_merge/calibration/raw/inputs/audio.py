"""Audio made inputs by a model's feature extractor: samples, or frames of a spectrogram."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from nsc_merge.calibration.on_disk import Keep, in_memory
from nsc_merge.calibration.raw.columns import Sample
from nsc_merge.calibration.raw.drawing import MASK, Encoded, Filling
from nsc_merge.calibration.raw.inputs.checks import ENDS, counting, processed
from nsc_merge.calibration.raw.media.audio import AudioReader, Taken
from nsc_merge.calibration.raw.preprocessors import Base
from nsc_merge.calibration.raw.settings import DataSettings
from nsc_merge.utils.errors import logger


class Listening:
    """Opens recordings for a feature extractor: at its rate, no longer than is asked for and it leaves.

    Args:
        extractor: the feature extractor.
        settings: what is taken.
        reader: of audio.
        longest: seconds that a processor hands on to it in pieces (Audio Flamingo 3's ten minutes); None where it hands
            on all at once.
    """

    def __init__(
        self, extractor: Any, settings: DataSettings, reader: AudioReader, longest: float | None = None
    ) -> None:
        self.rate = extractor.sampling_rate
        # Where it takes it, so that it does not warn.
        known = inspect.signature(extractor.__call__).parameters
        self.named = {"sampling_rate": self.rate} if "sampling_rate" in known else {}
        self._taken = Taken(self.rate, _most(extractor, settings, longest), settings.truncation_side)
        self._settings, self._reader = settings, reader
        self._cut: list[str] = []

    @property
    def _seconds(self) -> str:
        return f"{self._taken.most / self.rate:g} s"

    def open(self, value: Any, where: str) -> Any:
        """Samples as a numpy array.

        Raises:
            ValueError: naming it, if it cannot be decoded, or is too long where none may be cut.
        """
        wave, longer = self._reader.open(value, where, self._taken)
        if longer and not self._settings.truncation:
            raise ValueError(
                f"{where}: expected at most {self._seconds} of audio, found more; give truncation: true, or a larger "
                "max_seconds where the model takes more"
            )
        if longer:
            self._cut.append(where)
        return wave

    def say_cut(self, count: int) -> None:
        """Say which of ``count`` samples were cut."""
        if self._cut:
            logger.warning(
                "%s: longer than %s, as are %d of the %d samples' audio; cut at the %s (max_seconds, truncation_side)",
                self._cut[0], self._seconds, len(set(self._cut)), count, ENDS[self._settings.truncation_side],
            )  # fmt: skip


def encode_audio(
    samples: Sequence[Sample],
    extractor: Any,
    base: Base,
    settings: DataSettings,
    reader: AudioReader,
    keep: Keep = in_memory,
) -> list[Encoded]:
    """What the feature extractor makes of the one recording of every sample, by itself.

    An input whose first dimension is time is as long as the recording and to be padded (:func:`audio_fillings`); every
    other has a first dimension of one recording.

    Raises:
        ValueError: naming a sample that cannot be decoded, or is too long where none may be cut, or too short.
    """
    listening = Listening(extractor, settings, reader)
    found = []
    with counting(samples) as progress:
        for sample in samples:
            if len(sample.audio) != 1:
                raise ValueError(f"{sample.where}: expected one recording, found {len(sample.audio)}")
            wave = listening.open(sample.audio[0], sample.where)
            found.append(keep(_features(wave, sample.where, extractor, base, listening.named)))
            progress.update()
    listening.say_cut(len(samples))
    return found


def audio_fillings(encoded: Sequence[Encoded], extractor: Any) -> dict[str, Filling]:
    """How the inputs of recordings are padded: as the extractor pads them, at the end."""
    filler = getattr(extractor, "padding_value", 0.0)
    one = encoded[0]
    return {name: Filling(0 if name == MASK else filler, "right") for name in one if _over_time(one, name)}


def _features(wave: Any, where: str, extractor: Any, base: Base, named: Mapping[str, Any]) -> Encoded:
    least = _least(base)
    if len(wave) < least:
        raise ValueError(f"{where}: expected at least {least} samples of audio, found {len(wave)}")
    try:
        made = processed(extractor, [wave], **named)
    except ValueError as error:
        raise ValueError(f"{where}: the feature extractor refuses it: {' '.join(str(error).split()):.200}") from None
    pieces = {name: len(value) for name, value in made.items() if name in base.takes}
    if (most := max(pieces.values(), default=1)) > 1:
        # As Cohere's does of what is longer than half a minute.
        raise ValueError(
            f"{where}: the feature extractor makes {most} pieces of {len(wave) / extractor.sampling_rate:g} s of "
            "audio, and one is taken; expected less: give a smaller max_seconds"
        )
    one = {name: made[name][0] for name in pieces}
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


def _most(extractor: Any, settings: DataSettings, longest: float | None) -> int:
    """Samples that are taken of a recording: as many as are asked for, and no more than the extractor leaves."""
    rate = extractor.sampling_rate
    asked = max(1, round(settings.max_seconds * rate))
    if longest is not None:
        # Of whole pieces, as many as it has room for.
        piece = getattr(extractor, "chunk_length", longest)
        return min(asked, int(longest // piece * piece * rate))
    if type(extractor).__name__ == "ASTFeatureExtractor":
        # Frames of 25 ms, one each 10 ms.
        return min(asked, round(rate * (0.010 * (extractor.max_length - 1) + 0.025)))
    known = inspect.signature(extractor.__call__).parameters
    cuts, most = (known[name].default if name in known else None for name in ("truncation", "max_length"))
    # Whisper's and others that fill up to so many samples and cut there; Gemma's, that cut at 30 s.
    return min(asked, getattr(extractor, "n_samples", most) or asked) if cuts is True else asked


def _least(base: Base) -> int:
    """Samples of which convolutions over samples make one position (wav2vec 2.0 and its kin)."""
    of_samples = "input_values" in base.takes
    kernels, strides = (getattr(base.config, f"conv_{name}", ()) if of_samples else () for name in ("kernel", "stride"))
    least = 1
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        least = (least - 1) * stride + kernel
    return least
