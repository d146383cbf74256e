"""What inputs of all kinds share: what is refused, what is said of samples that are cut, processors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nsc_merge.calibration.raw.columns import Sample
from nsc_merge.calibration.raw.drawing import MASK, TOKENS, Encoded
from nsc_merge.calibration.raw.preprocessors import Base
from nsc_merge.calibration.raw.settings import DataSettings
from nsc_merge.processes.group import current
from nsc_merge.utils.errors import logger
from nsc_merge.utils.progress import Progress

ENDS = {"right": "end", "left": "beginning"}
# From so many on, images and recordings take long enough to be counted.
_MANY = 512


def counting(samples: Sequence[Sample]) -> Progress:
    """What counts samples while they are opened and encoded, where there are many."""
    label = samples[0].where.rpartition(", row")[0]
    return Progress(label, len(samples), None if len(samples) >= _MANY and current().is_main else False)


def processed(processor: Any, *given: Any, **named: Any) -> dict[str, Any]:
    """What a processor makes, which puts it on torch's default device."""
    encoded = processor(*given, **named, return_tensors="pt")
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in encoded.items()}


def check_unicode(text: str, where: str) -> None:
    """Refuse half of a surrogate pair, which strings of Python may hold and no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: holds {text[error.start]!r}, half of a character, which is no text; expected text that UTF-8 "
            "can write: text.encode('utf-8', 'replace').decode() has a question mark in its place"
        ) from None


def check_tokens(tokens: Tensor, counted: int, most: int, where: str, base: Base) -> None:
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


def add_mask(one: Encoded, base: Base) -> None:
    """What tells padding from text, where the tokenizer makes none (``model_input_names``) and the model takes one, and
    was trained with one.
    """
    if MASK in base.takes and MASK not in one and not base.whole:
        one[MASK] = torch.ones_like(one[TOKENS])


def longest(base: Base, settings: DataSettings) -> int:
    return base.whole or min(settings.max_length, base.positions or settings.max_length)


def say_cut(cut: Sequence[Sample], count: int, most: int, end: str) -> None:
    if cut:
        logger.warning(
            "%s: longer than %d tokens, as are %d of the %d samples; cut at the %s (max_length, truncation_side)",
            cut[0].where, most, len(cut), count, end,
        )  # fmt: skip


def say_longer(
    samples: Sequence[Sample], encoded: Sequence[Encoded], whole: Callable[[int], Sequence[int]], most: int, side: str
) -> None:
    """Say which of the samples that are as long as may be were longer.

    Args:
        whole: the tokens of a sample, by its number, without a bound.
        most: tokens of a sample.
        side: that is cut.
    """
    full = [number for number, one in enumerate(encoded) if len(one[TOKENS]) == most]
    cut = [samples[number] for number in full if len(whole(number)) > most]
    say_cut(cut, len(samples), most, ENDS[side])
