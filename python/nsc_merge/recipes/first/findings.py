"""What a first recipe is written from: base, adapters and data looked at, and a method chosen."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nsc_merge.adapters import Adapter
from nsc_merge.calibration.raw.settings import DataSettings
from nsc_merge.methods import METHODS, Method, method_of
from nsc_merge.models.attachment import merged_linears
from nsc_merge.models.bases.architecture import architecture_of, outline_of, quantised_as
from nsc_merge.models.bases.placement import device_of
from nsc_merge.models.block_finding import trunk_of
from nsc_merge.models.embeddings.files import Texts, in_folder, on_hub, texts_of
from nsc_merge.models.families import Family, find_family, scored_paths
from nsc_merge.models.fitting import fit
from nsc_merge.models.traits import classifiers, output_embeddings
from nsc_merge.recipes.first.data import Data, sources
from nsc_merge.recipes.first.looking import look
from nsc_merge.recipes.first.tasks import Task, find_tasks
from nsc_merge.recipes.forecast.estimate import memory, operations
from nsc_merge.recipes.forecast.prospect import as_run_on, low_rank_alone
from nsc_merge.recipes.forecast.shapes import NoFormula, work_of
from nsc_merge.recipes.merge_recipe import Recipe
from nsc_merge.recipes.yaml_keys import RecipeError, absolute_model
from nsc_merge.utils.memory import total_memory
from nsc_merge.utils.option_checks import is_hub_id

# Samples of a batch by the recipe of a family's models: those of the paper.
BATCH_SIZES = {"vision": 32, "llm": 2, "vlm": 2}
# What is merged with where there is no data. No other method without data is clearly better in docs/results.md.
WITHOUT_DATA = "task_arithmetic"
# Up to so many tasks 0.4 is as good a coefficient as 1/K, or better, in docs/results.md; with eight it is far worse.
FEW_TASKS = 5


@dataclass(frozen=True)
class Base:
    """A base model, before its weights are read.

    Attributes:
        source: absolute path, or hub id.
        local: whether it is a folder.
        revision: of one on the hub.
        model: on the meta device.
        family: listed or found; None if there are no blocks that hold an adapted linear.
        quantised: the method that its files are quantised by, if any.
        embedded: what texts are for one that embeds them; None of others.
    """

    source: str
    local: bool
    revision: str | None
    model: nn.Module
    family: Family | None
    quantised: str | None
    embedded: Texts | None = None

    @property
    def parameters(self) -> int:
        return sum(value.numel() for value in self.model.parameters())

    @property
    def size(self) -> int:
        """Bytes of its parameters."""
        return sum(value.numel() * value.element_size() for value in self.model.parameters())

    @property
    def dtype(self) -> str:
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Findings:
    """All that a first recipe says.

    Attributes:
        base: the base model.
        tasks: the adapters.
        heads: task -> modules that it trained in full and keeps for itself.
        data: task -> its inputs; empty without.
        samples: to draw of raw data for each task; 0 where there is none.
        method: that is chosen.
        chosen: why, where it is not the usual one.
        options: of the method, those that are written out.
        preset: of the method's recipes, that of the family; None if it has none.
        batch_size: samples of a batch.
        measured: paths of the linears whose input the method measures.
        bytes: that a step takes at most; None where there is no formula.
        device_bytes: that there are; 0 if unknown.
        operations: of a step.
        warnings: what may be wrong.
    """

    base: Base
    tasks: list[Task]
    heads: Mapping[str, list[str]]
    data: Mapping[str, Data]
    samples: int
    method: Method
    chosen: str
    options: dict[str, Any]
    preset: str | None
    batch_size: int
    measured: list[str]
    bytes: float | None
    device_bytes: int
    operations: float | None
    warnings: list[str]


def find(
    adapters: Sequence[str],
    base: str | None = None,
    data: Sequence[str] = (),
    method: str | None = None,
    text: str | None = None,
    revision: str | None = None,
) -> Findings:
    """Look at everything that a recipe would be about; no weight is read.

    Args:
        adapters: folders, or ``TASK=FOLDER``.
        base: folder or hub id; the one that all adapters name when None, at the revision that they name.
        data: arguments of ``--data``.
        method: name; one that suits what there is when None.
        text: column or template that holds the text of raw data; found when None.
        revision: of a base on the hub.

    Raises:
        RecipeError: naming the argument that is at fault.
        ValueError, TypeError, OSError: if adapters, base or data cannot be merged, or not together.
    """
    tasks = find_tasks(adapters)
    if base is None:
        base, named = _base_named_by(tasks)
        revision = revision or named
    found = _base(base, revision)
    fitted = fit({task.name: low_rank_alone(task.outline) for task in tasks}, found.model)
    linears = merged_linears(found.model, fitted)
    found = replace(found, family=find_family(found.model, linears), embedded=_embedded(found, tasks))
    places = sources(data, [task.name for task in tasks])
    chosen, why = _method(method, found, bool(places))
    preset = found.family.recipe if found.family and found.family.recipe in chosen.recipes else None
    batch_size = BATCH_SIZES.get(found.family.recipe if found.family else "", 32)
    options = _options(chosen, preset, tasks)
    warnings = [*_other_bases(tasks, found), *_partly(fitted, linears)]
    looked = {}
    try:
        looked = look(
            places, found.source, found.model, batch_size, text, revision, found.embedded, scores=_scores(found, tasks),
            kinds={task.name: task.kind_on(found.model) for task in tasks},
        )  # fmt: skip
    except (ValueError, OSError) as error:
        if "data" in chosen.needs:
            raise
        warnings.append(f"the data is left out: {error}")
    measured = _measured(found, list(linears), chosen, options)
    bytes_, count = _forecast(found, fitted, looked, chosen, options)
    there = total_memory(device_of("auto"))
    if bytes_ is not None and there and bytes_ > there:
        warnings.append("a step does not fit the memory here: docs/large_models.md has device_map and quantization")
    return Findings(
        found,
        tasks,
        {task.name: heads for task in tasks if (heads := _heads(task, found.model))},
        looked,
        _samples(looked, options, batch_size),
        chosen,
        why,
        options,
        preset,
        batch_size,
        measured,
        bytes_,
        there,
        count,
        warnings,
    )


def _base_named_by(tasks: Sequence[Task]) -> tuple[str, str | None]:
    """Name and revision of the base that all adapters were trained on, by their own word."""
    named = {task.name: (task.outline.base_model, task.config.get("revision")) for task in tasks}
    first, revision = named[tasks[0].name]
    if first is None or len(set(named.values())) > 1:
        said = "; ".join(
            f"{task}: {base or 'none'}{f' at {revision}' if revision else ''}"
            for task, (base, revision) in named.items()
        )
        raise RecipeError(f"--base: expected the base model of the adapters, which do not all name one ({said})")
    on_hub = is_hub_id(first)
    if not on_hub and not Path(first).expanduser().is_dir():
        raise RecipeError(f"--base: the adapters were trained on {first}, which is not here; expected where it is now")
    # Of a folder there are no revisions, whatever the adapter says.
    return first, revision if on_hub else None


def _base(name: str, revision: str | None) -> Base:
    local = not is_hub_id(name)
    source = os.path.abspath(absolute_model(name, Path.cwd())) if local else name
    if local and not Path(source).is_dir():
        raise RecipeError(f"--base: expected a folder or a hub id (owner/name), {source} is no folder")
    if local and revision is not None:
        raise RecipeError(f"--revision: is of a base on the hub, but --base is the folder {source}; expected none")
    architecture = architecture_of(source, local=local, revision=revision)
    model = outline_of(architecture)
    return Base(source, local, revision, model, find_family(model), quantised_as(architecture.config))


def _embedded(base: Base, tasks: Sequence[Task]) -> Texts | None:
    """What texts are for a base that embeds them, by the files beside it, or beside the first adapter where it has
    none.
    """
    find = in_folder(Path(base.source)) if base.local else on_hub(base.source, base.revision, "--base")
    found = texts_of(find, f"--base: {base.source}")
    folder = Path(tasks[0].source)
    return texts_of(in_folder(folder), str(folder)) if found is None and folder.is_dir() else found


def _scores(base: Base, tasks: Sequence[Task]) -> bool:
    """Whether the tasks' heads, or the base's, give a text one number, as those of reward models do."""
    brought = [task.outputs for task in tasks if task.outputs is not None]
    if brought:
        return all(count == 1 for count in brought)
    own = getattr(base.model.config, "num_labels", None) == 1
    return own and "ForSequenceClassification" in type(base.model).__name__


def _method(asked: str | None, base: Base, has_data: bool) -> tuple[Method, str]:
    """The method, and why it is not the usual one."""
    if asked is not None:
        try:
            chosen = method_of(asked)
        except ValueError as error:
            raise RecipeError(f"--{error}") from None
        if "data" in chosen.needs and not has_data:
            raise RecipeError(f"--method: {asked} needs unlabelled inputs of every task, found none; expected --data")
        return chosen, ""
    if base.family is None:
        kind = getattr(base.model.config, "model_type", None)
        return METHODS[WITHOUT_DATA], (
            f"{Recipe.method} does not know where to measure in models of type {kind}, in which no list of blocks "
            "holds an adapted linear (the option family says where), so a method without data is chosen."
        )
    if not has_data:
        *others, last = (name for name, one in METHODS.items() if "data" in one.needs and "outputs" not in one.needs)
        wanting = f"{', '.join(others)} and {last}"
        return METHODS[WITHOUT_DATA], f"{wanting} choose coefficients by unlabelled data, and none was given (--data)."
    return METHODS[Recipe.method], ""


def _options(method: Method, preset: str | None, tasks: Sequence[Task]) -> dict[str, Any]:
    """The options that are worth writing out, with their values."""
    values = method.resolved({} if preset is None else {"recipe": preset}, [task.name for task in tasks])
    written: dict[str, Any] = {name: getattr(values, name) for name in ("steps", "lr") if name in method.option_names}
    if method.name == WITHOUT_DATA:
        written[str(method.tuned)] = 1.0 if len(tasks) == 1 else 0.4 if len(tasks) <= FEW_TASKS else 1 / len(tasks)
    return written


def _measured(base: Base, adapted: Sequence[str], method: Method, options: dict[str, Any]) -> list[str]:
    """Paths of the linears whose input is measured; where none of the family's carries an adapter, ``options`` gets the
    names of those that do.
    """
    if base.family is None or "score_modules" not in method.option_names:
        return []
    try:
        return scored_paths(base.family, base.model, adapted, None, "last_quarter")
    except ValueError:
        options["score_modules"] = sorted({path.rpartition(".")[2] for path in adapted})
        return scored_paths(base.family, base.model, adapted, options["score_modules"], "last_quarter")


def _samples(data: Mapping[str, Data], options: Mapping[str, Any], batch_size: int) -> int:
    """As many as the steps use, unless that is many."""
    if not any(one.raw for one in data.values()):
        return 0
    usual = DataSettings.samples or 0
    return min(usual, options["steps"] * batch_size) if "steps" in options else usual


def _heads(task: Task, model: nn.Module) -> list[str]:
    """Modules trained in full that are the task's own: behind the part of the model that all classes share, or a
    classifier within it that the model points out.
    """
    if output_embeddings(model) is not None:
        # What a language model has no place for, as the score of a classifier that was trained on it.
        there = {path for path, _ in model.named_modules()}
        return [path for path in task.whole if path not in there]
    trunk = trunk_of(model)
    pointed_out = {id(module) for part in classifiers(model) for module in part.modules()}
    shared = {path for path, module in trunk.named_modules() if id(module) not in pointed_out}
    where = next((path for path, module in model.named_modules() if path and module is trunk), None)
    prefix = f"{getattr(model, 'base_model_prefix', '') if where is None else where}."
    return [path for path in task.whole if path.removeprefix(prefix) not in shared]


def _other_bases(tasks: Sequence[Task], base: Base) -> list[str]:
    """Adapters that name another base than the one that they are merged on."""
    own = {base.source, str(getattr(base.model.config, "_name_or_path", "")), base.source.rsplit("/", 1)[-1]}
    by_name: dict[str, list[str]] = {}
    for task in tasks:
        named = task.outline.base_model
        if named and named not in own and Path(named).name not in own and os.path.abspath(named) not in own:
            by_name.setdefault(named, []).append(task.name)
    return [
        f"{', '.join(names)}: trained on {named}, by the adapter's own word, and not on {base.source}; if these are "
        "two models, the merge is worth nothing"
        for named, names in by_name.items()
    ]


def _partly(adapters: Mapping[str, Adapter], linears: Mapping[str, Any]) -> list[str]:
    """Adapters that leave out modules which others touch."""
    return [
        f"{task}: touches {len(adapter.factors)} of the {len(linears)} modules; its coefficient is 0 in the others"
        for task, adapter in adapters.items()
        if len(adapter.factors) < len(linears)
    ]


def _forecast(
    base: Base, adapters: Mapping[str, Adapter], data: Mapping[str, Data], method: Method, options: Mapping[str, Any]
) -> tuple[float | None, float | None]:
    """Bytes and operations of a step on one device; None where there is no formula."""
    drawn: dict[str, Mapping[str, Tensor]] = {task: one.batch for task, one in data.items() if one.batch is not None}
    if "gradients" not in method.needs or base.quantised is not None or len(drawn) != len(adapters):
        return None, None
    device = device_of("auto")
    try:
        resolved = method.resolved(options, list(adapters), base.model)
        work = work_of(base.model, adapters, drawn, resolved, device=device)
    except NoFormula:
        return None, None
    work = as_run_on(device, work, resolved.batch_tasks)
    return memory(work).total, operations(work)
