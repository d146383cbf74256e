"""What a task of an evaluation recipe may say whose texts are read each alone."""

from __future__ import annotations

from nsc_merge.evaluation.embeddings.head import POOLS
from nsc_merge.evaluation.eval_recipe import LABELLED, TaskRecipe
from nsc_merge.evaluation.metrics import METRICS
from nsc_merge.recipes.calibration_keys import CalibrationSource
from nsc_merge.recipes.yaml_keys import RecipeError


def check_texts(task: TaskRecipe) -> TaskRecipe:
    """A task as it is, if what it says goes together.

    Raises:
        RecipeError: naming the key, what was found and what was expected.
    """
    prefix = f"tasks.{task.name}."
    held = {key: place.settings.texts for key in LABELLED if isinstance(place := getattr(task, key), CalibrationSource)}
    if not task.alone:
        if task.metric.embeds or task.metric.scores:
            what, way = ("scores", "CHOSEN, REJECTED") if task.metric.scores else ("embeddings", "QUERY, DOCUMENT")
            raise RecipeError(
                f"{prefix}test.texts: metric {task.metric.name} is of {what} of texts, found none; expected "
                f"{{source: FILE, texts: [{way}]}}"
            )
        return task
    if task.validation is not None and not held.get("validation"):
        raise RecipeError(f"{prefix}validation.texts: expected those of test, found none")
    kind = task.metric.compares
    if kind is None:
        fitting = [one.name for one in METRICS.values() if one.compares is not None]
        raise RecipeError(f"{prefix}metric: of texts that are read alone one of {fitting}, found {task.metric.name}")
    wanted = {"value": (2, 2), "nearest": (3, None), "same": (2, None), "preferred": (2, None)}[kind]
    for key, texts in held.items():
        count = len(texts or ())
        if count < wanted[0] or (wanted[1] is not None and count > wanted[1]):
            said = f"{wanted[0]}" if wanted[1] else f"at least {wanted[0]}"
            raise RecipeError(f"{prefix}{key}.texts: metric {task.metric.name} compares {said}, found {count}")
    for key in {"value": ("head",), "preferred": ("labels",)}.get(kind, ("head", "labels")):
        if getattr(task, key) is not None:
            raise RecipeError(f"{prefix}{key}: expected none, as texts of a row are compared")
    if task.generate or task.classes:
        raise RecipeError(f"{prefix}{'generate' if task.generate else 'classes'}: expected none, as texts are compared")
    if task.embeds and task.pool not in (None, *POOLS):
        raise RecipeError(f"{prefix}pool: of an embedding it is one of {list(POOLS)}, found {task.pool!r}")
    return task
