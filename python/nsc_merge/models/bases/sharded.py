"""A base model in shards: every process holds a part of each weight, and gathers a block's whenever it runs (FSDP2,
``torch.distributed.fsdp.fully_shard``).

transformers shards and reads: each process reads its own part of every tensor, no more, with all its renamings of older
checkpoints. What is here says where to cut, and what a model in shards can and cannot do.

A model in shards runs from its root only: weights in no block are gathered there, and all processes must run the same
blocks in the same order, forward and backward.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from nsc_merge.models.bases.architecture import Architecture
from nsc_merge.models.bases.placement import Placement
from nsc_merge.models.families import find_family
from nsc_merge.models.forward_contexts import ended_by
from nsc_merge.processes.group import current


def sharding(architecture: Architecture, placement: Placement) -> dict[str, Any]:
    """What ``from_pretrained`` takes for a model in shards over the processes that share the work; nothing where one
    process is alone.

    Raises:
        ValueError: if ``placement`` says otherwise where the model is: each process has a GPU of its own, or all are on
            the CPU.
    """
    from transformers.distributed import DistributedConfig

    size = current().size
    if size == 1:
        return {}
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if placement.device not in ("auto", kind):
        raise ValueError(f"device: expected auto or {kind} in {size} processes, found {placement.device!r}")
    if placement.device_map is not None or placement.quantization is not None:
        named = "device_map" if placement.device_map is not None else "quantization"
        raise ValueError(f"{named}: expected none in {size} processes, which hold the model in shards; use one process")
    return {"config": _with_blocks(architecture), "distributed_config": DistributedConfig(fsdp_size=size)}


def settled(model: nn.Module) -> nn.Module:
    """``model`` as it was loaded in shards: no gradients of weights, and nothing of it is left in files that may be cut
    short.
    """
    model.requires_grad_(False)
    if next(model.parameters()).device.type == "cpu":
        # Out of the files, which the shards may be views of.
        model._apply(torch.clone)
    config: Any = model.config
    # Whoever saves the model would wait for the others.
    config.distributed_config = None
    vars(config).pop("base_model_fsdp_plan", None)
    return model


def is_unit(module: nn.Module) -> bool:
    """Whether FSDP2 gathers weights when ``module`` is called."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def unit_of(model: nn.Module, path: str) -> nn.Module | None:
    """The unit that gathers the weights of the module at a path, if it lies in one: the innermost around it."""
    parts = path.split(".")
    around = (model.get_submodule(".".join(parts[:count])) for count in range(len(parts), -1, -1))
    return next((module for module in around if is_unit(module)), None)


def gather_for_backward(model: nn.Module, path: str) -> None:
    """Make the weights whole again of the unit around the module at a path, for a backward that begins inside of it:
    FSDP2 sees one only where it passes the unit's output.
    """
    unit: Any = unit_of(model, path)
    if unit is not None:
        unit.unshard()


def has_units_inside(module: nn.Module) -> bool:
    """Whether processes meet inside of ``module``, so that none of them may leave its forward out by itself."""
    return any(is_unit(part) for part in module.modules() if part is not module)


class _Reached(Exception):
    """No error but a signal: the part has its output."""


def output_of(model: nn.Module, part: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """What ``part`` returns when ``model`` runs on ``inputs``, no further than that; where the weights are whole,
    ``part`` is called by itself, so it must take the inputs of the model.

    A part of a model in shards cannot be called by itself: the root would not gather what lies in no other unit.
    """
    if not is_unit(model) or part is model:
        return part(**inputs)
    found = []

    def reached(_: nn.Module, __: Any, output: Any) -> None:
        found.append(output)
        raise _Reached

    hook = part.register_forward_hook(reached)
    try:
        with ended_by(model, _Reached):
            model(**inputs)
    finally:
        hook.remove()
    return found[0]


def reshard(model: nn.Module) -> None:
    """Let go of weights gathered by a forward that did not reach its end."""
    for module in model.modules():
        if is_unit(module):
            unit: Any = module
            unit.reshard()


def own_class(model: nn.Module) -> type[nn.Module]:
    """The class that a model has in transformers: in shards it is of another, made for the purpose."""
    kind = type(model)
    return kind.__mro__[2] if is_unit(model) else kind


def class_name(model: nn.Module) -> str:
    """Of :func:`own_class`."""
    return own_class(model).__name__


def _with_blocks(architecture: Architecture) -> Any:
    """The configuration, in which every block of the model's family is a unit; transformers knows those of decoders.

    What is in no unit, such as LLaVA's vision tower, is gathered at the root for the whole of a step.
    """
    config = copy.deepcopy(architecture.config)
    kind = architecture.kind
    with torch.device("meta"):
        model = kind(config) if issubclass(kind, nn.Module) else kind.from_config(config)
    family = find_family(model)
    if family is None:
        return config
    base = model.base_model
    prefix = next(f"{path}." if path else "" for path, module in model.named_modules() if module is base)
    blocks = {
        re.sub(r"\.\d+$", ".*", path)
        for path, _ in model.named_modules()
        if (match := re.search(family.block, f"{path}.")) is not None and match.end() == len(path) + 1
    }
    unknown = [path.removeprefix(prefix) for path in sorted(blocks - set(model._fsdp_plan or {}))]
    plan = config.base_model_fsdp_plan or {}
    config.base_model_fsdp_plan = {**plan, **dict.fromkeys(unknown, "free_full_weight")}
    return config
