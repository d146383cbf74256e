"""What the figures of a row depend on, as one SHA-256."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nsc_merge.adapters.hub import SENTENCE_MODULES
from nsc_merge.calibration.raw.labels import LABELS
from nsc_merge.calibration.raw.reading import is_raw
from nsc_merge.evaluation.eval_recipe import SEED, EvalRecipe, HarnessTask, MeasuredTask, Row, TaskRecipe
from nsc_merge.methods import METHODS
from nsc_merge.recipes.adapter_keys import HubAdapter
from nsc_merge.recipes.calibration_keys import CalibrationSource
from nsc_merge.results.layout import COEFFICIENTS_FILE, RECIPE_FILE
from nsc_merge.utils.json_text import plain
from nsc_merge.utils.provenance import hashes, version_of, versions, whole

# One more whenever the same outputs come to another figure, so that rows of before are measured again.
_MEASURES = 5

# How text becomes tokens, and images and audio inputs, as transformers saves it beside a model.
_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "*.model", "chat_template*")
_PROCESSOR = ("*processor_config.json", *_TOKENIZER)


def fingerprint(recipe: EvalRecipe, row: Row, seed: int) -> str:
    """SHA-256 of all that a row's figures depend on: settings, files, versions, and the seed if it matters.

    What is on the hub, and what files of raw data name in turn, is not looked at.
    """
    method = METHODS[row.method] if row.method else None
    paths = [recipe.model, str(row.folder or "")]
    paths += [str(path) for task in recipe.tasks.values() for path in task.paths.values()]
    seeded = any(SEED in path for path in paths)
    # A seed among its options is the same for all.
    draws = method is not None and "seed" in method.option_names and "seed" not in row.options
    drawn = draws or (method is not None and "data" in method.needs)
    here = recipe.at(seed)
    # Not among the settings of a plain base, so that rows of earlier releases stay theirs.
    unusual = [one for one in (here.quantization, here.revision, here.trust_remote_code) if one]
    known: dict[str, Any] = {
        "row": [row.method, row.options, row.tune and vars(row.tune)],
        "folder": None if row.folder is None else _all_hashes(Path(str(row.folder).replace(SEED, str(seed)))),
        "model": _all_hashes(Path(here.model)) if here.local else here.model,
        "tasks": {name: [_files(task), *_settings(task)] for name, task in here.tasks.items()},
        "settings": [here.batch_size, here.shared_modules, here.dora, here.dtype, here.joint, *unusual],
        "seed": [seed if seeded or drawn else None, bool(recipe.seeds) and drawn],
        "versions": versions(),
        "measures": _MEASURES,
    }
    if any(_takes_text(task) for task in here.tasks.values()):
        known["tokenizer"] = _files_of(here.data.tokenizer or here.model, _TOKENIZER)
    if any(task.embeds for task in here.labelled.values()):
        beside = [str(task.adapter) for task in here.labelled.values() if isinstance(task.adapter, Path)]
        known["embedding"] = {folder: _files_of(folder, SENTENCE_MODULES) for folder in [here.model, *beside]}
    # Beside the base they are among its configurations.
    if named := _named(here):
        known["named"] = {folder: _files_of(folder, _PROCESSOR) for folder in named}
    if here.harness:
        settings = here.lm_eval
        places = [*settings.data, *([settings.include_path] if settings.include_path else [])]
        files = {str(place): _whole(place) for place in places}
        said = [] if settings.system_instruction is None else [settings.system_instruction]
        known["lm_eval"] = [files, settings.batch_size, settings.apply_chat_template, *said]
    if measuring := measuring_versions(here):
        known["measuring"] = measuring
    return hashlib.sha256(json.dumps(plain(known), sort_keys=True).encode()).hexdigest()


def measuring_versions(recipe: EvalRecipe) -> dict[str, str]:
    """Of the packages that alone say what some figure of a recipe is."""
    named = sorted({task.metric.package for task in recipe.labelled.values()} - {""})
    needed = [*(["lm-eval", "datasets"] if recipe.harness else []), *named]
    return {name: version_of(name) for name in needed}


def _files(task: MeasuredTask) -> dict[str, Any]:
    found: dict[str, Any] = {
        key: _whole(path) if key in task.sources and is_raw(path) else _all_hashes(path)
        for key, path in task.paths.items()
    }
    if isinstance(task.adapter, HubAdapter):
        found["adapter"] = asdict(task.adapter)
    return found


def _settings(task: TaskRecipe | HarnessTask) -> list[Any]:
    raw = [asdict(source) for source in task.sources.values() if _is_raw(source)]
    if isinstance(task, HarnessTask):
        return [[task.lm_eval, task.metric, task.limit, task.num_fewshot], *raw]
    # Not among the settings of a plain task, so that rows of earlier releases stay theirs.
    search = [] if (task.max_new_tokens, task.num_beams) == (None, 1) else [task.max_new_tokens, task.num_beams]
    return [
        [task.metric.name, task.metric.settings, task.labels or LABELS, task.head and Path(task.head).name],
        [task.pool, task.generate, task.classes, *search],
        *raw,
    ]


def _is_raw(calibration: CalibrationSource) -> bool:
    return not calibration.local or is_raw(calibration.source)


def _takes_text(task: TaskRecipe | HarnessTask) -> bool:
    """Whether a tokenizer matters."""
    raw = any(map(_is_raw, task.sources.values()))
    return raw or isinstance(task, HarnessTask) or task.metric.decodes


def _named(recipe: EvalRecipe) -> list[str]:
    """Folders and hub ids of tokenizers and processors that raw data name beside the one for all texts."""
    settings = [one.settings for task in recipe.tasks.values() for one in task.sources.values() if _is_raw(one)]
    found = {place for one in settings for place in (one.tokenizer, one.processor) if place is not None}
    return sorted(found - {recipe.data.tokenizer})


def _files_of(folder: str, patterns: Sequence[str]) -> Any:
    """Files in a folder, or the hub id that it is."""
    place = Path(folder)
    if not place.is_dir():
        return folder
    files = [file for pattern in patterns for file in sorted(place.glob(pattern)) if file.is_file()]
    return {file.relative_to(place).as_posix(): whole(file) for file in files}


def _whole(place: Path) -> dict[str, str]:
    """SHA-256 of a file, or of every file in a folder and below, but for what Python leaves there."""
    files = [place] if place.is_file() else sorted(place.rglob("*"))
    return {
        str(file.relative_to(place)): whole(file)
        for file in files
        if file.is_file() and "__pycache__" not in file.parts
    }


def _all_hashes(place: Path) -> dict[str, Any]:
    """SHA-256 of a file, or of all weights, configurations and saved merges in a folder and below."""
    if place.is_file():
        return hashes(place)
    saved = (COEFFICIENTS_FILE, RECIPE_FILE)
    below = sorted(path for path in place.rglob("*") if path.is_dir() or path.name in saved)
    return {str(path.relative_to(place)): hashes(path) for path in [place, *below]}
