"""``nsc-merge run``: from a recipe to a folder."""

from __future__ import annotations

import shlex
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nsc_merge.adapters import Adapter
from nsc_merge.api import merge
from nsc_merge.calibration.batch_files import Batches, check_names, check_tokens
from nsc_merge.calibration.batch_summary import summary
from nsc_merge.methods import METHODS, method_of
from nsc_merge.models.bases.loading import base_files, commit_of, load_model
from nsc_merge.models.bases.placement import Placement
from nsc_merge.models.fitting import absent, fit
from nsc_merge.models.own_base import own_base
from nsc_merge.models.vocabulary import with_vocabulary
from nsc_merge.processes.group import current
from nsc_merge.recipes.inputs import Inputs, read_inputs
from nsc_merge.recipes.merge_recipe import Recipe, RecipeError
from nsc_merge.recipes.preflight import check, options_at_fault, state_file
from nsc_merge.results.beside.heads import heads_of, with_head
from nsc_merge.results.beside.next_commands import next_commands
from nsc_merge.results.beside.preprocessing import preprocessing_notes
from nsc_merge.results.beside.serving_notes import serving_notes
from nsc_merge.results.layout import RECORD
from nsc_merge.results.result import MergeResult
from nsc_merge.results.saving import save
from nsc_merge.utils.atomic_folder import only_run
from nsc_merge.utils.provenance import modified, quick, whole

Log = Callable[[str], None]


def shares_work(recipe: Recipe) -> bool:
    """Whether a merge is work for several processes; without data it is one's."""
    return recipe.method not in METHODS or "data" in METHODS[recipe.method].needs


def run(recipe: Recipe, *, resume: bool, log: Log) -> dict[str, Any] | None:
    """Merge and save; returns a summary, in the first of the processes that share the work. The others return None as
    soon as they have done their part: the first saves by itself.

    Ctrl-C leaves the state in :func:`state_file` if the method keeps one; ``resume`` goes on from there, or starts if
    it is missing.

    Raises:
        RecipeError: if the recipe is at fault, if there is a state and no ``resume``, or if the method has no state to
            resume from.
        BlockingIOError: if another run into the same folder is at work, with the state of which this one's would mix.
        TypeError, ValueError, RuntimeError, OSError: if what the recipe names is.
    """
    started, group = time.perf_counter(), current()
    with group.agreeing():
        check(recipe, resume=resume)
    with ExitStack() as held:
        with group.agreeing():
            if group.is_main and method_of(recipe.method).resumable:
                try:
                    held.enter_context(only_run(recipe.out))
                except OSError as error:
                    raise type(error)(f"output.dir{str(error).removeprefix('out')}") from None
        return _run(recipe, started, resume=resume, log=log)


def _run(recipe: Recipe, started: float, *, resume: bool, log: Log) -> dict[str, Any] | None:
    group = current()
    options = _options_of_state(recipe, resume=resume, log=log)
    model, adapters, calibration = load(recipe, log)
    for line in remarks_on(model, adapters):
        log(line)
    if options:
        options["state_of"] = _sources(recipe, model, calibration)
    _check_whole(recipe, adapters)
    result = merge_loaded(recipe, model, adapters, calibration, options)
    if not group.is_main:
        return None
    if group.size > 1 and recipe.local:
        # In shards the base is whole in no process: what is written of it comes from its files.
        result = replace(result, model=_base(recipe, replace(recipe.placement, numbers=False)))
    if result.course:
        log(result.course)
    dead = sum(len(tasks) for tasks in result.dead.values())
    if dead:
        log(f"{dead} coefficients received no gradient: nothing measured depends on them")
    formats = [name for name in recipe.formats if name != "coefficients"]
    if result.coefficients:
        formats.insert(0, "coefficients")
    files = save(
        result,
        recipe.out,
        formats,
        rank=recipe.rank,
        max_shard_size=recipe.max_shard_size,
        plots=recipe.plots,
        dequantize=recipe.dequantize,
        head=recipe.head,
        labels=recipe.labels or None,
    )
    if options:
        state_file(recipe).unlink(missing_ok=True)
    pushed = {} if recipe.push_to_hub is None else {"pushed": _push(recipe, log)}
    return {
        "out": str(recipe.out),
        "formats": formats,
        "steps": len(result.history),
        "seconds": round(time.perf_counter() - started, 2),
        "processes": group.size,
        "objective": result.objective,
        "dead": dead,
        "files": files,
        "next": next_commands(result, recipe.out, files, pushed=bool(pushed)),
        **pushed,
        **_about_formats(result, formats, recipe.rank),
    }


def _options_of_state(recipe: Recipe, *, resume: bool, log: Log) -> dict[str, Any]:
    """Where the method keeps its state and what it goes on from; empty for methods that take no steps."""
    state = state_file(recipe)
    unfinished = current().share([state.is_file()])
    if len(set(unfinished)) > 1:
        raise OSError(f"output.dir: expected a folder that all processes see, found {state} in some of them only")
    if not method_of(recipe.method).resumable:
        return {}
    if resume and unfinished[0]:
        log(f"resuming from {state}")
        return {"state_to": state, "resume_from": state}
    if resume:
        log(f"nothing to resume: {state} is missing, starting anew")
    elif unfinished[0]:
        raise RecipeError(
            f"output.dir: {state} is the state of an unfinished run: --resume goes on from it; to start anew, "
            "remove the file"
        )
    return {"state_to": state}


def _about_formats(result: MergeResult, formats: Sequence[str], rank: int | None) -> dict[str, Any]:
    """What serves the files that were written, and how far a truncated adapter is from the merge."""
    if not {"lora", "model"} & {*formats}:
        return {}
    if "lora" not in formats:
        return {"serving": preprocessing_notes(result)}
    # There are none where adapters trained linears in full only.
    errors = [] if rank is None else _truncation(result, rank)
    truncation = {"truncation": {"mean": statistics.mean(errors), "max": max(errors)}} if errors else {}
    return {"serving": [*serving_notes(result, rank), *preprocessing_notes(result)], **truncation}


def _push(recipe: Recipe, log: Log) -> str:
    """Upload what was written, which stays where it is whatever the hub says."""
    from nsc_merge.results.hub import push

    repo = str(recipe.push_to_hub)
    log(f"uploading to {repo}")
    try:
        return push(recipe.out, repo, private=recipe.private)
    except (ValueError, OSError) as error:
        again = ["nsc-merge", "export", str(recipe.out), "--push-to-hub", repo, *["--private"] * recipe.private]
        raise OSError(f"{error}; the merge is in {recipe.out}: {shlex.join(again)} uploads it") from None


def _check_whole(recipe: Recipe, adapters: dict[str, Adapter]) -> None:
    """Refuse to write, in an adapter, modules that were trained in full: that takes the base's own weights, whole."""
    factors = [pair for adapter in adapters.values() for pair in adapter.factors.items()]
    paths = [path for path, factor in factors if factor.dense is not None]
    if paths and "lora" in recipe.formats and current().size > 1 and not recipe.local:
        raise RecipeError(
            f"output.formats: expected coefficients from {current().size} processes, which hold a base from the hub in "
            f"shards, where adapters trained modules in full ({paths[0]}), found lora; expected a base in a folder, or "
            "nsc-merge export of the finished merge"
        )


def _truncation(result: MergeResult, rank: int) -> list[float]:
    """Relative errors of every module, of every task if each has an update of its own."""
    merges = [result.for_task(task) for task in result.per_task] or [result]
    return [error for one in merges for error in one.rank_errors(rank).values()]


def load(
    recipe: Recipe, log: Log, inputs: Inputs | None = None
) -> tuple[nn.Module, dict[str, Adapter], dict[str, Batches]]:
    """The base model, the adapters fitted to it, and the calibration batches in its dtype.

    Args:
        recipe: what is merged.
        log: told what takes its time.
        inputs: of :func:`nsc_merge.recipes.inputs.read_inputs`, which is called for them otherwise.
    """
    if recipe.dropped:
        log(f"method={recipe.method}: dropped options of the recipe's own method: {', '.join(recipe.dropped)}")
    adapters, calibration = inputs or read_inputs(recipe)
    log(f"loading {recipe.model}" + ("" if recipe.local else " from the hub"))
    # What is computed from the adapters alone, and written, takes the base's numbers from its files one by one.
    needed = bool(method_of(recipe.method).needs) or recipe.added_tokens in ("mean", "first")
    model = _base(recipe, replace(recipe.placement, shards=current().size > 1, numbers=needed))
    with current().agreeing():
        for task, batches in calibration.items():
            check_names(batches, model, f"calibration.{task}")
    dtype = next(model.parameters()).dtype
    cast = {id(batches): batches.to(dtype) for batches in calibration.values()}
    calibration = {task: cast[id(batches)] for task, batches in calibration.items()}
    model, adapters = own_base(*with_vocabulary(model, adapters, recipe.added_tokens))
    with current().agreeing():
        for task, batches in calibration.items():
            check_tokens(batches, model, f"calibration.{task}")
    adapters = fit(adapters, model, recipe.shared_modules)
    _check_heads(recipe, model, adapters)
    return model, adapters, calibration


def _check_heads(recipe: Recipe, model: nn.Module, adapters: dict[str, Adapter]) -> None:
    """Refuse labels and a head that could not be written, before the work of a merge."""
    if not recipe.labels and recipe.head is None:
        return
    outline = MergeResult(recipe.method, {}, [], adapters, {}, {}, model)
    heads = heads_of(outline, recipe.labels)
    if recipe.head is None:
        return
    if recipe.head not in heads:
        raise RecipeError(
            f"output.head: expected a task whose adapter brought a head ({', '.join(heads) or 'none did'}), found "
            f"{recipe.head!r:.60}"
        )
    if current().size == 1:
        with_head(outline, recipe.head, heads[recipe.head])


def _base(recipe: Recipe, placement: Placement) -> nn.Module:
    return load_model(
        recipe.model,
        local=recipe.local,
        placement=placement,
        digest=whole if recipe.full_hash else quick,
        revision=recipe.revision,
        trust_remote_code=recipe.trust_remote_code,
    )


def _sources(recipe: Recipe, model: nn.Module, calibration: dict[str, Batches]) -> dict[str, Any]:
    """What a run is of, beside what the merge is given as arguments."""
    return {
        "model": _base_of(model) if recipe.local else f"{recipe.model}@{commit_of(model)}",
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        **({} if recipe.quantization is None else {"quantization": recipe.quantization}),
        "calibration": {task: batches.sha256 for task, batches in calibration.items()},
        "batch_size": recipe.batch_size,
        "shared_modules": recipe.shared_modules,
    }


def _base_of(model: nn.Module) -> dict[str, Any]:
    """The digests of a base's files, and of those that were not read in full also when they were written to: a state
    would go on with other numbers as if nothing had happened.
    """
    base = base_files(model)
    assert base is not None
    return {
        name: digest if isinstance(digest, str) else {**digest, "mtime_ns": modified(base.marks[name])}
        for name, digest in base.digests.items()
    }


def merge_loaded(
    recipe: Recipe,
    model: nn.Module,
    adapters: dict[str, Adapter],
    calibration: dict[str, Batches],
    options: dict[str, Any],
) -> MergeResult:
    """The merge that the recipe asks for, of what :func:`load` loaded; ``options`` beside those of the recipe."""

    with options_at_fault(recipe):
        result = merge(model, adapters, calibration or None, recipe.method, **{**recipe.options, **options})
    inputs = {
        **({"trust_remote_code": True} if recipe.trust_remote_code else {}),
        # Raw data with all settings that its samples follow from, whatever the defaults of another release are.
        "calibration": {
            task: place.as_written() if "samples" in calibration[task].sha256 else place.source
            for task, place in recipe.calibration.items()
        },
        "batch_size": recipe.batch_size,
        "shared_modules": recipe.shared_modules,
        "dora": recipe.dora,
        **({} if recipe.added_tokens == "refuse" else {"added_tokens": recipe.added_tokens}),
        **recipe.placement_keys,
        "full_hash": recipe.full_hash,
        **({"labels": {task: list(names) for task, names in recipe.labels.items()}} if recipe.labels else {}),
        "output": {
            "dir": str(recipe.out),
            "formats": list(recipe.formats),
            "rank": recipe.rank,
            "max_shard_size": recipe.max_shard_size,
            "dequantize": recipe.dequantize,
            "plots": recipe.plots,
            **({} if recipe.head is None else {"head": recipe.head}),
        },
        RECORD: {
            "sha256": {"calibration": {task: batches.sha256 for task, batches in calibration.items()}},
            "samples": {task: summary(batches).samples for task, batches in calibration.items()},
            "processes": current().size,
        },
    }
    return replace(result, inputs=inputs)


def remarks_on(model: nn.Module, adapters: dict[str, Adapter]) -> list[str]:
    """What a person should know before merging, one line each."""

    remarks = [f"{task}: {note}" for task, adapter in adapters.items() for note in adapter.notes]
    missing = absent(adapters)
    for task in adapters:
        paths = [path for path, tasks in missing.items() if task in tasks]
        if paths:
            more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
            remarks.append(f"{task}: coefficient 0 where it has no adapter: {', '.join(paths[:3])}{more}")
    first = next(model.parameters())
    if first.dtype is torch.float16 and first.device.type == "cpu":
        remarks.append("float16 is slow on the CPU: dtype=float32 takes twice the memory, a fraction of the time")
    bases = {adapter.base_model for adapter in adapters.values()}
    if len(bases) > 1:
        remarks.append(f"the adapters name different base models: {', '.join(sorted(map(str, bases)))}")
    return remarks
