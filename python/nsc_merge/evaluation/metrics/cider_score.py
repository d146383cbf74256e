"""Consensus of generated captions with reference captions: CIDEr, from its definition (Vedantam et al. 2015).

Captions are sequences of words or of token numbers. A text is split at everything that is no letter, digit or
apostrophe, in lower case and without stemming, so that figures differ from those of programs that stem.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Hashable, Sequence

Caption = str | Sequence[Hashable]

_WORD = re.compile(r"[\w']+")
_LONGEST = 4


def words(caption: Caption) -> list[Hashable]:
    """The words of a text in lower case; other sequences as they are."""
    return [*_WORD.findall(caption.lower())] if isinstance(caption, str) else list(caption)


def cider(candidates: Sequence[Caption], references: Sequence[Sequence[Caption]]) -> float:
    """Mean of :func:`cider_per_sample`, from 0 to 1; CIDEr-D and the usual tables multiply by 10 or 100."""
    return statistics.fmean(cider_per_sample(candidates, references))


def cider_per_sample(candidates: Sequence[Caption], references: Sequence[Sequence[Caption]]) -> list[float]:
    """CIDEr of every sample: the mean, over n-grams of length 1 to 4 and over references, of the cosine between their
    TF-IDF vectors (Eq. 1-3 of Vedantam et al. 2015, arXiv 1411.5726).

    An n-gram counts as common to as many samples as have it in some reference, so the figure depends on the whole
    set. Lengths that neither caption reaches count as a cosine of 0.

    Args:
        candidates: one caption per sample.
        references: one or more captions for each sample.

    Raises:
        ValueError: as :func:`check`.
    """
    check(candidates, references)
    split = [[words(caption) for caption in captions] for captions in references]
    scores = [0.0] * len(candidates)
    for length in range(1, _LONGEST + 1):
        grams = [[_grams(caption, length) for caption in captions] for captions in split]
        occurrences = Counter(gram for captions in grams for gram in set().union(*captions))
        for number, known in enumerate(grams):
            ours = _weighted(_grams(words(candidates[number]), length), occurrences, len(candidates))
            cosines = [_cosine(ours, _weighted(other, occurrences, len(candidates))) for other in known]
            scores[number] += statistics.fmean(cosines) / _LONGEST
    return scores


def check(candidates: Sequence[Caption], references: Sequence[Sequence[Caption]]) -> None:
    """Refuse captions that have no CIDEr.

    Raises:
        ValueError: if the numbers of samples differ, if a sample has no reference, or if there are fewer than two
            samples, where every weight is log(1) = 0.
    """
    if len(candidates) != len(references):
        raise ValueError(
            f"references: expected {len(candidates)}, one list per candidate, found {len(references)}"
        )
    if len(candidates) < 2:
        raise ValueError(f"candidates: expected at least two samples, found {len(candidates)}")
    for number, captions in enumerate(references):
        if isinstance(captions, str) or not captions:
            raise ValueError(
                f"references[{number}]: expected at least one caption in a list, found {captions!r:.60}"
            )


def _grams(caption: Sequence[Hashable], length: int) -> Counter[tuple[Hashable, ...]]:
    return Counter(tuple(caption[start : start + length]) for start in range(len(caption) - length + 1))


def _weighted(
    grams: Counter[tuple[Hashable, ...]], occurrences: Counter[tuple[Hashable, ...]], samples: int
) -> dict[tuple[Hashable, ...], float]:
    total = sum(grams.values())
    return {
        gram: count / total * math.log(samples / max(1, occurrences[gram])) for gram, count in grams.items()
    }


def _cosine(ours: dict[tuple[Hashable, ...], float], theirs: dict[tuple[Hashable, ...], float]) -> float:
    norms = [math.sqrt(sum(weight * weight for weight in side.values())) for side in (ours, theirs)]
    if not all(norms):
        return 0.0
    return sum(weight * theirs.get(gram, 0.0) for gram, weight in ours.items()) / (norms[0] * norms[1])
