"""``nsc-merge run --dry-run``: what a merge would do, measured over a few real steps."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

from torch import nn

from nsc_merge.adapters import Adapter
from nsc_merge.calibration.batch_files import Batches
from nsc_merge.calibration.batch_summary import summary
from nsc_merge.methods import Problem, method_of
from nsc_merge.models.attachment import measurable, merged_linears
from nsc_merge.models.bases.quantised import activations_of
from nsc_merge.models.bases.sharded import class_name
from nsc_merge.models.bases.stored_weights import input_device
from nsc_merge.models.families import FAMILIES, family_of, family_said
from nsc_merge.models.fitting import absent
from nsc_merge.models.merged.matrices import Matrix
from nsc_merge.processes.group import current
from nsc_merge.recipes.forecast.prospect import prospect_of
from nsc_merge.recipes.inputs import read_inputs
from nsc_merge.recipes.merge_recipe import Recipe
from nsc_merge.recipes.preflight import check, options_at_fault, state_file
from nsc_merge.recipes.run import Log, load, merge_loaded, remarks_on
from nsc_merge.utils.memory import peak_bytes, reset_peak, size_said

# The first step warms caches up and finds out which coefficients are dead.
_DRY_STEPS = 3
# Characters of a sample.
_SHOWN = 100


def plan(recipe: Recipe, log: Log, *, resume: bool = False) -> dict[str, Any]:
    """Load everything, check coverage, time a few real steps, and write nothing; of a merge that does not fit by
    formula, only what it and other ways of holding the base would take.

    The estimate is of the merge alone: loading and saving come on top.

    Raises:
        RecipeError, TypeError, ValueError, RuntimeError, OSError: as :func:`run`.
    """
    with current().agreeing():
        check(recipe, resume=resume)
    inputs = read_inputs(recipe)
    prospect = prospect_of(recipe, inputs)
    known: dict[str, Any] = {"method": recipe.method, "out": str(recipe.out), "formats": list(recipe.formats)}
    known |= {"data": {task: _data(batches) for task, batches in inputs[1].items()}, "prospect": prospect}
    # All try, or none: those on a smaller machine would be waited for.
    if current().any(prospect is not None and not prospect["ways"][prospect["way"]]["fits"]):
        return known
    model, adapters, calibration = load(recipe, log, inputs)
    document = {**_loaded(recipe, model, adapters, calibration), **known}
    method = method_of(recipe.method)
    if method.check is not None:
        with options_at_fault(recipe):
            method.check(Problem(model, adapters, calibration), recipe.options)
    if "steps" in method.option_names:
        document |= _tried(recipe, model, adapters, calibration, document)
    return document


def _loaded(
    recipe: Recipe, model: nn.Module, adapters: dict[str, Adapter], calibration: dict[str, Batches]
) -> dict[str, Any]:
    """What was loaded: sizes, and what a person should know of it."""
    linears = merged_linears(model, adapters)
    sizes = {
        path: linear.weight.dtype.itemsize
        if isinstance(linear, Matrix)
        else activations_of(model, path, model.get_submodule(path))[0].itemsize
        for path, linear in linears.items()
    }
    packed = sum(
        factor.rank * sum(factor.A.shape[1:] + factor.B.shape[:1]) * sizes[path]
        for adapter in adapters.values()
        for path, factor in adapter.factors.items()
    )
    found: dict[str, Any] = {
        "model": class_name(model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": str(input_device(model)),
        "adapted_modules": len(linears),
        "tasks": {task: _described(adapter) for task, adapter in adapters.items()},
        "batches": {task: len(batches) for task, batches in calibration.items()},
        "absent": absent(adapters),
        "remarks": [*remarks_on(model, adapters), *_unfinished(recipe)],
        "weights_bytes": sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
        "adapters_bytes": packed,
    }
    if "family" in method_of(recipe.method).option_names:
        family = family_of(model, measurable(linears, adapters), recipe.options.get("family"))
        # What is listed is known from papers; what was found deserves a look.
        if family not in FAMILIES:
            found["family"] = family_said(family)
    return found


def _tried(
    recipe: Recipe, model: nn.Module, adapters: dict[str, Adapter], batches: dict[str, Batches], said: dict[str, Any]
) -> dict[str, Any]:
    """What a few steps show, in the place of what was ``said`` and beside it."""
    with options_at_fault(recipe):
        steps = method_of(recipe.method).resolved(recipe.options, list(recipe.adapters), model).steps
    recipe = replace(recipe, options={**recipe.options, "steps": min(steps, _DRY_STEPS)})
    on_gpu = next(model.parameters()).is_cuda
    reset_peak(model)
    result = merge_loaded(recipe, model, adapters, batches, {"progress": False})
    seconds = statistics.median(entry["seconds"] for entry in result.history[-2:])
    if (prospect := said["prospect"]) is not None:
        # What was measured here, for the operations of the other ways.
        rate = prospect["ways"][prospect["way"]]["operations"] / seconds
        prospect = {**prospect, "operations_per_second": rate}
    return {
        "prospect": prospect,
        "remarks": [*said["remarks"], *result.notes],
        "steps": steps,
        "steps_tried": len(result.history),
        "options": {**{key: value for key, value in result.options.items() if key != "scored"}, "steps": steps},
        "measured_modules": list(result.options.get("scored", ())),
        "dead": result.dead,
        "seconds_per_step": seconds,
        "seconds": seconds * steps,
        "peak_bytes": peak_bytes(model),
        "peak_of": "of the GPU, at the peak of the steps tried" if on_gpu else "of the process, loading included",
    }


def render_plan(plan: dict[str, Any]) -> str:
    """The plan for a terminal."""
    output = f"output    {plan['out']}: {', '.join(plan['formats'])} (nothing is written by a dry run)"
    if "model" not in plan:
        note = "note      nothing was loaded or tried, since it does not fit"
        return "\n".join([*_data_lines(plan["data"]), *_prospect_lines(plan["prospect"]), note, output])
    lines = [
        f"model     {plan['model']}, {plan['dtype']} on {plan['device']}, {size_said(plan['weights_bytes'])}",
        f"adapters  {len(plan['tasks'])} on {plan['adapted_modules']} modules, {size_said(plan['adapters_bytes'])}",
    ]
    for task, adapter in plan["tasks"].items():
        batches = f", {plan['batches'][task]} batches" if task in plan["batches"] else ""
        heads = f", {adapter['heads']} tensors of heads" if adapter["heads"] else ""
        shared = f", {adapter['shared']} shared modules" if adapter["shared"] else ""
        ranks = ", ".join(map(str, adapter["ranks"]))
        lines.append(f"  {task}: {adapter['modules']} modules, rank {ranks}{shared}{heads}{batches}")
    lines += _data_lines(plan["data"])
    lines += [f"note      {' '.join(remark.split())}" for remark in plan["remarks"]]
    if "family" in plan:
        lines.append(f"family    {plan['family']}")
    if "steps" in plan:
        measured, dead = plan["measured_modules"], sum(len(tasks) for tasks in plan["dead"].values())
        why = ""
        if measured:
            which = measured[0] if len(measured) == 1 else f"{measured[0]} to {measured[-1]}"
            lines.append(f"measured  {len(measured)} module{'s' * (len(measured) > 1)}: {which}")
            why = "come after them and "
        lines += [
            f"dead      {dead} coefficients {why}receive no gradient",
            f"time      {plan['steps']} steps of {plan['seconds_per_step']:.3g} s: {_clock(plan['seconds'])}",
            f"memory    {size_said(plan['peak_bytes'])} {plan['peak_of']}",
        ]
    if plan["prospect"] is not None:
        lines += _prospect_lines(plan["prospect"])
    return "\n".join([*lines, output])


def _data(batches: Batches) -> dict[str, Any]:
    """What a task is calibrated on: so much that a person sees whether it is what was meant."""
    found = summary(batches)
    kept = {"first": batches.first} if batches.first else {}
    digests = {"sha256": batches.sha256["samples"]} if "samples" in batches.sha256 else {}
    return {**vars(found), **kept, **digests}


def _data_lines(data: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for task, found in data.items():
        said = f"{found['samples']} samples in {found['batches']} batches"
        if found["tokens"]:
            said += f", {found['tokens']:.0f} tokens a batch and {found['padding']:.0%} padding"
        if "sha256" in found:
            said += f", hash {found['sha256'][:12]}"
        lines.append(f"data      {task}: {said}")
        if "first" in found:
            lines.append(f"  first: {' '.join(found['first'].split())[:_SHOWN]!r}")
    return lines


def _prospect_lines(prospect: dict[str, Any]) -> list[str]:
    """What the recipe's own way of holding the base takes by formula, and what others would."""
    own = prospect["ways"][prospect["way"]]
    parts = ", ".join(f"{name} {size_said(count)}" for name, count in own["parts"].items())
    there = f" of {size_said(prospect['device_bytes'])}" if prospect["device_bytes"] else ""
    fits = "fits" if own["fits"] else "does not fit"
    lines = [f"estimate  {own['way']}: {size_said(own['bytes'])}{there} ({parts}): {fits}"]
    for way in prospect["ways"]:
        said = [f"{size_said(way['bytes'])} a device" + ("" if way["fits"] else ", which does not fit")]
        if "operations_per_second" in prospect:
            said.append(f"{way['operations'] / prospect['operations_per_second']:.3g} s a step to compute")
        if way["received"]:
            said.append(f"{size_said(way['received'])} received")
        if way["loaded"]:
            said.append(f"{size_said(way['loaded'])} from the host")
        if way is not own:
            lines.append(f"  {way['way']}: {'; '.join(said)}")
    return lines


def _unfinished(recipe: Recipe) -> list[str]:
    state = state_file(recipe)
    if not method_of(recipe.method).resumable or not state.is_file():
        return []
    return [f"{state} is the state of an unfinished run: --resume goes on from it; to start anew, remove the file"]


def _described(adapter: Adapter) -> dict[str, Any]:
    factors = adapter.factors.values()
    return {
        "source": str(adapter.source),
        "modules": sum(1 for factor in factors if factor.rank),
        "ranks": sorted({factor.rank for factor in factors if factor.rank}),
        "shared": sum(1 for factor in factors if factor.dense is not None),
        "heads": len(adapter.trained),
        "notes": list(adapter.notes),
    }


def _clock(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
