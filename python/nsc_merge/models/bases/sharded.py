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
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nsc_merge.models.bases.architecture import Architecture, outline_of
from nsc_merge.models.bases.placement import Placement
from nsc_merge.models.block_finding import blocks_of
from nsc_merge.models.families import find_family
from nsc_merge.models.forward_contexts import with_forward
from nsc_merge.processes.group import current


def sharding(architecture: Architecture, placement: Placement) -> dict[str, Any]:
    """What ``from_pretrained`` takes for a model in shards over the processes that share the work; nothing where one
    process is alone.

    Raises:
        ValueError: if ``placement`` says otherwise where the model is: each process has a GPU of its own, or all are on
            the CPU; or if the model cannot be in shards.
    """
    from transformers.distributed import DistributedConfig

    size = current().size
    if size == 1:
        return {}
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if placement.device not in ("auto", kind):
        raise ValueError(f"device: expected auto or {kind} in {size} processes, found {placement.device!r}")
    return {"config": _with_blocks(architecture), "distributed_config": DistributedConfig(fsdp_size=size)}


def settled(model: nn.Module) -> nn.Module:
    """``model`` as it was loaded in shards: no gradients of weights, and nothing of it is left in files that may be cut
    short.

    Raises:
        ValueError: if some weights are not those of the files.
    """
    _check_conversions(model)
    model.requires_grad_(False)
    if next(model.parameters()).device.type == "cpu":
        # Out of the files, which the shards may be views of.
        model._apply(torch.clone)
    config: Any = model.config
    # Whoever saves the model would wait for the others.
    config.distributed_config = None
    vars(config).pop("base_model_fsdp_plan", None)
    return model


def _check_conversions(model: nn.Module) -> None:
    """Refuse weights of which transformers joined, divided or permuted rows as it read them: it does so with a share of
    the rows, which is no share of what they make.
    """
    from transformers.core_model_loading import MergeModulelist, Transpose

    for conversion in getattr(model, "_weight_conversions", ()):
        for one in getattr(conversion, "operations", ()):
            dims = (one.dim0, one.dim1) if isinstance(one, Transpose) else (getattr(one, "dim", 0),)
            if 0 in dims and not isinstance(one, MergeModulelist):
                raise ValueError(
                    f"model: its files hold {', '.join(conversion.source_patterns)} in the place of "
                    f"{', '.join(conversion.target_patterns)}, which transformers reads wrongly in several processes "
                    f"({type(one).__name__}); expected one process, with device_map where no device holds the model"
                )


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


def gathers_for_backward(model: nn.Module, path: str, value: Tensor) -> None:
    """Have the weights of the unit around the module at a path made whole again when a gradient reaches ``value``, made
    inside of it: FSDP2 sees a backward only where it passes the unit's output.
    """
    unit: Any = unit_of(model, path) if value.requires_grad else None
    if unit is not None:
        value.register_hook(lambda _: unit.unshard())


def has_units_inside(module: nn.Module) -> bool:
    """Whether processes meet inside of ``module``, so that none of them may leave its forward out by itself."""
    return any(is_unit(part) for part in module.modules() if part is not module)


def output_of(model: nn.Module, part: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """What ``part`` returns on ``inputs`` of ``model``, which it must take; run as the whole model where that is in
    shards, since nobody else would gather what lies in no other unit.
    """
    if not is_unit(model) or part is model:
        return part(**inputs)
    with with_forward(model, part.__call__):
        return model(**inputs)


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

    Raises:
        ValueError: if the model cannot be in shards.
    """
    config = copy.deepcopy(architecture.config)
    model: Any = outline_of(replace(architecture, config=config))
    scalars = [name for name, value in model.named_parameters() if not value.dim()]
    if scalars:
        raise ValueError(
            f"model: {type(model).__name__} has parameters that are one number ({', '.join(scalars[:3])}), which FSDP2 "
            "cannot divide among processes; expected one process"
        )
    family = find_family(model)
    if family is None:
        return config
    base = model.base_model
    prefix = next(f"{path}." if path else "" for path, module in model.named_modules() if module is base)
    blocks = {re.sub(r"\.\d+$", ".*", path) for path in blocks_of(model, family.block)}
    unknown = [path.removeprefix(prefix) for path in sorted(blocks - set(model._fsdp_plan or {}))]
    plan = config.base_model_fsdp_plan or {}
    config.base_model_fsdp_plan = {**plan, **dict.fromkeys(unknown, "free_full_weight")}
    return config
