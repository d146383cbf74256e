"""Reads what a recipe merges and calibrates on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nsc_merge.adapters import Adapter, load_adapter, load_from_hub
from nsc_merge.calibration.batch_files import Batches
from nsc_merge.calibration.raw.reading import batches_of, is_raw
from nsc_merge.processes.group import current
from nsc_merge.recipes.adapter_keys import HubAdapter
from nsc_merge.recipes.calibration_keys import CalibrationSource
from nsc_merge.recipes.merge_recipe import Recipe

Inputs = tuple[dict[str, Adapter], dict[str, Batches]]
"""Adapters and calibration batches, by task."""


def read_adapter(place: Path | HubAdapter, task: str, dora: str) -> Adapter:
    """The adapter that a recipe names."""
    if isinstance(place, Path):
        return load_adapter(place, task, dora=dora)
    return load_from_hub(place.repo, task, revision=place.revision, subfolder=place.subfolder, dora=dora)


def read_inputs(recipe: Recipe) -> Inputs:
    """The adapters and the calibration batches, as they are; the same ones in all processes that share the work.

    Raises:
        ValueError, OSError: naming the key, what was found and what was expected.
    """
    with current().agreeing():
        adapters = {task: read_adapter(place, task, recipe.dora) for task, place in recipe.adapters.items()}
        calibration = _calibration(recipe)
    seen = current().share([{task: batches.sha256 for task, batches in calibration.items()}])
    if any(one != seen[0] for one in seen):
        raise OSError("calibration: expected data that is the same for all processes, found other bytes in some")
    return adapters, calibration


def _calibration(recipe: Recipe) -> dict[str, Batches]:
    """Batches by task; raw data that several tasks take alike are encoded once, and are one object for all of them, so
    that they share its forward passes.
    """
    seen: dict[Any, Batches] = {}
    found = {}
    for task, place in recipe.calibration.items():
        raw = not place.local or is_raw(place.source)
        same = (place.source, place.local, place.settings) if raw else task
        if same not in seen:
            seen[same] = calibration_from(place, recipe, f"calibration.{task}")
        found[task] = seen[same]
    return found


def calibration_from(place: CalibrationSource, recipe: Any, argument: str) -> Batches:
    """The batches that a recipe, of a merge or of an evaluation, names for a task, as its base takes them."""
    return batches_of(
        place.source,
        recipe.model,
        place.settings,
        recipe.batch_size,
        argument,
        local=place.local,
        base_revision=recipe.revision,
    )
