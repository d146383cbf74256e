"""Tags of words made labels of their tokens, for measuring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nsc_merge.calibration.raw.columns import Sample
from nsc_merge.calibration.raw.drawing import Filling
from nsc_merge.calibration.raw.encoding import Made
from nsc_merge.calibration.raw.labels import LABELS, UNKNOWN, Labelling
from nsc_merge.calibration.raw.settings import DataSettings
from nsc_merge.calibration.raw.word_lists import as_list
from nsc_merge.utils.errors import logger


def add_tags(
    made: Made, samples: Sequence[Sample], labelling: Labelling, settings: DataSettings, argument: str
) -> None:
    """Put the tags of words beside the inputs of samples, and how they are padded beside how these are.

    Raises:
        ValueError: naming a sample that has no words, or not as many tags, or a word whose tag cannot be taken.
    """
    if not made.words:
        raise ValueError(
            f"{argument}: tags are of words, and {samples[0].where.removeprefix(f'{argument}: ')} holds a text; "
            "expected a column of lists of words, which text: COLUMN names"
        )
    lost = total = 0
    for one, words, sample in zip(made.encoded, made.words, samples, strict=True):
        where = sample.where
        tags = _tags(sample)
        numbers = [int(labelling.number_of(tag, f"{where}, word {place}")) for place, tag in enumerate(tags, 1)]
        one[LABELS] = at_first_tokens(words, numbers)
        lost += len(set(range(len(tags))) - set(words))
        total += len(tags)
    if made.padded is not None:
        made.padded[LABELS] = Filling(UNKNOWN, settings.padding_side)
    if lost:
        logger.warning(
            "%s: %d of %d tags count nowhere, as their words are cut (max_length), or of no character that the "
            "tokenizer knows", argument, lost, total,
        )  # fmt: skip


def at_first_tokens(words: Sequence[int | None], tags: Sequence[int]) -> Tensor:
    """The tag of every word at the first of its tokens, -100 at the others and at special ones: what transformers'
    run_ner.py trains by. Of a word whose beginning is cut, it is the first that is left.

    Args:
        words: of every token the number of its word; None of special ones.
        tags: of every word.
    """
    pairs = zip(words, [None, *words], strict=False)
    found = [UNKNOWN if word is None or word == before else tags[word] for word, before in pairs]
    return torch.tensor(found, dtype=torch.long, device="cpu")


def _tags(sample: Sample) -> list[Any]:
    """What a row says of the tags of its words, one for each."""
    tags, count = as_list(sample.label), len(sample.words or ())
    if tags is None or len(tags) != count:
        found = f"{sample.label!r:.60}" if tags is None else f"{len(tags)}"
        raise ValueError(f"{sample.where}: expected a list of tags, one for each of its {count} words, found {found}")
    return tags
