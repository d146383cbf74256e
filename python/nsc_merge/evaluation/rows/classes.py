"""What the classes of a task are called, and how many there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from nsc_merge.adapters import Adapter
from nsc_merge.adapters.folder_about import class_names
from nsc_merge.calibration.raw.preprocessors import classifies_tokens
from nsc_merge.evaluation.eval_recipe import TaskRecipe
from nsc_merge.evaluation.metrics import check_tags


def names_of(task: TaskRecipe, adapter: Adapter, model: nn.Module) -> Sequence[str]:
    """Names of a task's classes: those of the recipe, of the adapter's folder, or of the base where its head is as
    large; none where they are only numbered.

    Raises:
        ValueError: naming the task, if the recipe has more or fewer than the head that the adapter brought.
    """
    counts = _counts(adapter)
    if task.classes:
        if task.head in (None, "adapter") and counts and len(task.classes) not in counts:
            known = " or ".join(map(str, sorted(counts)))
            raise ValueError(
                f"tasks.{task.name}.classes: expected {known} names, as the head of {adapter.name!r} has classes, "
                f"found {len(task.classes)}"
            )
        return task.classes
    own: Mapping[int, str] = getattr(getattr(model, "config", None), "id2label", None) or {}
    for names in (adapter.about.id2label, own):
        listed = class_names(names)
        if listed and (not counts or len(listed) in counts):
            return listed
    return ()


def count_of(task: TaskRecipe, adapter: Adapter, model: nn.Module) -> int | None:
    """How many classes tokens have, or samples of which several may be true, where that is clear."""
    if not (says_tags(task, model) or task.metric.several) or task.head not in (None, "adapter", "model"):
        return None
    brought = set() if task.head == "model" else _counts(adapter)
    if not brought:
        return getattr(getattr(model, "config", None), "num_labels", None)
    return brought.pop() if len(brought) == 1 else None


def tags_of(task: TaskRecipe, adapter: Adapter, model: nn.Module) -> Sequence[str]:
    """The tags of entities that a task's classes are.

    Raises:
        ValueError: naming the task, if they are others, or not known.
    """
    classes, key = names_of(task, adapter, model), f"tasks.{task.name}.classes"
    if not classes:
        raise ValueError(f"{key}: metric {task.metric.name} needs the tags in order, [O, B-PER, ...], found none")
    try:
        check_tags(classes)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    return classes


def says_tags(task: TaskRecipe, model: nn.Module) -> bool:
    """Whether outputs are the logits of classes of tokens."""
    return classifies_tokens(type(model)) and task.pool in (None, "tokens")


def _counts(adapter: Adapter) -> set[int]:
    """How many classes the head has that a task's adapter brought: of heads with a layer before the last (wav2vec 2.0's
    projector) it is not clear which is which.
    """
    return {len(value) for value in adapter.trained.values() if value.dim() == 2}
