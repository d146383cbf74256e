"""The keys of an evaluation recipe that are about the lm-evaluation-harness."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nsc_merge.evaluation.eval_recipe import HarnessSettings, HarnessTask
from nsc_merge.evaluation.harness.task_files import Reads, read_task_files, reads
from nsc_merge.recipes.yaml_keys import RecipeError, count, flag, mapping, refuse_unknown, text, text_or_none, text_path

HARNESS_KEYS = ("adapter", "lm_eval", "metric", "limit", "num_fewshot", "calibration")
_KEYS = ("include_path", "batch_size", "apply_chat_template", "system_instruction")


def harness_task(value: Mapping[str, Any], common: Mapping[str, Any]) -> HarnessTask:
    """A task with the key ``lm_eval``; ``common`` is what every task has.

    Raises:
        RecipeError: naming the key, what was found and what was expected.
    """
    prefix, shots = f"tasks.{common['name']}.", value.get("num_fewshot")
    return HarnessTask(
        **common,
        lm_eval=text(value, "lm_eval", prefix),
        metric=text_or_none(value, "metric", prefix),
        limit=_limit(value.get("limit"), f"{prefix}limit"),
        num_fewshot=None if shots is None else count(shots, f"{prefix}num_fewshot", least=0),
    )


def harness_settings(document: Mapping[str, Any], tasks: Mapping[str, HarnessTask]) -> HarnessSettings:
    """The key ``lm_eval`` of a recipe, and what its ``tasks`` read.

    Raises:
        RecipeError: naming the key, what was found and what was expected.
        RuntimeError: if there are such tasks and the harness is not installed.
    """
    settings = mapping(document, "lm_eval")
    refuse_unknown("lm_eval.", settings, _KEYS)
    if not tasks:
        if settings:
            raise RecipeError("lm_eval: no task is measured by it; expected the key lm_eval in some of tasks")
        return HarnessSettings()
    if importlib.util.find_spec("lm_eval") is None:
        raise RuntimeError(
            f"tasks.{next(iter(tasks))}.lm_eval: needs the lm-evaluation-harness, which is not installed: "
            "pip install 'nsc-kernels[eval]'"
        )
    folder = settings.get("include_path")
    if folder is not None:
        folder = Path(text_path("lm_eval.include_path", folder))
        if not folder.is_dir():
            raise RecipeError(f"lm_eval.include_path: expected a folder of task files, {folder} is none")
    size = settings.get("batch_size")
    known = read_task_files(folder) if folder is not None else {}
    found = Reads()
    for name, task in tasks.items():
        found |= reads(task.lm_eval, known, f"tasks.{name}.lm_eval")
    return HarnessSettings(
        include_path=folder,
        batch_size=size if size in (None, "auto") else count(size, "lm_eval.batch_size"),
        apply_chat_template=flag(settings, "apply_chat_template", "lm_eval.", False),
        system_instruction=text_or_none(settings, "system_instruction", "lm_eval."),
        builtin=found.builtin,
        needs_network=found.hub,
        data=tuple(dict.fromkeys(found.files)),
    )


def _limit(value: Any, key: str) -> int | float | None:
    if value is None or (isinstance(value, float) and 0 < value < 1):
        return value
    try:
        return count(value, key)
    except RecipeError:
        raise RecipeError(
            f"{key}: expected a whole number of at least 1, or a share below 1, found {value!r:.60}"
        ) from None
