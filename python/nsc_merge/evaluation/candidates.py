"""What a row of an evaluation measures: a merge that is made, or one from disk."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nsc_merge.adapters import CONFIG_FILE, load_adapter
from nsc_merge.api import merge
from nsc_merge.calibration.batches import MASK
from nsc_merge.evaluation.eval_recipe import EvalRecipe, Row
from nsc_merge.evaluation.metrics import cross_entropy
from nsc_merge.evaluation.rows.saved_base import check_base
from nsc_merge.evaluation.scoring import Candidate
from nsc_merge.evaluation.suite import RecipeSuite
from nsc_merge.methods import METHODS, Method
from nsc_merge.methods.likelihoods import BERNOULLI
from nsc_merge.methods.task_outputs import last_token
from nsc_merge.models.bases.loading import load_model
from nsc_merge.models.fitting import fit
from nsc_merge.recipes.saved_result import load_result
from nsc_merge.results.layout import COEFFICIENTS_FILE, TASKS_FOLDER, found_as
from nsc_merge.results.result import MergeResult


def open_saved(folder: Path, suite: RecipeSuite) -> Candidate:
    """A finished merge, an adapter or a model from disk, to be measured on ``suite``.

    Of a folder written by ``nsc-merge run`` it is the adapter, else the model, else the coefficients, with base and
    adapters read again; or the adapter or model of every task.

    Raises:
        FileNotFoundError: if it holds none of these.
    """
    if (folder / CONFIG_FILE).is_file():
        adapter = fit({"merged": load_adapter(folder, "merged")}, suite.model)
        return merge(suite.model, adapter, method="task_arithmetic", scale=1.0)
    if (folder / "config.json").is_file():
        dtype = str(next(suite.model.parameters()).dtype).removeprefix("torch.")
        placement = replace(suite.placement, dtype=dtype, quantization=None)
        return load_model(str(folder), local=True, placement=placement)
    for name, file in (("lora", CONFIG_FILE), ("model", "config.json")):
        if (folder / name / file).is_file():
            return open_saved(folder / name, suite)
    if (folder / COEFFICIENTS_FILE).is_file():
        return load_result(folder, numbers=False)
    if (folder / TASKS_FOLDER).is_dir():
        own = {task: open_saved(found_as(folder / TASKS_FOLDER, task), suite) for task in suite.adapters}
        return {task: one for task, one in own.items() if not isinstance(one, Mapping)}
    raise FileNotFoundError(
        f"folder: {folder}: expected an adapter ({CONFIG_FILE}), a model (config.json) or a folder written by "
        "nsc-merge run, found none"
    )


def _is_model(folder: Path) -> bool:
    """Whether :func:`open_saved` finds a whole model first."""
    adapter = any((folder / name / CONFIG_FILE).is_file() for name in ("", "lora"))
    return not adapter and any((folder / name / "config.json").is_file() for name in ("", "model"))


def candidate_of(suite: RecipeSuite, recipe: EvalRecipe, row: Row, seed: int) -> Candidate:
    """What a row measures, before any tuning.

    Raises:
        ValueError: of a saved update of another base than the recipe's, and whatever the merge raises.
    """
    if row.folder is not None:
        if not _is_model(row.folder):
            check_base(row.folder, recipe.model)
        return open_saved(row.folder, suite)
    assert row.method is not None
    method = METHODS[row.method]
    options: dict[str, Any] = dict(row.options)
    if "seed" in method.option_names:
        options.setdefault("seed", seed)
    if row.tune is not None:
        options["scale"] = 1.0
    if "outputs" in method.needs:
        options = {**_output_options(suite, recipe, method), **options}
    calibration = suite.calibration() if "data" in method.needs else None
    return merge(suite.model, suite.adapters, calibration, row.method, **options)


def coefficient_range(candidate: Candidate) -> dict[str, float] | None:
    """Mean, least and greatest coefficient where a task's adapter touches a module; None without coefficients."""
    if not isinstance(candidate, MergeResult) or not candidate.coefficients:
        return None
    values = [
        value
        for path, row in candidate.coefficients.items()
        for task, value in row.items()
        if path in candidate.adapters[task].factors
    ]
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}


def next_token(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """What a model that writes says behind the last token that is there, ``[N, V]``."""
    logits = model(**batch).logits
    mask = batch.get(MASK)
    return last_token(logits, mask if mask is not None and mask.shape == logits.shape[:2] else None)


def _output_options(suite: RecipeSuite, recipe: EvalRecipe, method: Method) -> dict[str, Any]:
    """The tasks' heads, for methods that look at outputs. Those that know no likelihood but that of classes get the
    heads of such tasks only. Tasks that generate, and those of the harness, are left to the model's own logits: with
    these methods, which leave out tasks without a function where some have one, those of the next token.
    """
    given: dict[str, Any] = {}
    headed = {name: task for name, task in recipe.labelled.items() if not task.generate}
    classes = {name: task.metric.loss is cross_entropy and not task.embeds for name, task in headed.items()}
    both = "likelihood" in method.option_names
    several = [name for name, task in headed.items() if task.metric.several]
    if several and not both:
        raise ValueError(
            f"tasks.{several[0]}: several of its classes may be true, and {method.name} is of outputs of which one is; "
            "expected distill, or a method that looks at no outputs"
        )
    if headed and not both and not any(classes.values()):
        first, task = next(iter(headed.items()))
        raise ValueError(
            f"tasks.{first}.metric: {method.name} is of outputs of classes, and metric {task.metric.name} is of none; "
            "expected some task of classes (accuracy, f1, ...), or another method"
        )
    if headed:
        given["outputs"] = {name: partial(suite.output, name) for name in headed if both or classes[name]}
        if not both:
            given["outputs"] |= {name: next_token for name in recipe.tasks if name not in headed}
    if both:
        given["likelihood"] = {
            name: "categorical" if classes.get(name, True) else "gaussian" for name in recipe.tasks
        }
        if method.name == "distill":
            given["likelihood"] |= dict.fromkeys(several, BERNOULLI)
    return given
