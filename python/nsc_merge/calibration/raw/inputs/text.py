"""Text and chats made tokens, for models that read them and for decoders behind an encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nsc_merge.calibration.raw.chats import in_parts, plain_text
from nsc_merge.calibration.raw.columns import Sample
from nsc_merge.calibration.raw.drawing import DECODED, DECODED_MASK, TOKENS, Encoded
from nsc_merge.calibration.raw.inputs.checks import (
    add_mask,
    check_tokens,
    check_unicode,
    longest,
    say_cut,
    say_longer,
)
from nsc_merge.calibration.raw.preprocessors import Base
from nsc_merge.calibration.raw.settings import DataSettings

_PROBE = "probe"


def encode_text(samples: Sequence[Sample], tokenizer: Any, base: Base, settings: DataSettings) -> list[Encoded]:
    """Token numbers and mask of every sample, without padding but where a base sees it (SigLIP).

    Raises:
        ValueError: naming a sample that has no token, or too many where none may be cut.
    """
    texts = [_text(sample, tokenizer) for sample in samples]
    for sample, (text, _) in zip(samples, texts, strict=True):
        check_unicode(text, sample.where)
        check_unicode(sample.pair or "", sample.where)
    tokenizer.truncation_side = settings.truncation_side
    most = longest(base, settings)
    found: list[Encoded] = [{}] * len(samples)
    for special in (True, False):
        numbers = [number for number, (_, wanted) in enumerate(texts) if wanted is special]
        if not numbers:
            continue
        pairs = [samples[number].pair for number in numbers]
        encoded = tokenizer(
            [texts[number][0] for number in numbers],
            None if None in pairs else pairs,
            add_special_tokens=special,
            truncation=settings.truncation,
            max_length=most,
            padding="max_length" if base.whole else False,
        )
        names = [name for name in encoded if name in base.takes]
        for place, number in enumerate(numbers):
            found[number] = {name: torch.tensor(encoded[name][place], dtype=torch.long, device="cpu") for name in names}
    for sample, one in zip(samples, found, strict=True):
        add_mask(one, base)
        check_tokens(one[TOKENS], len(one[TOKENS]), most, sample.where, base)
        if base.image_token is not None and (one[TOKENS] == base.image_token).any():
            raise ValueError(f"{sample.where}: its text has a place for an image, and there is no column of images")
    if settings.truncation:

        def whole(number: int) -> Sequence[int]:
            text, special = texts[number]
            return tokenizer(text, samples[number].pair, add_special_tokens=special, verbose=False)[TOKENS]

        say_longer(samples, found, whole, most, settings.truncation_side)
    return found


def add_decoded(
    encoded: Sequence[Encoded], samples: Sequence[Sample], tokenizer: Any, base: Base, settings: DataSettings
) -> None:
    """Put what the decoder reads beside what the encoder does, as transformers makes it of labels: the sample's target
    without its last token, behind the token that begins every answer; that one alone where there is no target, and what
    the tokenizer has every answer begin with (Whisper's language and task). A head that is no language model's reads
    the decoder at the tokens of the input, moved in the same way.

    Raises:
        ValueError: naming a sample whose target has too many tokens, or none.
    """
    # A target that is cut still begins as an answer does.
    tokenizer.truncation_side = "right"
    most = longest(base, settings)
    cut: list[Sample] = []
    first = first_tokens(tokenizer, base)
    # The last of what is read is what comes next.
    opening = torch.tensor([*first[1:], 0] if first else [], dtype=torch.long, device="cpu")
    for one, sample in zip(encoded, samples, strict=True):
        read = opening if base.writes else one[TOKENS]
        if sample.target is not None:
            check_unicode(sample.target, sample.where)
            read = torch.tensor(tokenizer(text_target=sample.target, verbose=False)[TOKENS], device="cpu")
            if settings.truncation and len(read) > most:
                cut.append(sample)
                read = torch.tensor(
                    tokenizer(text_target=sample.target, truncation=True, max_length=most)[TOKENS], device="cpu"
                )
            check_tokens(read, len(read), most, f"{sample.where}: its target", base)
            # The first comes in front of all.
            read = read[1:] if first else read
        start = torch.tensor([base.start], dtype=torch.long, device="cpu")
        one[DECODED] = torch.cat([start, read[:-1]])
        if DECODED_MASK in base.takes:
            one[DECODED_MASK] = torch.ones_like(one[DECODED])
    say_cut(cut, len(samples), most, "end")


def first_tokens(tokenizer: Any, base: Base) -> list[int]:
    """What a tokenizer puts in front of every answer where the decoder begins with its first (Whisper's start, language
    and task); none of others.
    """
    prefix: list[int] = getattr(tokenizer, "prefix_tokens", [])
    return prefix if prefix[:1] == [base.start] else []


def _text(sample: Sample, template: Any) -> tuple[str, bool]:
    """The text of a sample, and whether special tokens are added to it: templates bring their own."""
    if sample.messages is None:
        text = str(sample.text)
        bos = getattr(template, "bos_token", None)
        return text, not (bos and text.startswith(bos))
    return rendered(sample, template), False


def rendered(sample: Sample, template: Any, messages: Any = None) -> str:
    if not getattr(template, "chat_template", None):
        raise ValueError(
            f"{sample.where}: holds a chat, and there is no chat template beside the base; name a tokenizer that has "
            'one, or write text: "{column}" for a column of text'
        )
    if messages is None:
        messages = plain_text(sample.messages or [], sample.where)
        messages = in_parts(messages, {}) if _takes_parts(template) else messages
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
