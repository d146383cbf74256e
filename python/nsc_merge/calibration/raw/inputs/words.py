"""Lists of words made tokens, of which each is known to be of one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nsc_merge.calibration.raw.columns import Sample
from nsc_merge.calibration.raw.drawing import TOKENS, Encoded
from nsc_merge.calibration.raw.inputs.checks import add_mask, check_tokens, check_unicode, longest, say_longer
from nsc_merge.calibration.raw.preprocessors import Base
from nsc_merge.calibration.raw.settings import DataSettings
from nsc_merge.utils.errors import logger

# Whose words transformers' run_ner.py has begin with a space.
_SPACED = ("roberta", "gpt2", "bloom", "deberta")


def encode_words(
    samples: Sequence[Sample], tokenizer: Any, base: Base, settings: DataSettings, argument: str
) -> tuple[list[Encoded], list[list[int | None]]]:
    """Token numbers and mask of every sample, without padding, and of each token the number of its word; None of
    special ones.

    Raises:
        ValueError: naming a sample that has too many tokens where none may be cut; or the tokenizer, if it does not say
            of which word a token is, or puts words together.
    """
    for sample in samples:
        check_unicode(" ".join(sample.words or ()), sample.where)
    front = _in_front(tokenizer, base, argument)
    texts = [[word if word[:1] == " " else front + word for word in sample.words or ()] for sample in samples]
    tokenizer.truncation_side = settings.truncation_side
    most = longest(base, settings)
    made = tokenizer(texts, is_split_into_words=True, truncation=settings.truncation, max_length=most)
    names = [name for name in made if name in base.takes]
    found = []
    for number, sample in enumerate(samples):
        one = {name: torch.tensor(made[name][number], dtype=torch.long, device="cpu") for name in names}
        add_mask(one, base)
        check_tokens(one[TOKENS], len(one[TOKENS]), most, sample.where, base)
        found.append(one)
    if settings.truncation:

        def whole(number: int) -> Sequence[int]:
            return tokenizer(texts[number], is_split_into_words=True, verbose=False)[TOKENS]

        say_longer(samples, found, whole, most, settings.truncation_side)
    return found, [made.word_ids(number) for number in range(len(samples))]


def _in_front(tokenizer: Any, base: Base, argument: str) -> str:
    """What every word is to begin with, so that it is made the tokens that it is within a text: nothing, or a space,
    which tokenizers of bytes (RoBERTa, GPT-2, ModernBERT) take for the beginning of a word, as their
    ``add_prefix_space=True`` does it.
    """
    name = type(tokenizer).__name__
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{argument}: {name} does not say of which word a token is; expected a tokenizer of the tokenizers library "
            "(tokenizer.json), which tokenizer: FOLDER names"
        )
    for front in ("", " "):
        words = tokenizer([f"{front}a", f"{front}a"], is_split_into_words=True, add_special_tokens=False)[TOKENS]
        if words == tokenizer(f"{front}a a", add_special_tokens=False)[TOKENS]:
            break
    else:
        raise ValueError(
            f"{argument}: {name} makes other tokens of a list of words than of a text of them; expected a column of "
            "texts, or inputs as .safetensors"
        )
    if front and base.config.model_type not in _SPACED:
        logger.warning(
            "%s: every word begins with a space, as in a text, where %s puts none (add_prefix_space=True); an adapter "
            "that was trained without needs its inputs as .safetensors", argument, name,
        )  # fmt: skip
    return front
