"""Named entities: spans of words that tags of a scheme such as IOB2 mark."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nsc_merge.calibration.raw.word_lists import marks_entities
from nsc_merge.evaluation.metrics.classification import Outputs, Predicted, classes_of, hits
from nsc_merge.evaluation.metrics.labels import IGNORE

_OUTSIDE = "O"


def entity_f1(outputs: Outputs, labels: Tensor, *, classes: Sequence[str]) -> float:
    """F-measure of entities, all samples together: twice those that are found, with their very words and type, over
    those that are there and those that are predicted; 0 where none is either. It is the ``overall_f1`` that seqeval
    (Nakayama 2018) gives by default, which reads tags as :func:`entities` does.

    Args:
        outputs: logits ``[N, T, C]``, or what :func:`predicted` keeps of them. Where some logit is NaN, no entity is
            predicted.
        labels: tags ``[N, T]``, integers; :data:`IGNORE` where there is none, as at all tokens of a word but one: what
            is left of a sample stands together.
        classes: what the C tags are called.

    Raises:
        TypeError, ValueError: for other dtypes, shapes or labels, if no label is known, or as :func:`check_tags`.
    """
    both, either = _counts(outputs, labels, classes).sum(0).tolist()
    return 2 * both / either if either else 0.0


def entity_f1_per_sample(outputs: Outputs, labels: Tensor, *, classes: Sequence[str]) -> Tensor:
    """:func:`entity_f1` of every sample, ``[N]``; NaN where no entity is, or is predicted."""
    both, either = _counts(outputs, labels, classes).unbind(1)
    return 2 * both / either


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Type, first and last place of every entity, as conlleval (Tjong Kim Sang and Buchholz 2000) and seqeval without
    ``mode="strict"`` read tags of IOB1, IOB2 and IOBES: an entity begins at ``B``, ``S``, behind ``O``, ``E`` and
    ``S``, and where the type changes, whatever tag should be there; it ends in front of all these, and of ``O``.
    """
    found: set[tuple[str, int, int]] = set()
    before, kind, start = _OUTSIDE, "_", 0
    for place, tag in enumerate([*tags, _OUTSIDE]):
        mark, own = tag[:1], tag[2:] or "_"
        begins = mark in "BS" or before in "OES" or own != kind
        if before != _OUTSIDE and (begins or mark == _OUTSIDE):
            found.add((kind, start, place - 1))
        if begins:
            start = place
        before, kind = mark, own
    return found


def check_tags(classes: Sequence[str]) -> None:
    """Refuse names that are no tags of entities.

    Raises:
        ValueError: naming one.
    """
    odd = next((name for name in classes if not marks_entities(name)), None)
    if odd is not None:
        raise ValueError(
            f"expected tags O, B-TYPE, I-TYPE, E-TYPE and S-TYPE as names of classes, found {odd!r:.60}; accuracy and "
            "f1 are of tags of any name (of BILOU, L- is E- and U- is S-, in classes and in the data)"
        )


def _counts(outputs: Outputs, labels: Tensor, classes: Sequence[str]) -> Tensor:
    """``[N, 2]``: the entities that are found, and those that are there plus those that are predicted."""
    check_tags(classes)
    hits(outputs, labels)
    size = outputs.size if isinstance(outputs, Predicted) else outputs.shape[-1]
    if labels.dim() != 2 or len(classes) != size:
        raise ValueError(
            f"classes: expected the names of {size} tags, of labels [N, T], found {len(classes)} and "
            f"{list(labels.shape)}"
        )
    # The last is of what is NaN.
    names = [*classes, _OUTSIDE]
    counts = []
    for said, true in zip(classes_of(outputs), labels, strict=True):
        known = true != IGNORE
        there, predicted = (entities([names[tag] for tag in tags[known].tolist()]) for tags in (true, said))
        counts.append([len(there & predicted), len(there) + len(predicted)])
    return torch.tensor(counts, dtype=torch.float64, device="cpu")
