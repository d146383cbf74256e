"""Labels of raw samples put beside their inputs, each kind in its own way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nsc_merge.calibration.raw.columns import Sample
from nsc_merge.calibration.raw.encoding import Made
from nsc_merge.calibration.raw.labels import LABELS, UNKNOWN, Labelling, add_labels
from nsc_merge.calibration.raw.preprocessors import Base, tokenizer_of
from nsc_merge.calibration.raw.settings import DataSettings
from nsc_merge.calibration.raw.tags import add_tags
from nsc_merge.calibration.raw.word_lists import as_list


def put_labels(
    made: Made, samples: Sequence[Sample], labelling: Labelling, base: Base, settings: DataSettings, argument: str
) -> None:
    """Put the labels of samples beside what was made of them, and how they are padded beside how that is.

    Raises:
        ValueError: naming a sample whose label cannot be taken.
    """
    if labelling.kind == "tags":
        add_tags(made, samples, labelling, settings, argument)
    elif labelling.kind == "classes":
        for one, sample in zip(made.encoded, samples, strict=True):
            found = classes_of(sample.label, labelling, sample.where)
            one[LABELS] = found if made.padded is None else found[None]
    else:
        answers = made.tokenizer is None and labelling.kind == "answer"
        tokenizer = tokenizer_of(base, settings, argument) if answers else made.tokenizer
        add_labels(made.encoded, made.padded, samples, labelling, tokenizer, base, settings)


def classes_of(label: Any, labelling: Labelling, where: str) -> Tensor:
    """Which classes are true, ``[C]`` of 0 and 1: of a list of them by name or number, or of one 0 or 1 for each; NaN
    where the label is null.

    Raises:
        ValueError: naming the sample, what was found and what was expected.
    """
    count = labelling.count if labelling.count is not None else len(labelling.classes)
    if not count:
        raise ValueError(f"{where}: how many classes there are is not known; classes: [FIRST, SECOND, ...] says it")
    if label is None or label != label:
        return torch.full((count,), math.nan, device="cpu")
    listed = as_list(label)
    held = [label] if listed is None else listed
    # Classes that are named 0 and 1 are names.
    flags = len(held) == count and all(isinstance(one, int | float) and one in (0, 1) for one in held)
    flags = flags and listed is not None
    if flags and count == 2 and sorted(held) == [0, 1] and all(type(one) is int for one in held):
        raise ValueError(
            f"{where}: {label!r:.60} may be both classes by number, or whether each is true; expected their names, or "
            "true and false"
        )
    if flags:
        return torch.tensor([float(one) for one in held], device="cpu")
    found = torch.zeros(count, device="cpu")
    for one in held:
        number = int(labelling.number_of(one, where))
        if number == UNKNOWN:
            raise ValueError(f"{where}: expected classes, or null for all of them, found {label!r:.60}")
        found[number] = 1.0
    return found
