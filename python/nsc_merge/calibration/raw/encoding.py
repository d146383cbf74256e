"""Samples made inputs of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nsc_merge.calibration.raw.chats import in_parts, plain_text
from nsc_merge.calibration.raw.columns import Sample
from nsc_merge.calibration.raw.drawing import DECODED, DECODED_MASK, MASK, PIXELS, TOKENS, Encoded, Filling
from nsc_merge.calibration.raw.images import ImageReader
from nsc_merge.calibration.raw.preprocessors import Base
from nsc_merge.calibration.raw.settings import DataSettings
from nsc_merge.utils.errors import logger

# Images that are open at the same time.
_AT_ONCE = 32
_PROBE = "probe"
_ENDS = {"right": "end", "left": "beginning"}
# What stands for an image in texts that are made for no certain model.
_PLACE = "<image>"


def encode_text(samples: Sequence[Sample], tokenizer: Any, base: Base, settings: DataSettings) -> list[Encoded]:
    """Token numbers and mask of every sample, without padding but where a base sees it (SigLIP).

    Raises:
        ValueError: naming a sample that has no token, or too many where none may be cut.
    """
    texts = [_text(sample, tokenizer) for sample in samples]
    for sample, (text, _) in zip(samples, texts, strict=True):
        _check_unicode(text, sample.where)
    tokenizer.truncation_side = settings.truncation_side
    most = _longest(base, settings)
    found: list[Encoded] = [{}] * len(samples)
    for special in (True, False):
        numbers = [number for number, (_, wanted) in enumerate(texts) if wanted is special]
        if not numbers:
            continue
        encoded = tokenizer(
            [texts[number][0] for number in numbers],
            add_special_tokens=special,
            truncation=settings.truncation,
            max_length=most,
            padding="max_length" if base.whole else False,
        )
        names = [name for name in encoded if name in base.takes]
        for place, number in enumerate(numbers):
            found[number] = {name: torch.tensor(encoded[name][place], dtype=torch.long, device="cpu") for name in names}
    for sample, one in zip(samples, found, strict=True):
        _add_mask(one, base)
        _check_tokens(one[TOKENS], len(one[TOKENS]), most, sample.where, base)
        if base.image_token is not None and (one[TOKENS] == base.image_token).any():
            raise ValueError(f"{sample.where}: its text has a place for an image, and there is no column of images")
    if settings.truncation:
        # Of those that are as long as may be, how many were longer.
        full = [number for number, one in enumerate(found) if len(one[TOKENS]) == most]
        whole = (tokenizer(texts[n][0], add_special_tokens=texts[n][1], verbose=False)[TOKENS] for n in full)
        cut = [samples[number] for number, ids in zip(full, whole, strict=True) if len(ids) > most]
        _say_cut(cut, len(samples), most, _ENDS[settings.truncation_side])
    return found


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
            encoded = _made(processor, images)
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
    most = _longest(base, settings)
    cut: list[Sample] = []
    found = [_pair(sample, processor, base, settings, reader, most, cut) for sample in samples]
    _say_cut(cut, len(samples), most, _ENDS[settings.truncation_side])
    return found


def add_decoded(
    encoded: Sequence[Encoded], samples: Sequence[Sample], tokenizer: Any, base: Base, settings: DataSettings
) -> None:
    """Put what the decoder reads beside what the encoder does, as transformers makes it of labels: the sample's target
    without its last token, behind the token that begins every answer; that one alone where there is no target. A head
    that is no language model's reads the decoder at the tokens of the input, moved in the same way.

    Raises:
        ValueError: naming a sample whose target has too many tokens, or none.
    """
    # A target that is cut still begins as an answer does.
    tokenizer.truncation_side = "right"
    most = _longest(base, settings)
    cut: list[Sample] = []
    for one, sample in zip(encoded, samples, strict=True):
        read = one[TOKENS] if not base.writes else one[TOKENS][:0]
        if sample.target is not None:
            _check_unicode(sample.target, sample.where)
            read = torch.tensor(tokenizer(text_target=sample.target, verbose=False)[TOKENS], device="cpu")
            if settings.truncation and len(read) > most:
                cut.append(sample)
                read = torch.tensor(
                    tokenizer(text_target=sample.target, truncation=True, max_length=most)[TOKENS], device="cpu"
                )
            _check_tokens(read, len(read), most, f"{sample.where}: its target", base)
        start = torch.tensor([base.start], dtype=torch.long, device="cpu")
        one[DECODED] = torch.cat([start, read[:-1]])
        if DECODED_MASK in base.takes:
            one[DECODED_MASK] = torch.ones_like(one[DECODED])
    _say_cut(cut, len(samples), most, "end")


def _made(processor: Any, *given: Any, **named: Any) -> dict[str, Any]:
    """What a processor makes, which puts it on torch's default device."""
    encoded = processor(*given, **named, return_tensors="pt")
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in encoded.items()}


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
    _check_unicode(text, sample.where)
    images = [reader.open(one, sample.where) for one in references]
    bos = processor.tokenizer.bos_token
    given: dict[str, Any] = {"text": [text], "images": images or None}
    if bos and text.startswith(bos):
        given["add_special_tokens"] = False
    encoded = _made(processor, **given)
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
            encoded = _made(processor, **given, truncation=True, max_length=of_images + room)
        except ValueError:
            raise ValueError(
                f"{sample.where}: {room} tokens of text would cut an image off; expected a larger max_length, or "
                "images at the other end"
            ) from None
    shape = encoded[TOKENS].shape
    # Labels, which PaliGemma's processor makes, are of training.
    taken = {name: value for name, value in encoded.items() if name in base.takes and name != "labels"}
    one = {name: value[0] if value.shape == shape else value for name, value in taken.items()}
    _add_mask(one, base)
    _check_tokens(one[TOKENS], len(one[TOKENS]) - of_images, room, sample.where, base)
    return one


def _check_unicode(text: str, where: str) -> None:
    """Refuse half of a surrogate pair, which strings of Python may hold and no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: holds {text[error.start]!r}, half of a character, which is no text; expected text that UTF-8 "
            "can write: text.encode('utf-8', 'replace').decode() has a question mark in its place"
        ) from None


def _text(sample: Sample, template: Any) -> tuple[str, bool]:
    """The text of a sample, and whether special tokens are added to it: templates bring their own."""
    if sample.messages is None:
        text = str(sample.text)
        bos = getattr(template, "bos_token", None)
        return text, not (bos and text.startswith(bos))
    return _rendered(sample, template), False


def _rendered(sample: Sample, template: Any, messages: Any = None) -> str:
    if not getattr(template, "chat_template", None):
        raise ValueError(
            f"{sample.where}: holds a chat, and there is no chat template beside the base; name a tokenizer that has "
            'one, or write text: "{column}" for a column of text'
        )
    if messages is None:
        messages = plain_text(sample.messages or [], sample.where)
        # No text holds the byte 0, so that none becomes an image.
        messages = in_parts(messages, "\0") if _takes_parts(template) else messages
    # Where the model is to answer, it sees in use what its answer begins with.
    asks = messages[-1]["role"] in ("user", "tool")
    try:
        return template.apply_chat_template(messages, tools=sample.tools, tokenize=False, add_generation_prompt=asks)
    except Exception as error:
        # Templates are programs that raise what they like, such as on roles that do not alternate.
        raise ValueError(
            f"{sample.where}: the chat template refuses it: {' '.join(str(error).split()):.200}"
        ) from None


def _takes_parts(template: Any) -> bool:
    """Whether a chat template reads contents that are lists of parts, rather than texts."""
    try:
        shown = template.apply_chat_template(
            [{"role": "user", "content": [{"type": "text", "text": _PROBE}]}], tokenize=False
        )
    except Exception:
        return False
    # As Python writes a list, where it does not.
    return _PROBE in shown and "'type'" not in shown


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
        text = _rendered(sample, processor, messages)
    if text.count(token) != len(references) or any(one is None for one in references):
        raise ValueError(
            f"{sample.where}: expected as many images as places for them, found {len(references)} images and "
            f"{text.count(token)} times {token!r}"
        )
    return text, references


def _say_cut(cut: Sequence[Sample], count: int, most: int, end: str) -> None:
    if cut:
        logger.warning(
            "%s: longer than %d tokens, as are %d of the %d samples; cut at the %s (max_length, truncation_side)",
            cut[0].where, most, len(cut), count, end,
        )  # fmt: skip


def _longest(base: Base, settings: DataSettings) -> int:
    return base.whole or min(settings.max_length, base.positions or settings.max_length)


def _add_mask(one: Encoded, base: Base) -> None:
    """What tells padding from text, where the tokenizer makes none (``model_input_names``) and the model takes one, and
    was trained with one.
    """
    if MASK in base.takes and MASK not in one and not base.whole:
        one[MASK] = torch.ones_like(one[TOKENS])


def _check_tokens(tokens: Tensor, counted: int, most: int, where: str, base: Base) -> None:
    if not len(tokens):
        raise ValueError(f"{where}: holds no token; expected text")
    if counted > most:
        cure = "truncation: true" if base.positions == most else "a larger max_length, or truncation: true"
        raise ValueError(f"{where}: expected at most {most} tokens, found {counted}; give {cure}")
    highest = int(tokens.max())
    if base.vocabulary is not None and highest >= base.vocabulary:
        raise ValueError(
            f"{where}: the tokenizer gives token {highest}, the base has {base.vocabulary}; expected the tokenizer of "
            "this base"
        )


def paddings(one: Encoded, tokenizer: Any, base: Base, settings: DataSettings) -> dict[str, Filling]:
    """How the inputs of samples with texts are padded, as those of ``one`` are called."""
    # Where the mask is 0 any token will do; none is ever added to a tokenizer for it.
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    filler = next(number for number in known if number is not None)
    padded = {}
    for name, value in one.items():
        if name != PIXELS and value.dim() == 1:
            # An answer begins where the decoder does.
            side = "right" if base.writes and name in (DECODED, DECODED_MASK) else settings.padding_side
            padded[name] = Filling(filler if name in (TOKENS, DECODED) else 0, side)
    return padded
