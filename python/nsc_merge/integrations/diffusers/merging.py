"""Merging of adapters that are loaded in a pipeline, in every model of it that holds some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nsc_merge.integrations import peft
from nsc_merge.integrations.diffusers.pipelines import (
    adapted,
    as_weighted,
    check_in_memory,
    check_runs,
    check_weights,
    held_in,
    loaded_in,
)
from nsc_merge.integrations.diffusers.recording import Calls, PipelineData
from nsc_merge.integrations.peft import Merged, NothingToRegister
from nsc_merge.methods import method_of
from nsc_merge.results.merged_model import part_of_pipeline


def merge(
    pipe: Any,
    adapters: Sequence[str],
    weights: Any = None,
    adapter_name: str = "merged",
    method: str = "task_arithmetic",
    output: str | None = None,
    rank: int | None = None,
    data: PipelineData | None = None,
    **options: Any,
) -> dict[str, Merged]:
    """Merge loaded adapters into a new one in every model of a pipeline that holds some of them.

    ``pipe.set_adapters(adapter_name)`` then gives, by task arithmetic, what ``pipe.set_adapters(adapters, weights)``
    does, at the cost of one adapter. The new one is registered as :func:`nsc_merge.integrations.peft.merge` says, and
    not activated; active adapters and their weights stay as they are.

    Args:
        pipe: a pipeline of diffusers with the adapters loaded.
        adapters: their names; a model may lack some, or all.
        weights: as ``pipe.set_adapters`` takes them: a number, or a list with a number, None, or a dictionary by
            component and block, for each adapter; 1 each when None. Each is a part of its adapter's scaling, for every
            method; what an adapter was last activated with plays no role.
        adapter_name: of the new adapter.
        method: as ``nsc-merge methods`` lists them, of those that give one update for all tasks.
        output: as ``rank``, in :func:`nsc_merge.integrations.peft.merge`; methods whose update is of full rank need a
            rank.
        rank: see ``output``.
        data: adapter -> component -> calls of its model, as :func:`calibration_data` records them; for methods that
            need data: ``"nsc"``, ``"match"``, ``"distill"``, ``"regmean"``, ``"fisher"``.
        options: of the method. Task arithmetic's ``scale`` is 1 here if none is given, and what models predict is taken
            for values (``likelihood="gaussian"``).

    Returns:
        Component -> what was registered there; none where the update is zero, as of text encoders with a weight of 0.

    Raises:
        TypeError, ValueError: naming the argument, what was found and what was expected; no model then has the new
            adapter.
    """
    models = adapted(pipe)
    check_in_memory(models)
    held = held_in(models)
    names = _checked_names(adapters, weights, adapter_name, loaded_in(held))
    chosen = method_of(method)
    present = {part: own for part in models if (own := [name for name in names if name in held[part]])}
    calls = _of_components(data, present, method) if chosen.needs else dict.fromkeys(present)
    if chosen.needs:
        check_runs({part: models[part] for part in present})
    # A coefficient for each task is what the weights are already.
    options = {"scale": 1.0, **options} if chosen.weighted == "scale" else options
    options = {"likelihood": "gaussian", **options} if "likelihood" in chosen.option_names else options
    merged: dict[str, Merged] = {}
    nothing: list[NothingToRegister] = []
    with as_weighted(pipe, models, names, weights):
        try:
            for component, own in present.items():
                form = {"data": calls[component], "method": method, "output": output, "rank": rank}
                form |= _compared(models[component], own) if "outputs" in chosen.option_names else {}
                try:
                    merged[component] = peft.merge(models[component], own, None, adapter_name, **{**form, **options})
                except NothingToRegister as error:
                    nothing.append(error)
            if not merged:
                raise nothing[0]
        except BaseException:
            for component in merged:
                peft.remove(models[component], adapter_name)
            raise
    return merged


def _checked_names(adapters: Sequence[str], weights: Any, adapter_name: str, known: list[str]) -> list[str]:
    names = [adapters] if isinstance(adapters, str) else list(adapters)
    if not names or len(set(names)) < len(names) or set(names) - set(known):
        raise ValueError(f"adapters: expected different names among {known}, found {adapters!r}")
    if adapter_name in known:
        raise ValueError(f"adapter_name: {adapter_name!r} is already loaded; loaded are {known}")
    check_weights(weights, names)
    return names


def _of_components(data: Any, present: dict[str, list[str]], method: str) -> dict[str, dict[str, Calls]]:
    """Component -> adapter -> calls of its model."""
    way = "nsc_merge.integrations.diffusers.calibration_data(pipe, prompts) records it"
    if not isinstance(data, Mapping):
        raise ValueError(f"data: method {method!r} needs some, found {type(data).__name__}; {way}")
    found: dict[str, dict[str, Calls]] = {}
    for component, names in present.items():
        own = {name: calls for name in names if (calls := dict(data.get(name) or {}).get(component))}
        if lacking := [name for name in names if name not in own]:
            raise ValueError(
                f"data: method {method!r} needs calls of {component} for each of {names}, found none for {lacking}; "
                f"{way}, if the pipeline calls it: not text encoders where prompts are given as embeddings"
            )
        found[component] = own
    return found


def _compared(model: nn.Module, names: list[str]) -> dict[str, Any]:
    """What a method that compares predictions takes for those of a text encoder, or of what stands between it and the
    denoiser, which predict nothing.
    """
    return {} if part_of_pipeline(model) else {"outputs": dict.fromkeys(names, _embedded)}


def _embedded(model: nn.Module, call: Mapping[str, Any]) -> Tensor:
    """What pipelines read of a text encoder, ``[N, T, d]``: its last hidden states, or the last but one where they ask
    for all of them, and after these what it makes of the whole prompt, if that is as wide. LTX-2's connectors give one
    for the video and one for its sound.
    """
    found = model(**call)
    if isinstance(found, tuple):
        video, sound = found[:2]
        return torch.cat([video, sound], 1) if video.shape[2] == sound.shape[2] else video
    hidden = getattr(found, "hidden_states", None)
    read: Tensor = found.last_hidden_state if hidden is None else hidden[-2]
    pooled = getattr(found, "text_embeds", None)
    if pooled is None or pooled.shape[-1] != read.shape[-1]:
        return read
    return torch.cat([read, pooled[:, None]], 1)
