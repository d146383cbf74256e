"""Text with images and recordings in its midst, made inputs by a model's processor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nsc_merge.calibration.on_disk import Keep, in_memory
from nsc_merge.calibration.raw.chats import MEDIA, in_parts
from nsc_merge.calibration.raw.columns import Sample
from nsc_merge.calibration.raw.drawing import TOKENS, Encoded
from nsc_merge.calibration.raw.inputs.audio import Listening
from nsc_merge.calibration.raw.inputs.checks import (
    ENDS,
    add_mask,
    check_tokens,
    check_unicode,
    counting,
    longest,
    processed,
    say_cut,
)
from nsc_merge.calibration.raw.inputs.text import rendered
from nsc_merge.calibration.raw.media.images import ImageReader
from nsc_merge.calibration.raw.preprocessors import Base
from nsc_merge.calibration.raw.settings import DataSettings

# What stands for one in texts that are made for no certain model.
_PLACES = {"image": "<image>", "audio": "<audio>"}
_SEVERAL = {"image": "images", "audio": "recordings"}
# In names of inputs of audio, of which there may be as many frames as there are tokens.
_OF_AUDIO = ("feature", "audio", "input_values", "padding_mask")


@dataclass(frozen=True)
class Media:
    """What opens images and recordings.

    Attributes:
        images: reader of images.
        audio: of recordings; None where the processor takes none.
    """

    images: ImageReader
    audio: Listening | None


def encode_pairs(
    samples: Sequence[Sample],
    processor: Any,
    base: Base,
    settings: DataSettings,
    media: Media,
    keep: Keep = in_memory,
) -> list[Encoded]:
    """What the processor makes of text, images and recordings of every sample, without padding.

    Raises:
        ValueError: naming a sample with more or fewer places for images than images, or for recordings than these, or
            with too many tokens.
    """
    processor.tokenizer.truncation_side = settings.truncation_side
    most = longest(base, settings)
    cut: list[Sample] = []
    found = []
    with counting(samples) as progress:
        for sample in samples:
            found.append(keep(_pair(sample, processor, base, settings, media, most, cut)))
            progress.update()
    say_cut(cut, len(samples), most, ENDS[settings.truncation_side])
    if media.audio is not None:
        media.audio.say_cut(len(samples))
    return found


def _pair(
    sample: Sample, processor: Any, base: Base, settings: DataSettings, media: Media, most: int, cut: list[Sample]
) -> Encoded:
    """What the processor makes of one sample, which is added to ``cut`` where that is not all of its text."""
    if sample.pair is not None:
        raise ValueError(
            f"{sample.where}: text_pair: {type(processor).__name__} takes one text beside images or audio; expected a "
            'template of both, such as text: "{question}\\n{hint}"'
        )
    text, references = _text_with_places(sample, processor, base)
    check_unicode(text, sample.where)
    bos = processor.tokenizer.bos_token
    options: dict[str, Any] = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
    given: dict[str, Any] = {"text": [text]}
    if "image" in references:
        given["images"] = [media.images.open(one, sample.where) for one in references["image"]] or None
    if heard := references.get("audio"):
        if media.audio is None:
            raise ValueError(f"{sample.where}: holds audio, and the processor says no rate for it; write its inputs")
        given["audio"] = [media.audio.open(one, sample.where) for one in heard]
        given["audio_kwargs"] = media.audio.named

    def made(**more: Any) -> dict[str, Any]:
        # By themselves where there is audio: how much of that is taken has settings of the same names.
        named = {**options, **more}
        return processed(processor, **given, **({"text_kwargs": named} if "audio" in given else named))

    encoded = made()
    # What stands in the text, and what it becomes, which is another in Gemma 3.
    known = (getattr(processor, f"{kind}_token_id", None) for kind in MEDIA)
    of_media = [one for one in (*known, base.image_token, base.audio_token) if one is not None]
    count = int(torch.isin(encoded[TOKENS], torch.tensor(of_media, device="cpu")).sum())
    # The model's positions are for both; what is asked for is of text.
    room = min(most, (base.positions or most + count) - count)
    if room < 1:
        several = " and ".join(_SEVERAL[kind] for kind, held in references.items() if held)
        raise ValueError(f"{sample.where}: its {several} are {count} tokens, the model has {base.positions} positions")
    if settings.truncation and encoded[TOKENS].shape[1] > count + room:
        cut.append(sample)
        try:
            encoded = made(truncation=True, max_length=count + room)
        except ValueError:
            kind = next(kind for kind, held in references.items() if held)
            raise ValueError(
                f"{sample.where}: {room} tokens of text would cut {'an image' if kind == 'image' else 'audio'} off; "
                f"expected a larger max_length, or {_SEVERAL[kind]} at the other end"
            ) from None
    shape = encoded[TOKENS].shape
    # Labels, which PaliGemma's processor makes, are of training.
    taken = {name: value for name, value in encoded.items() if name in base.takes and name != "labels"}
    of_text = {name for name, value in taken.items() if value.shape == shape and not any(a in name for a in _OF_AUDIO)}
    one = {name: value[0] if name in of_text else value for name, value in taken.items()}
    add_mask(one, base)
    check_tokens(one[TOKENS], len(one[TOKENS]) - count, room, sample.where, base)
    return one


def _text_with_places(sample: Sample, processor: Any, base: Base) -> tuple[str, dict[str, list[Any]]]:
    """Text with a token in the place of every image and recording, and these in their order, by kind."""
    tokens = {kind: token for kind in MEDIA if (token := getattr(processor, f"{kind}_token", None)) is not None}
    rows = {"image": sample.images, "audio": sample.audio}
    parts = [part for turn in sample.messages or () if isinstance(turn["content"], list) for part in turn["content"]]
    for kind in MEDIA:
        if kind not in tokens and (rows[kind] or any(part["type"] == kind for part in parts)):
            raise ValueError(f"{sample.where}: holds {_SEVERAL[kind]}, and {type(processor).__name__} takes none")
    held = {kind: list(rows[kind]) for kind in tokens}
    if base.in_front:
        if sample.text is None or len(sample.images) != 1:
            raise ValueError(f"{sample.where}: expected a text and one image, found {len(sample.images)} images")
        return sample.text, held

    def placed(said: str) -> str:
        # As data for LLaVA say it, whatever the model calls the place of an image.
        for kind, token in tokens.items():
            said = said.replace(_PLACES[kind], token) if held[kind] else said
        return said

    text = placed(str(sample.text))
    # Who writes the model's own token writes all that stands around it.
    own = all(token in str(sample.text) for kind, token in tokens.items() if held[kind])
    if sample.messages is None and (own or not getattr(processor, "chat_template", None)):
        wanting = [kind for kind, token in tokens.items() if held[kind] and token not in text]
        # A line of its own, as LLaVA was trained; PaliGemma was without.
        line = "\n" if wanting and base.config.model_type != "paligemma" else ""
        text = "".join(tokens[kind] * len(held[kind]) for kind in wanting) + line + text
    else:
        turns = sample.messages or [{"role": "user", "content": text}]
        said = (placed(one["content"]) if isinstance(one["content"], str) else one["content"] for one in turns)
        messages = in_parts([{**one, "content": what} for one, what in zip(turns, said, strict=True)], tokens)
        held = {kind: _in_messages(messages, kind, held[kind]) for kind in tokens}
        text = rendered(sample, processor, messages)
    for kind, token in tokens.items():
        if text.count(token) != len(held[kind]) or any(one is None for one in held[kind]):
            several = _SEVERAL[kind]
            raise ValueError(
                f"{sample.where}: expected as many {several} as places for them, found {len(held[kind])} {several} and "
                f"{text.count(token)} times {token!r}"
            )
    return text, held


def _in_messages(messages: Sequence[dict[str, Any]], kind: str, held: list[Any]) -> list[Any]:
    """The images or recordings of a chat in their order, those in parts among the row's; where it has no part for any,
    they are put in front of what its first user says.
    """
    parts = [part for message in messages for part in message["content"] if part["type"] == kind]
    if not parts and held:
        first = next((one for one in messages if one["role"] == "user"), messages[0])
        first["content"] = [*({"type": kind} for _ in held), *first["content"]]
    elif any(kind in part for part in parts):
        left = iter(held)
        return [part[kind] if kind in part else next(left, None) for part in parts]
    return held
