"""Audio, decoded by libsndfile when it is drawn: one channel, at the rate that a model was trained with."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsc_merge.calibration.raw.media.files import MediaReader
from nsc_merge.utils.errors import needed

# Of a folder of audio files, or a list.
COLUMN, SEVERAL = "audio", "audio files"
# Those that libsndfile decodes, and others that hold audio mostly, which it says it does not know, so that no recording
# is passed over.
SUFFIXES = frozenset(
    (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aiff", ".aif", ".aifc", ".au", ".caf", ".w64", ".sph")
    + (".m4a", ".aac", ".wma", ".amr", ".weba")
)
_ARRAY = {"array", "sampling_rate"}
# Read beyond what is taken, so that the filter of the change of rate sees no end where there is none.
_BEYOND = 0.25


@dataclass(frozen=True)
class Taken:
    """How much of a recording is taken.

    Attributes:
        rate: samples of a second, to which it is brought.
        most: samples at that rate.
        side: the end that is cut, where it is longer: ``"right"`` or ``"left"``.
    """

    rate: int
    most: int
    side: str


def is_audio(value: Any) -> bool:
    """Whether a value of a row is audio or says where it is."""
    if isinstance(value, str):
        return value.startswith("data:audio/") or Path(value).suffix.lower() in SUFFIXES
    if not isinstance(value, dict):
        return False
    # Images are stored alike, and by another name.
    named = value.get("path") is None or Path(str(value["path"])).suffix.lower() in SUFFIXES
    return ({"bytes", "path"} == set(value) and named) or set(value) >= _ARRAY


class AudioReader(MediaReader):
    """Decodes audio to one channel of float32 at one rate."""

    one, several = "audio", SEVERAL
    expected = "the path of an audio file, or {array, sampling_rate} with samples as numpy has them, [samples]"

    def open(self, value: Any, where: str, taken: Taken) -> tuple[Any, bool]:
        """The samples of a recording as a numpy array ``[samples]``, channels averaged, and whether it is longer than
        what is taken.

        Raises:
            ValueError: naming it, if it is missing, damaged, silent of any sample, or not here.
        """
        if isinstance(value, dict) and set(value) >= _ARRAY and value.get("array") is not None:
            name, wave, rate, longer = "the audio", *_of_array(value, where, taken)
        else:
            name, raw = self.bytes_of(value, where)
            wave, rate, longer = _decoded(raw, f"{where}: {name}", taken)
        if not len(wave):
            raise ValueError(f"{where}: {name} holds no sample; expected audio")
        if rate != taken.rate:
            wave = needed("soxr", where).resample(wave, rate, taken.rate)
        longer = longer or len(wave) > taken.most
        return (wave[-taken.most :] if taken.side == "left" else wave[: taken.most]), longer


def _decoded(raw: bytes, place: str, taken: Taken) -> tuple[Any, int, bool]:
    """Samples, their rate, and whether there are more, of a file; little more than what is taken is decoded."""
    soundfile = needed("soundfile", place)
    try:
        with soundfile.SoundFile(io.BytesIO(raw)) as file:
            first, last = _part(file.frames, file.samplerate, taken)
            if first:
                file.seek(first)
            wave = file.read(last - first, dtype="float32", always_2d=True)
            return wave.mean(1), file.samplerate, last - first < file.frames
    except (soundfile.SoundFileError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{place} cannot be decoded by libsndfile: {reason:.120}; expected .wav, .flac, .mp3 or .ogg, which "
            "ffmpeg -i FILE FILE.wav makes of others"
        ) from None


def _of_array(value: dict[str, Any], where: str, taken: Taken) -> tuple[Any, int, bool]:
    """Samples, their rate, and whether there are more, of what ``datasets`` and pipelines pass on."""
    import numpy as np

    rate = value["sampling_rate"]
    try:
        wave = np.asarray(value["array"])
    except (TypeError, ValueError):
        # Of tensors in bfloat16, and of lists of unequal lengths.
        raise ValueError(
            f"{where}: array: expected samples as numpy has them, found {type(value['array']).__name__}"
        ) from None
    if wave.ndim != 1 or not np.issubdtype(wave.dtype, np.floating) or not np.isfinite(wave).all():
        raise ValueError(
            f"{where}: array: expected finite samples in floating point, [samples], found {wave.dtype} "
            f"{list(wave.shape)}"
        )
    if not isinstance(rate, (int, float, np.integer)) or isinstance(rate, bool) or rate <= 0 or rate % 1:
        raise ValueError(f"{where}: sampling_rate: expected samples of a second, found {rate!r:.40}")
    first, last = _part(len(wave), int(rate), taken)
    return wave[first:last].astype(np.float32), int(rate), last - first < len(wave)


def _part(count: int, rate: int, taken: Taken) -> tuple[int, int]:
    """From where to where ``count`` samples are read for what is taken of them: little more than that, and from where
    there is a sample at both rates, so that the change of rate gives those of the whole.
    """
    most = math.ceil((taken.most / taken.rate + _BEYOND) * rate)
    if taken.side == "right":
        return 0, min(most, count)
    step = rate // math.gcd(rate, taken.rate)
    return max(0, count - most) // step * step, count
