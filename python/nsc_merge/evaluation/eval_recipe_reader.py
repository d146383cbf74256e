"""The recipe file of ``nsc-merge eval``: read and checked."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from nsc_merge.adapters import DORA
from nsc_merge.calibration.raw.files.text_files import READERS, kind_of
from nsc_merge.calibration.raw.reading import PARQUET, is_raw
from nsc_merge.evaluation.embeddings.keys import check_texts
from nsc_merge.evaluation.eval_recipe import (
    ANSWER_KEYS,
    LABELLED,
    EvalRecipe,
    HarnessTask,
    Row,
    TaskRecipe,
    Tuning,
    answer_keys,
)
from nsc_merge.evaluation.harness.keys import HARNESS_KEYS, harness_settings, harness_task
from nsc_merge.evaluation.heads import POOLS
from nsc_merge.evaluation.joint_classes import SCORES
from nsc_merge.evaluation.metrics import METRICS, OWN, Metric
from nsc_merge.methods.registry import method_of
from nsc_merge.methods.scale_tuning import COARSE, FINE_STEP, FINE_STEPS
from nsc_merge.recipes.adapter_keys import absolute_adapter, adapter_in
from nsc_merge.recipes.calibration_keys import (
    CalibrationSource,
    absolute_data,
    absolute_source,
    data_in,
    source_in,
)
from nsc_merge.recipes.placement_keys import PLACEMENT_KEYS, placement_keys
from nsc_merge.recipes.yaml_keys import (
    RecipeError,
    absolute_model,
    by_task,
    choice,
    count,
    flag,
    mapping,
    numbers,
    output_folder,
    read_document,
    refuse_unknown,
    text,
    text_or_none,
    text_path,
)
from nsc_merge.utils.option_checks import is_number

_Tasks: TypeAlias = Mapping[str, TaskRecipe | HarnessTask]

REFERENCES = ("zero_shot", "finetuned")
TUNED_BY = ("metric", "loss")
_KEYS = (
    "model",
    "revision",
    "trust_remote_code",
    "tasks",
    "data",
    "methods",
    "seeds",
    "joint",
    "batch_size",
    "lm_eval",
    "shared_modules",
    "dora",
    *PLACEMENT_KEYS,
    "output",
)
_TASK_KEYS = (
    "adapter",
    "test",
    "validation",
    "calibration",
    "labels",
    "metric",
    "head",
    "pool",
    *ANSWER_KEYS,
    "classes",
)
_ROW_KEYS = ("method", "folder", "name", "options", "tune")
_TUNE_KEYS = ("by", "coarse", "fine_step", "fine_steps")


def load_eval_recipe(path: str | Path, overrides: Sequence[str] = ()) -> EvalRecipe:
    """Read and check an evaluation recipe; arguments and errors as
    :func:`nsc_merge.recipes.merge_recipe.load_recipe`.
    """
    return _checked(read_document(Path(path), overrides, _absolute))


def _absolute(document: dict[str, Any], base: Path) -> dict[str, Any]:
    document = dict(document)
    if "model" in document:
        document["model"] = absolute_model(document["model"], base)
    if isinstance(document.get("tasks"), dict):
        document["tasks"] = {
            task: _absolute_task(settings, base) for task, settings in document["tasks"].items()
        }
    if "data" in document:
        document["data"] = absolute_data(document["data"], base)
    if isinstance(document.get("methods"), list):
        document["methods"] = [_absolute_in(row, ("folder",), base) for row in document["methods"]]
    if "lm_eval" in document:
        document["lm_eval"] = _absolute_in(document["lm_eval"], ("include_path",), base)
    if "output" in document:
        document["output"] = _absolute_in(document["output"], ("dir",), base)
    return document


def _absolute_task(value: Any, base: Path) -> Any:
    changed = _absolute_in(value, (*LABELLED, "head"), base)
    places = (*LABELLED, "calibration") if isinstance(changed, dict) else ()
    # A path alone is one on disk, whatever it looks like.
    raw = [key for key in places if key == "calibration" or isinstance(changed.get(key), dict)]
    for key, absolute in (("adapter", absolute_adapter), *((key, absolute_source) for key in raw)):
        if isinstance(changed, dict) and changed.get(key) is not None:
            changed = {**changed, key: absolute(changed[key], base)}
    return changed


def _absolute_in(value: Any, keys: Sequence[str], base: Path) -> Any:
    if not isinstance(value, dict):
        return value
    changed = {
        key: str(base / Path(value[key]).expanduser())
        for key in keys
        if isinstance(value.get(key), str) and not (key == "head" and value[key] in ("adapter", "model"))
    }
    return {**value, **changed}


def _checked(document: dict[str, Any]) -> EvalRecipe:
    refuse_unknown("", document, _KEYS)
    output = mapping(document, "output")
    refuse_unknown("output.", output, ("dir", "plots"))
    out = output_folder(output)
    model, revision = text(document, "model"), text_or_none(document, "revision")
    local = Path(model).is_absolute()
    if local and revision is not None:
        raise RecipeError(f"revision: is of a model on the hub, but model is the folder {model}; expected none")
    trusted = flag(document, "trust_remote_code", "", False)
    data = data_in(document, trust_remote_code=trusted)
    tasks = {
        name: _task(name, value, mapping(document, "data"), trusted) for name, value in by_task(document, "tasks")
    }
    if not tasks:
        raise RecipeError("tasks: expected at least one task, found none")
    recipe = EvalRecipe(
        model=model,
        local=local,
        revision=revision,
        trust_remote_code=trusted,
        data=data,
        tasks=tasks,
        rows=_rows(document, tasks),
        out=out,
        lm_eval=harness_settings(document, {n: task for n, task in tasks.items() if isinstance(task, HarnessTask)}),
        seeds=_seeds(document),
        joint=_joint(document, tasks),
        batch_size=count(document.get("batch_size", 32), "batch_size"),
        shared_modules=choice(document, "shared_modules", ("lambda", "mean", "first")),
        dora=choice(document, "dora", DORA),
        **placement_keys(document),
        plots=flag(output, "plots", "output.", True),
    )
    for seed in recipe.seeds or (0,):
        recipe.at(seed)
    return recipe


def _task(name: str, value: Any, data: Mapping[str, Any], trusted: bool) -> TaskRecipe | HarnessTask:
    key = f"tasks.{name}"
    if not isinstance(value, dict):
        raise RecipeError(f"{key}: expected keys and values, found {value!r:.60}")
    prefix = f"{key}."
    refuse_unknown(prefix, value, HARNESS_KEYS if "lm_eval" in value else _TASK_KEYS)
    for one in ("adapter",) if "lm_eval" in value else ("adapter", "test"):
        if value.get(one) is None:
            raise RecipeError(f"{prefix}{one}: expected a path, found none")
    common: dict[str, Any] = {"name": name, "adapter": adapter_in(f"{prefix}adapter", value["adapter"])}
    if value.get("calibration") is not None:
        source = source_in(f"{prefix}calibration", value["calibration"], data, trust_remote_code=trusted)
        common["calibration"] = source
    if "lm_eval" in value:
        return harness_task(value, common)
    paths: dict[str, Any] = {
        one: _labelled(f"{prefix}{one}", value[one], data, trusted) for one in LABELLED if value.get(one) is not None
    }
    classes = value.get("classes") or []
    if not isinstance(classes, list) or not all(isinstance(one, str | int) for one in classes):
        raise RecipeError(f"{prefix}classes: expected a list of names, found {classes!r:.60}")
    pool = choice(value, "pool", POOLS, prefix) if value.get("pool") is not None else None
    metric = _metric(prefix, value.get("metric"))
    task = TaskRecipe(
        **common,
        metric=metric,
        labels=text_or_none(value, "labels", prefix),
        head=text_or_none(value, "head", prefix),
        pool=pool,
        **answer_keys(value, prefix, metric),
        classes=tuple(str(one) for one in classes),
        **paths,
    )
    return check_texts(task)


def _labelled(key: str, value: Any, data: Mapping[str, Any], trusted: bool) -> Path | CalibrationSource:
    """Labelled data: safetensors by their path; raw data by theirs, or by keys and values."""
    if not isinstance(value, dict):
        path = Path(text_path(key, value))
        if kind_of(path) not in (*READERS, PARQUET) and not (path.is_dir() and is_raw(path)):
            return path
    return source_in(key, value, data, trust_remote_code=trusted)


def _metric(prefix: str, value: Any) -> Metric:
    options = {}
    if isinstance(value, dict):
        options = {str(key): item for key, item in numbers(value).items() if key != "name"}
        value = value.get("name")
    if value not in METRICS:
        raise RecipeError(f"{prefix}metric: expected one of {list(METRICS)}, found {value!r:.60}")
    try:
        metric = METRICS[value].with_options(**options)
    except ValueError as error:
        raise RecipeError(f"{prefix}metric.{error}") from None
    program = metric.settings.get("program", OWN)
    if program != OWN and importlib.util.find_spec(program) is None:
        raise RuntimeError(f"{prefix}metric.program: {program} is not installed: pip install 'nsc-kernels[eval]'")
    return metric


def _rows(document: Mapping[str, Any], tasks: _Tasks) -> tuple[Row, ...]:
    listed = document.get("methods")
    if not isinstance(listed, list) or not listed:
        raise RecipeError(f"methods: expected a list of methods or folders, found {listed!r:.60}")
    rows = [_row(number, value, tasks) for number, value in enumerate(listed)]
    known = [row.method for row in rows]
    rows = [*(Row(name, name) for name in REFERENCES if name not in known), *rows]
    names = [row.name for row in rows]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RecipeError(f"methods: two rows are called {twice!r}; give one another name")
    return tuple(rows)


def _row(number: int, value: Any, tasks: _Tasks) -> Row:
    prefix = f"methods[{number}]."
    if isinstance(value, str):
        value = {"method": value}
    if not isinstance(value, dict):
        raise RecipeError(f"methods[{number}]: expected a method or keys and values, found {value!r:.60}")
    refuse_unknown(prefix, value, _ROW_KEYS)
    if ("method" in value) == ("folder" in value):
        raise RecipeError(f"methods[{number}]: expected either a method or a folder, found {sorted(value)}")
    if "folder" in value:
        for key in ("options", "tune"):
            if value.get(key) is not None:
                raise RecipeError(f"{prefix}{key}: applies to methods, not to a folder")
        folder = Path(text_path(f"{prefix}folder", value["folder"]))
        return Row(text(value, "name", prefix, default=folder.name), folder=folder)
    name = value["method"]
    options = numbers(mapping(value, "options", prefix))
    try:
        method = method_of(name)
    except ValueError as error:
        raise RecipeError(f"{prefix}{error}") from None
    try:
        method.check_names(options)
    except ValueError as error:
        raise RecipeError(f"{prefix}options.{error}") from None
    tune = _tuning(prefix, value.get("tune"))
    if tune is not None and method.tuned != "scale":
        raise RecipeError(f"{prefix}tune: method {name!r} has no scale to tune")
    if tune is not None and "scale" in options:
        raise RecipeError(f"{prefix}tune: chooses the scale, but options.scale is given, too")
    for task in tasks.values():
        validation = task.validation if isinstance(task, TaskRecipe) else None
        if "data" in method.needs and validation is None and task.calibration is None:
            raise RecipeError(
                f"tasks.{task.name}.calibration: {prefix[:-1]} ({name}) needs inputs of every task, found neither "
                "calibration nor validation"
            )
        if isinstance(task, HarnessTask):
            if method.averages_outputs:
                raise RecipeError(
                    f"methods[{number}]: {name} is the mean of the outputs of several models, and task {task.name} is "
                    "of the harness, which measures one; leave out one of the two"
                )
            if tune is not None and tune.by == "loss":
                raise RecipeError(f"{prefix}tune: task {task.name} (lm_eval) has no loss; use metric")
            continue
        if tune is not None and validation is None:
            raise RecipeError(f"tasks.{task.name}.validation: {prefix[:-1]} ({name}) needs it, found none")
        if tune is not None and tune.by == "loss" and (task.metric.loss is None or task.generate):
            raise RecipeError(f"{prefix}tune: task {task.name} ({task.metric.name}) has no loss; use metric")
    return Row(text(value, "name", prefix, default=name), name, options, tune)


def _tuning(prefix: str, value: Any) -> Tuning | None:
    if value is None:
        return None
    if isinstance(value, str):
        value = {"by": value}
    if not isinstance(value, dict):
        raise RecipeError(f"{prefix}tune: expected one of {list(TUNED_BY)}, found {value!r:.60}")
    refuse_unknown(f"{prefix}tune.", value, _TUNE_KEYS)
    given = numbers({key: item for key, item in value.items() if key != "by"})
    coarse = given.get("coarse", list(COARSE))
    if not isinstance(coarse, list) or not coarse or not all(is_number(scale) for scale in coarse):
        raise RecipeError(f"{prefix}tune.coarse: expected a list of scales, found {coarse!r:.60}")
    step = given.get("fine_step", FINE_STEP)
    if step is not None and not is_number(step):
        raise RecipeError(f"{prefix}tune.fine_step: expected a number or null, found {step!r:.60}")
    by = choice(value, "by", TUNED_BY, f"{prefix}tune.")
    steps = count(given.get("fine_steps", FINE_STEPS), f"{prefix}tune.fine_steps")
    return Tuning(by, tuple(float(scale) for scale in coarse), step, steps)


def _seeds(document: Mapping[str, Any]) -> tuple[int, ...]:
    seeds = document.get("seeds")
    if seeds is None:
        return ()
    good = isinstance(seeds, list) and seeds and len(set(map(str, seeds))) == len(seeds)
    if not good or not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds):
        raise RecipeError(f"seeds: expected a list of different whole numbers, found {seeds!r:.60}")
    return tuple(seeds)


def _joint(document: Mapping[str, Any], tasks: _Tasks) -> str | None:
    value = document.get("joint")
    if value is None or value is False:
        return None
    if value not in SCORES:
        raise RecipeError(f"joint: expected one of {list(SCORES)}, or false, found {value!r:.60}")
    classifiers = [task for task in tasks.values() if isinstance(task, TaskRecipe) and task.classifies]
    if len(classifiers) < 2:
        raise RecipeError(f"joint: expected at least two tasks of metric accuracy, found {len(classifiers)}")
    return str(value)
