"""The tasks of the language suite: their labelled texts and pairs of passages, cut from :mod:`.corpus`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..suite import TaskInfo
from .corpus import BREAK, PAD, SECTIONS, SOURCES, START, Texts
from .language import Examples, masks

PASSAGE = 38
_SHORTEST = 20

TASKS = {
    task.name: task
    for task in (
        TaskInfo("source", "acc", False, "classification"),
        TaskInfo("section", "acc", False, "classification"),
        TaskInfo("varied", "MAE", True, "regression"),
        TaskInfo("relation", "acc", False, "classification"),
        TaskInfo("same", "acc", False, "classification"),
        TaskInfo("shared", "MAE", True, "regression"),
    )
}
CLASSES = {"source": len(SOURCES), "section": len(SECTIONS), "relation": 3, "same": 2}


def make_examples(task: str, files: Texts, parts: Texts, count: int, seed: int) -> Examples:
    """``count`` labelled examples; equal arguments give equal tensors."""
    generator = torch.Generator().manual_seed(100 * seed + list(TASKS).index(task))
    singles = {"source": files, "section": parts, "varied": files}
    if task in singles:
        return _single(task, singles[task], count, generator)
    return _pairs(task, files, count, generator)


def _single(task: str, texts: Texts, count: int, generator: torch.Generator) -> Examples:
    rows, labels = [], []
    longest = 2 * PASSAGE
    classes = texts.labels.unique().tolist()
    members = {label: (texts.labels == label).nonzero().flatten().tolist() for label in classes}
    for number in range(count):
        # Classes in turn, so that they are balanced.
        label = classes[number % len(classes)]
        text = texts.text(_choose(members[label], generator))
        length = int(torch.randint(longest // 2, longest + 1, (), generator=generator))
        first = 0
        if task != "section":
            first = int(torch.randint(max(len(text) - length, 1), (), generator=generator))
        piece = text[first : first + length]
        rows.append(torch.cat([torch.tensor([START]), piece]))
        # The share of different tokens, about 0.6 and spread by 0.1.
        labels.append(label if task != "varied" else (len(piece.unique()) / len(piece) - 0.6) / 0.1)
    return _padded(rows, labels, generator)


def _pairs(task: str, files: Texts, count: int, generator: torch.Generator) -> Examples:
    rows, labels = [], []
    longer = [number for number in range(len(files)) if len(files.text(number)) > 2 * PASSAGE]
    members: dict[int, list[int]] = {}
    for number in longer:
        members.setdefault(int(files.labels[number]), []).append(number)
    sources = sorted(source for source, numbers in members.items() if len(numbers) > 1)
    for number in range(count):
        source = _choose(sources, generator)
        one = _choose(members[source], generator)
        first, end = _passage(files.text(one), None, generator)
        if task == "same":
            label = number % 2
            others = [source] if label else [other for other in sources if other != source]
            second, _ = _passage(files.text(_choose(members[_choose(others, generator)], generator)), None, generator)
        else:
            # What follows, the same words again from another start, or something else.
            label = number % 3
            if label == 0:
                second, _ = _passage(files.text(one), end, generator)
            elif label == 1:
                second = first.roll(-int(torch.randint(1, len(first) // 2, (), generator=generator)))
            else:
                second, _ = _passage(files.text(_choose(longer, generator)), None, generator)
        rows.append(torch.cat([torch.tensor([START]), first, torch.tensor([BREAK]), second, torch.tensor([BREAK])]))
        share = float(torch.isin(second, first).float().mean())
        # About 0.45 on average, spread by 0.3.
        labels.append(label if task != "shared" else (share - 0.45) / 0.3)
    return _padded(rows, labels, generator)


def _passage(text: Tensor, first: int | None, generator: torch.Generator) -> tuple[Tensor, int]:
    """A passage of ``text`` from ``first`` on, or from anywhere that leaves room for another, and where it ends."""
    length = int(torch.randint(_SHORTEST, PASSAGE + 1, (), generator=generator))
    if first is None:
        first = int(torch.randint(len(text) - 2 * PASSAGE + 1, (), generator=generator))
    return text[first : first + length], first + length


def _choose(among: Sequence[int], generator: torch.Generator) -> int:
    return among[int(torch.randint(len(among), (), generator=generator))]


def _padded(rows: list[Tensor], labels: list[float], generator: torch.Generator) -> Examples:
    width = 2 * PASSAGE + 3
    order = torch.randperm(len(rows), generator=generator)
    ids = torch.full((len(rows), width), PAD)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
    mask = masks([len(row) for row in rows], width)
    return Examples({"input_ids": ids[order], "attention_mask": mask[order]}, torch.tensor(labels)[order])
