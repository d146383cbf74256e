"""Whether a merge fits, where, and what other ways of holding its base would take, before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nsc_merge.adapters import Adapter, Factor
from nsc_merge.methods import method_of
from nsc_merge.models.attachment import adapted_linears
from nsc_merge.models.bases.architecture import architecture_of, outline_of, quantised_as
from nsc_merge.models.bases.placement import PLAIN, device_of
from nsc_merge.models.fitting import fit
from nsc_merge.processes.group import current
from nsc_merge.processes.launch import launched_here
from nsc_merge.recipes.forecast.estimate import STORED, Work, as_run, bytes_per_step, memory, operations
from nsc_merge.recipes.forecast.shapes import NoFormula, work_of
from nsc_merge.recipes.inputs import Inputs, read_inputs
from nsc_merge.recipes.merge_recipe import Recipe
from nsc_merge.utils.memory import free_memory, total_memory

RANKS = (2, 4, 8)


def prospect_of(recipe: Recipe, inputs: Inputs | None = None) -> dict[str, Any] | None:
    """What a step would take by formula, of the base's configuration and of adapters and batches alone.

    Args:
        recipe: of the merge.
        inputs: of :func:`nsc_merge.recipes.inputs.read_inputs`, which is called for them otherwise.

    Returns:
        ``device_bytes`` that there are, a share of them for each of the processes on one CPU; ``ways``, of each its
        name, bytes at most on a device and their parts, whether that is less than there is, operations of a step on
        each device, and bytes that it receives from others and loads from the host; and ``way``, the number of the
        recipe's own. None where there is no formula: for methods that measure no inputs, for unusual blocks, for bases
        quantised by others, and where loading would fail.
    """
    method = method_of(recipe.method)
    if "gradients" not in method.needs:
        return None
    device = device_of(recipe.device)
    try:
        model = _outline(recipe)
        found, calibration = inputs or read_inputs(recipe)
        adapters = fit({task: low_rank_alone(adapter) for task, adapter in found.items()}, model)
        drawn = {task: next(iter(batches)) for task, batches in calibration.items()}
        options = method.resolved(recipe.options, list(adapters), model)
        stored = STORED.get(recipe.quantization or "")
        work = work_of(model, adapters, drawn, options, stored, device)
        spare = work_of(model, adapters, drawn, replace(options, checkpointing=True), stored, device)
        coefficients = len(adapted_linears(model, adapters)) * len(adapters)
    except (NoFormula, ValueError, TypeError, OSError):
        # What is wrong with the recipe's files is said by those who read them in earnest.
        return None
    processes = current().size
    chosen = "device_map" if recipe.device_map is not None else _ranks(processes) if processes > 1 else "one device"
    settings: dict[str, tuple[Work, dict[str, Any]]] = {
        "one device": (work, {}),
        "checkpointing": (spare, {}),
        "device_map": (work, {"offloaded": True}),
        **{_ranks(number): (work, {"ranks": number}) for number in sorted({*RANKS, processes} - {1})},
    }
    if options.checkpointing:
        settings.pop("checkpointing")
    ways = []
    for name, (one, how) in settings.items():
        sharing = launched_here() if device.type == "cpu" and name == chosen else 1
        run = as_run_on(device, one, options.batch_tasks, sharing, **how)
        ways.append(_way(name, run, coefficients, total_memory(device) // sharing, **how))
    device_bytes = total_memory(device) // (launched_here() if device.type == "cpu" else 1)
    return {"device_bytes": device_bytes, "way": list(settings).index(chosen), "ways": ways}


def as_run_on(device: torch.device, work: Work, batch_tasks: bool | None, sharing: int = 1, **how: Any) -> Work:
    """The batches of all tasks in one pass, where they are run so: as the step decides, by what is free once the base
    is there; on a CPU no more than is taken for granted.
    """
    held = memory(work, **how)
    loaded = 0 if device.type == "cpu" else held.weights + held.adapters
    free = min(total_memory(device) // sharing - loaded, free_memory(device) / sharing)
    return as_run(work, batch_tasks, free, **how)


def _way(name: str, work: Work, coefficients: int, there: int, **how: Any) -> dict[str, Any]:
    held, moved = memory(work, **how), bytes_per_step(work, coefficients=coefficients, **how)
    done = work.recomputed() if how.get("offloaded") else work.divided(how.get("ranks", 1))
    return {
        "way": name,
        "bytes": held.total,
        "parts": vars(held),
        "fits": not there or held.total <= there,
        "operations": operations(done),
        "received": moved.received,
        "loaded": moved.loaded,
    }


def _ranks(number: int) -> str:
    return f"{number} ranks"


def _outline(recipe: Recipe) -> nn.Module:
    """The base model with shapes and dtypes, and no numbers."""
    architecture = architecture_of(
        recipe.model, local=recipe.local, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code
    )
    if quantised_as(architecture.config) is not None and recipe.quantization != PLAIN:
        raise NoFormula("how many bytes a base quantised by others takes stands in its files")
    return outline_of(architecture, recipe.dtype)


def low_rank_alone(adapter: Adapter) -> Adapter:
    """What of an adapter is fitted without the base's numbers: the low-rank updates, which are all that counts here."""
    low_rank = adapter.with_factors(lambda _, one: Factor(one.A, one.B, one.scaling))
    return replace(low_rank, trained={}, base_weights={})
