"""Rows of several texts that are read each alone, as models embed or score them, and their labels in evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nsc_merge.calibration.raw.columns import Sample
from nsc_merge.calibration.raw.labels import Labelling


def apart(samples: Sequence[Sample]) -> list[Sample]:
    """Every text as a sample of its own, those of a row behind each other, without those that are blank."""
    return [
        replace(sample, text=text, texts=None) if isinstance(text, str) else replace(sample, messages=text, texts=None)
        for sample in samples
        for text in sample.texts or ()
        if text is not None
    ]


def labels_of_rows(samples: Sequence[Sample], labelling: Labelling) -> Tensor:
    """Labels of rows whose texts are compared: values ``[N]``, or what ``labelling.kind`` says of the texts.

    Raises:
        ValueError: naming a row with a blank text, or whose label cannot be taken.
    """
    texts = [_all_of(sample) for sample in samples]
    if labelling.kind == "value":
        values = [labelling.number_of(sample.label, sample.where) for sample in samples]
        return torch.tensor(values, dtype=torch.float32, device="cpu")
    if labelling.kind == "same":
        return _numbered([list(map(str, row)) for row in texts])
    if labelling.kind == "preferred":
        return torch.zeros(len(texts), dtype=torch.long, device="cpu")
    return torch.full((len(texts),), len(texts[0]) - 2, dtype=torch.long, device="cpu")


def _all_of(sample: Sample) -> list[Any]:
    texts = [text for text in sample.texts or () if text is not None]
    if len(texts) != len(sample.texts or ()):
        place = (sample.texts or []).index(None) + 1
        raise ValueError(f"{sample.where}: expected every one of texts, which are compared, found number {place} blank")
    return texts


def _numbered(rows: Sequence[Sequence[str]]) -> Tensor:
    """Which texts are the same, those that are asked for (the first of each row) and those that are to be found each
    counted by themselves, from 0 in the order in which they are first seen: ``[N, S]``.
    """
    asked: dict[str, int] = {}
    found: dict[str, int] = {}
    numbers = [
        [asked.setdefault(first, len(asked)), *(found.setdefault(one, len(found)) for one in others)]
        for first, *others in rows
    ]
    return torch.tensor(numbers, dtype=torch.long, device="cpu")
