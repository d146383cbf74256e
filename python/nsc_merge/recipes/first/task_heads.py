"""What the head of a task says about the labels that it is measured by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nsc_merge.adapters.folder_about import class_names
from nsc_merge.models.traits import encodes, hears
from nsc_merge.recipes.first.findings import Findings
from nsc_merge.recipes.first.tasks import Task
from nsc_merge.recipes.yaml_keys import RecipeError


def check_head(task: Task, found: Findings, argument: str) -> None:
    """Refuse a base that has no head of the class that a task was trained in, as roberta-large, on which transformers
    puts one in training.

    Raises:
        RecipeError: with the way to one that has.
    """
    kind, own, head = task.kind_on(found.base.model), type(found.base.model).__name__, found.heads.get(task.name)
    if kind == own or own.endswith("ForSequenceClassification") or at_last(task, found):
        return
    if not head:
        raise RecipeError(
            f"{argument}: {own} has no head of classes, and the adapter brought none (modules_to_save); expected "
            "one, as figures of a head that is drawn at random say nothing"
        )
    made = f"{kind}.from_pretrained({found.base.source!r}, num_labels={count_of(task, found)}).save_pretrained(FOLDER)"
    raise RecipeError(
        f"{argument}: {own} has no place for {head[0]}; expected a base that classifies, which {made} makes of it, "
        "with its tokenizer saved there, too"
    )


def kind_of_labels(task: Task, found: Findings, *, tags: bool) -> str:
    """What the labels of a task are.

    Args:
        tags: whether the base classifies tokens.
    """
    can_generate = getattr(found.base.model, "can_generate", bool)
    if hears(found.base.model) or (can_generate() and task.name not in found.heads):
        return "answer"
    if count_of(task, found) == 1:
        return "value"
    return "tags" if tags else "class"


def count_of(task: Task, found: Findings) -> int:
    """How many classes the head of a task has."""
    brought = task.outputs if task.name in found.heads else None
    return getattr(found.base.model.config, "num_labels", 2) if brought is None else brought


def at_last(task: Task, found: Findings) -> bool:
    """Whether a task's head is one that transformers puts behind the last token of a decoder, and the base has none."""
    model: Any = found.base.model
    decoder = getattr(model, "can_generate", bool)() and not encodes(model)
    return decoder and [path.rpartition(".")[2] for path in found.heads.get(task.name, ())] == ["score"]


def classifies(task: Task, found: Findings) -> bool:
    """Whether there is a head whose outputs are the classes: configurations have a number of them without one, too."""
    brought = task.name in found.heads
    return task.outputs is not None if brought else "Classification" in type(found.base.model).__name__


def classes_of(task: Task, found: Findings) -> Sequence[str]:
    """Names of a task's classes: those beside its adapter, or of the base where its head is as large."""
    named = class_names(getattr(found.base.model.config, "id2label", None) or {})
    return task.labels or (named if len(named) == count_of(task, found) else [])
