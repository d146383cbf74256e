"""The shapes of a step of NSC, for :mod:`nsc_merge.recipes.forecast.estimate`, read off model, adapters and batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nsc_merge.adapters import Adapter
from nsc_merge.models.attachment import adapted_linears, measurable
from nsc_merge.models.bases.stored_weights import FLOATS
from nsc_merge.models.block_finding import blocks_of
from nsc_merge.models.families import Family, family_of, scored_paths
from nsc_merge.models.merged.folded_linear import should_fold
from nsc_merge.models.merged.whole import Site
from nsc_merge.models.traits import input_embeddings, output_embeddings
from nsc_merge.recipes.forecast.estimate import LINEARS, Work, block

# Last part of a linear's path -> what it is in the block.
_ROLES = {
    **dict.fromkeys(("q_proj", "query"), "q"),
    **dict.fromkeys(("k_proj", "key"), "k"),
    **dict.fromkeys(("v_proj", "value"), "v"),
    **dict.fromkeys(("o_proj", "out_proj", "dense"), "o"),
    "gate_proj": "gate",
    **dict.fromkeys(("up_proj", "fc1"), "up"),
    **dict.fromkeys(("down_proj", "fc2"), "down"),
}


class NoFormula(Exception):
    """The formula is not about such a model, or such a method; the text says why."""


def work_of(
    model: nn.Module,
    adapters: Mapping[str, Adapter],
    drawn: Mapping[str, Mapping[str, Any]],
    options: Any,
    stored: float | None = None,
    device: torch.device | None = None,
) -> Work:
    """What a step of a merge takes that runs one batch after another; see
    :func:`nsc_merge.recipes.forecast.estimate.as_run`.

    Args:
        model: the base, on any device; of a model without numbers only shapes are read.
        adapters: task -> adapter, fitted to it.
        drawn: task -> the batch of one step.
        options: of the method.
        stored: bytes of a weight of a linear in a block where it is other than the model's; see
            :data:`nsc_merge.recipes.forecast.estimate.STORED`.
        device: that a model without numbers will be on.

    Raises:
        NoFormula: for methods that measure no inputs, and for blocks that are not those of a usual transformer.
    """
    if not hasattr(options, "score_modules"):
        raise NoFormula("memory and arithmetic of a step are known for methods that measure inputs")
    linears = adapted_linears(model, adapters)
    with_lora = measurable(linears, adapters)
    family = family_of(model, with_lora, getattr(options, "family", None))
    scored = scored_paths(family, model, with_lora, options.score_modules, options.score_blocks)
    element = next(value.element_size() for value in model.parameters() if value.dtype in FLOATS)
    sizes = [_size(model, batch) for batch in drawn.values()]
    masked = any(_is_masked(family, batch) for batch in drawn.values()) or len({length for _, length in sizes}) > 1
    found = blocks_of(model, family.block)
    numbers = {path: number for number, path in enumerate(found)}
    rows = {path: _rows(path, adapters) for path in found}
    adapted = [numbers[path] for path in found if rows[path]]
    measured = {path: [_role(name) for name in scored if name.startswith(f"{path}.")] for path in found}
    last = max(numbers[path] for path in found if measured[path])
    blocks = []
    for path, one in found.items():
        here = numbers[path]
        until = max(measured[path], key=LINEARS.index) if options.early_exit and here == last else None
        made = block(
            _shapes(one, path),
            rows[path],
            element=element,
            weights=_bytes(one) if stored is None else _stored_bytes(one, stored),
            wide_norms=any(type(part).__name__.endswith("RMSNorm") for part in one.modules()),
            measured=measured[path],
            until=until,
            first=here == adapted[0],
            masked=max(length for _, length in sizes) if masked else 0,
            checkpointing=bool(options.checkpointing),
        )
        runs = here <= last or not options.early_exit
        blocks.append(replace(made, runs=runs, learns=here >= adapted[0]))
    others = (one for path, one in linears.items() if path not in scored and not isinstance(one, Site))
    folded = [linear.weight for linear in others]
    fold = sum(weight.numel() * weight.element_size() for weight in folded)
    outside = _bytes(model) - sum(map(_bytes, found.values()))
    return Work(
        tuple(blocks),
        outside,
        outside - (_bytes_of_head(model) if options.early_exit else 0),
        element,
        tuple(sizes),
        head=0 if options.early_exit else _head(model),
        # Quantised linears are never folded.
        fold=0 if stored is not None or should_fold(options.fold, folded, device) is False else fold,
    )


def _role(path: str) -> str:
    name = path.rpartition(".")[2]
    if name not in _ROLES:
        raise NoFormula(f"{path} is no linear of a block that the formula knows")
    return _ROLES[name]


def _shapes(one: nn.Module, path: str) -> dict[str, tuple[int, int]]:
    found = {}
    for name, module in one.named_modules():
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            found[_role(f"{path}.{name}")] = (int(module.in_features), int(module.out_features))
    missing = [name for name in LINEARS if name not in found and name != "gate"]
    if missing:
        raise NoFormula(f"{path} lacks the linears {missing} of a usual block")
    return found


def _rows(path: str, adapters: Mapping[str, Adapter]) -> dict[str, int]:
    """Linear -> ranks of its adapters added up."""
    found: dict[str, int] = {}
    for adapter in adapters.values():
        for name, factor in adapter.factors.items():
            if name.startswith(f"{path}."):
                found[_role(name)] = found.get(_role(name), 0) + factor.rank
    return found


def _size(model: nn.Module, batch: Mapping[str, Any]) -> tuple[int, int]:
    """Rows of a batch, and tokens of a row."""
    ids, pixels = batch.get("input_ids"), batch.get("pixel_values")
    if isinstance(ids, Tensor) and ids.dim() == 2:
        return ids.shape[0], ids.shape[1]
    patch = getattr(getattr(model, "config", None), "patch_size", None)
    if isinstance(pixels, Tensor) and pixels.dim() == 4 and isinstance(patch, int):
        # With the token of the class, which most have.
        return pixels.shape[0], (pixels.shape[2] // patch) * (pixels.shape[3] // patch) + 1
    raise NoFormula(f"how many tokens a batch of {sorted(batch)} has is not known")


def _is_masked(family: Family, batch: Mapping[str, Any]) -> bool:
    mask = batch.get(family.mask) if family.mask is not None else None
    return isinstance(mask, Tensor) and not bool(mask.bool().all())


def _head(model: nn.Module) -> int:
    """Numbers that the model gives for each token."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return 0 if output_embeddings(model) is None else int(getattr(text, "vocab_size", 0))


def _bytes(module: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in module.parameters())


def _stored_bytes(one: nn.Module, stored: float) -> float:
    linears = [value for name, value in one.named_parameters() if name.endswith(".weight") and value.dim() == 2]
    return _bytes(one) + sum(value.numel() * (stored - value.element_size()) for value in linears)


def _bytes_of_head(model: nn.Module) -> int:
    """Of weights behind the blocks that are not those of the embedding."""
    parts = (output_embeddings(model), input_embeddings(model))
    behind, front = ([] if part is None else list(part.parameters()) for part in parts)
    own = [value for value in behind if not any(value is one for one in front)]
    return sum(value.numel() * value.element_size() for value in own)
