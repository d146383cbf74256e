"""F-measure of entities: the figures of seqeval 1.2.2, written down, and what holds of any tags."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsc_merge.evaluation.metrics import (
    IGNORE,
    METRICS,
    check_tags,
    entities,
    entity_f1,
    entity_f1_per_sample,
    predicted,
)

TAGS = ["O", "B-PER", "I-PER", "E-PER", "S-PER", "B-LOC", "I-LOC", "E-LOC", "S-LOC", "B-MISC", "I-MISC"]


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("", []),
        ("O O", []),
        ("B-PER I-PER O B-LOC", [("LOC", 3, 3), ("PER", 0, 1)]),
        ("I-PER I-PER O I-LOC", [("LOC", 3, 3), ("PER", 0, 1)]),
        ("B-PER B-PER", [("PER", 0, 0), ("PER", 1, 1)]),
        ("I-PER I-LOC I-LOC", [("LOC", 1, 2), ("PER", 0, 0)]),
        ("B-PER I-LOC", [("LOC", 1, 1), ("PER", 0, 0)]),
        ("O E-PER E-PER", [("PER", 1, 1), ("PER", 2, 2)]),
        ("S-PER I-PER E-PER S-PER", [("PER", 0, 0), ("PER", 1, 2), ("PER", 3, 3)]),
        ("B-PER E-PER I-PER", [("PER", 0, 1), ("PER", 2, 2)]),
        ("B-PER I-PER E-PER I-PER O", [("PER", 0, 2), ("PER", 3, 3)]),
        ("E-LOC S-LOC B-LOC O", [("LOC", 0, 0), ("LOC", 1, 1), ("LOC", 2, 2)]),
        ("B I O I", [("_", 0, 1), ("_", 3, 3)]),
        ("B-A-x I-A-x I-A", [("A", 2, 2), ("A-x", 0, 1)]),
        ("S-X E-X", [("X", 0, 0), ("X", 1, 1)]),
        ("B-X S-X O B-X", [("X", 0, 0), ("X", 1, 1), ("X", 3, 3)]),
        ("I-X B-X I-X E-Y I-Y", [("X", 0, 0), ("X", 1, 2), ("Y", 3, 3), ("Y", 4, 4)]),
    ],
)
def test_entities_are_those_of_seqeval(tags, found):
    assert entities(tags.split()) == set(found)


def tensors(true: list[str], said: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels, with a token that is no word's first behind every word."""
    length = max(len(tags.split()) for tags in true)
    labels = torch.full((len(true), 2 * length), IGNORE)
    logits = torch.randn(len(true), 2 * length, len(TAGS), generator=torch.Generator().manual_seed(0))
    for row, pair in enumerate(zip(true, said, strict=True)):
        for word, (tag, other) in enumerate(zip(*map(str.split, pair), strict=True)):
            labels[row, 2 * word] = TAGS.index(tag)
            logits[row, 2 * word, TAGS.index(other)] = 9.0
    return logits, labels


@pytest.mark.parametrize(
    ("true", "said", "figure"),
    [
        (["B-PER I-PER O B-LOC", "O O O I-MISC I-MISC"], ["B-PER I-PER O B-PER", "O O B-MISC I-MISC I-MISC"], 1 / 3),
        (["O O O B-MISC I-MISC", "B-PER I-PER O"], ["O O B-MISC I-MISC I-MISC", "B-PER I-PER O"], 1 / 2),
        (["B-PER I-PER", "B-LOC"], ["I-PER I-PER", "I-LOC"], 1),
        (["O O", "O"], ["O O", "O"], 0),
        (["O B-PER"], ["O O"], 0),
        (["O O"], ["B-PER O"], 0),
        (["S-PER O B-LOC E-LOC"], ["B-PER O B-LOC I-LOC"], 1),
        (["B-PER B-PER I-PER", "I-LOC O"], ["B-PER I-PER I-PER", "B-LOC O"], 2 / 5),
    ],
)
def test_figures_are_those_of_seqeval(true, said, figure):
    logits, labels = tensors(true, said)
    metric = METRICS["entity_f1"]
    for outputs in (logits, predicted(logits, labels)):
        assert metric.measure(outputs, labels, classes=TAGS) == pytest.approx(figure, abs=1e-12)
    each = metric.quality(logits, labels, classes=TAGS)
    for own, pair in zip(each.tolist(), zip(true, said, strict=True), strict=True):
        alone = entity_f1(*tensors(*([tags] for tags in pair)), classes=TAGS)
        some = any(tag != "O" for tags in pair for tag in tags.split())
        assert own == pytest.approx(alone) if some else own != own
    assert (metric.lower_is_better, metric.named) == (False, True)
    assert float(metric.loss(logits, labels)) == METRICS["accuracy"].loss(logits, labels)


@given(st.lists(st.sampled_from(TAGS), max_size=12))
def test_entities_are_apart_and_hold_every_word_that_is_one(tags):
    found = sorted((first, last, kind) for kind, first, last in entities(tags))
    assert all(last < first for (_, last, _), (first, _, _) in pairwise(found))
    held = {place: kind for first, last, kind in found for place in range(first, last + 1)}
    assert held == {place: tag[2:] for place, tag in enumerate(tags) if tag != "O"}


@given(st.lists(st.lists(st.sampled_from(TAGS), min_size=1, max_size=8), min_size=1, max_size=4))
def test_what_is_right_has_all_and_nothing_is_found_in_what_is_nan(rows):
    texts = [" ".join(tags) for tags in rows]
    logits, labels = tensors(texts, texts)
    some = any(tag != "O" for tags in rows for tag in tags)
    assert entity_f1(logits, labels, classes=TAGS) == float(some)
    logits[..., 0] = torch.nan
    assert entity_f1(predicted(logits, labels), labels, classes=TAGS) == 0


def test_samples_are_counted_together():
    logits, labels = tensors(["B-PER I-PER O", "B-LOC O B-LOC"], ["B-PER I-PER O", "O O O"])
    assert entity_f1(logits, labels, classes=TAGS) == pytest.approx(2 * 1 / (3 + 1))
    assert entity_f1_per_sample(logits, labels, classes=TAGS).tolist() == [1, 0]


@pytest.mark.parametrize("name", ["U-PER", "L-PER", "NOUN", "PER-B", "o", "", "B_PER", "LABEL_0"])
def test_names_that_mark_no_entities_are_refused(name):
    with pytest.raises(ValueError, match=f"^expected tags O, B-TYPE, .* as names of classes, found '{name}'; accuracy"):
        check_tags(["O", "B-PER", name])
    check_tags(["O", "B", "I-", "E-a-b", "S- x\n"])


@pytest.mark.parametrize(
    ("shape", "classes", "message"),
    [
        ((2, 3, 11), TAGS[:5], r"classes: expected the names of 11 tags, of labels \[N, T\], found 5 and \[2, 3\]"),
        ((2, 11), TAGS, r"classes: expected the names of 11 tags, of labels \[N, T\], found 11 and \[2\]"),
        ((2, 3, 11), ["X", *TAGS[1:]], "found 'X'"),
    ],
)
def test_other_shapes_are_refused(shape, classes, message):
    with pytest.raises(ValueError, match=message):
        entity_f1(torch.zeros(shape), torch.zeros(shape[:-1], dtype=torch.long), classes=classes)
    with pytest.raises(ValueError, match="expected at least one known label"):
        entity_f1(torch.zeros(1, 3, 11), torch.full((1, 3), IGNORE), classes=TAGS)
