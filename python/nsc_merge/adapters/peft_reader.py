"""LoRA adapters in the PEFT format: read from a folder or from memory, checked to the last tensor."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor, nn

from nsc_merge.adapters.adapter import About, Adapter, Factor, Stack
from nsc_merge.adapters.adapter_files import CONFIG_FILE, WEIGHTS_FILE, read_folder, read_headers
from nsc_merge.adapters.folder_about import adapters_within, labels_beside, license_beside
from nsc_merge.adapters.formats.adalora import as_lora, settings_as_lora
from nsc_merge.adapters.formats.peft_tensors import refuse_dora_on, sorted_tensors
from nsc_merge.adapters.hub import fetch
from nsc_merge.adapters.peft_config import check_config, unknown_settings
from nsc_merge.adapters.peft_keys import as_peft_writes
from nsc_merge.adapters.peft_models import Held, config_of, copied, read_layers
from nsc_merge.adapters.weights_beside import read_beside
from nsc_merge.utils.option_checks import is_hub_id

_IDLE = "every update is zero, as before training: the task adds nothing to the merge; expected trained weights"
# What diffusers keeps of the base where a LoRA of Flux has norms.
_NORMS = (
    "norms of a LoRA are in the weights of the base, where diffusers has written them, and so in a merge that is saved "
    "as a model, and in none that is an adapter",
)
DORA = ("exact", "convert", "refuse")

AdapterSource: TypeAlias = "str | os.PathLike[str] | Adapter | Mapping[str, Any] | nn.Module"


def load_adapter(source: AdapterSource, name: str, *, dora: str = "exact") -> Adapter:
    """Read one adapter.

    Args:
        source: a PEFT folder (``adapter_config.json`` and ``adapter_model.safetensors``); ``"owner/name"`` or
            ``"owner/name@revision"`` on the hub, where there is no folder ``owner``; a mapping with ``adapter``, one of
            these two, and ``revision`` or ``subfolder``; an :class:`Adapter`; a model that holds an adapter called
            ``name`` or only one (a ``PeftModel``, or what PEFT's ``inject_adapter_in_model`` and transformers'
            ``add_adapter`` make); or a mapping with ``config`` (as in ``adapter_config.json``) and ``weights`` (PEFT's
            keys -> tensors). Of a model, the layers count: what they hold and the scaling that they run, whatever the
            configuration says. A folder may hold ``non_lora_trainables.safetensors``, too: what LLaVA's training code
            trained beside LoRA.
        name: name of the task.
        dora: ``"refuse"`` DoRA, or keep the magnitudes, from which :func:`nsc_merge.models.fitting.fit` makes
            ``"exact"`` updates, or plain ones (``"convert"``). An :class:`Adapter` read with ``"convert"`` stays so.

    Raises:
        FileNotFoundError: if the folder lacks one of the two files; other weight formats are never opened.
        OSError: if the hub does not give it.
        TypeError: if ``source`` is none of the above.
        ValueError: if the adapter is neither plain LoRA nor AdaLoRA, if a tensor is left over or missing, if a shape
            disagrees with the configuration, or if weights lie beside the adapter that cannot be read.
    """
    if dora not in DORA:
        raise ValueError(f"dora: expected one of {list(DORA)}, found {dora!r}")
    adapter = _loaded(source, name, dora)
    if not isinstance(source, Adapter) and _is_idle(adapter):
        adapter = replace(adapter, notes=(*adapter.notes, _IDLE))
    return replace(adapter, dora=dora) if dora == "convert" else adapter


def _is_idle(adapter: Adapter) -> bool:
    """Whether one factor of every update is zero, and nothing beside these was trained."""
    updates: list[Factor | Stack] = [*adapter.factors.values(), *adapter.stacks.values()]
    scaled = any(factor.magnitude is not None or factor.bias is not None for factor in adapter.factors.values())
    return not (scaled or adapter.trained or adapter.token_rows or any(one.A.any() and one.B.any() for one in updates))


def _loaded(source: AdapterSource, name: str, dora: str) -> Adapter:
    if isinstance(source, Adapter):
        for path, factor in (*source.factors.items(), *source.stacks.items()):
            for part, value in vars(factor).items():
                if isinstance(value, Tensor):
                    _refuse_non_finite(name, f"{path}.{part}", value)
            scaled = isinstance(factor, Factor) and (factor.magnitude is not None or factor.gain is not None)
            if scaled and dora == "refuse" and source.dora != "convert":
                _refuse_dora(name, path)
        return source
    source = getattr(source, "_orig_mod", source)
    if isinstance(source, nn.Module) and hasattr(source, "peft_config"):
        return _of_model(source, name, dora)
    if isinstance(source, str | os.PathLike):
        return _named(source, name, dora)
    if isinstance(source, Mapping) and "adapter" in source:
        unknown = sorted(set(source) - {"adapter", "revision", "subfolder"})
        if unknown or not isinstance(source["adapter"], str | os.PathLike):
            raise ValueError(
                f"adapters[{name!r}]: expected adapter, revision and subfolder, found {dict(source)!r:.80}"
            )
        return _named(source["adapter"], name, dora, source.get("revision"), source.get("subfolder"))
    if isinstance(source, Mapping) and {"config", "weights"} <= set(source):
        given_config, given = _of_mapping(source, name)
        config, weights, notes = _as_lora(name, given_config, given)
        check_config(name, config, dora)
        made = _made(name, config, *sorted_tensors(name, config, weights))
        return replace(made, notes=(*unknown_settings(config), *notes))
    raise TypeError(
        f"adapters[{name!r}]: expected a PEFT folder, an Adapter, a PeftModel or a mapping with 'config' "
        f"and 'weights', found {type(source).__name__}"
    )


def _named(
    source: str | os.PathLike[str], name: str, dora: str, revision: str | None = None, subfolder: str | None = None
) -> Adapter:
    """The adapter in a folder or, where there is none such, on the hub."""
    repo, _, after = str(source).partition("@")
    if isinstance(source, str) and is_hub_id(repo, Path()):
        return load_from_hub(repo, name, revision=after or revision, subfolder=subfolder, dora=dora)
    if revision is not None:
        raise ValueError(f"adapters[{name!r}]: revision is of an adapter on the hub, but {source} is a path")
    return _of_folder(Path(source, subfolder or ""), name, dora)


def load_from_hub(
    repo: str, name: str, *, revision: str | None = None, subfolder: str | None = None, dora: str = "exact"
) -> Adapter:
    """Read one adapter of a repository on the hub, which is asked for it; see :func:`nsc_merge.adapters.hub.fetch`.

    Raises:
        FileNotFoundError, OSError: if there is none, or the hub does not give it.
        ValueError: as :func:`load_adapter`.
    """
    folder, hub, names = fetch(repo, name, revision=revision, subfolder=subfolder)
    adapter = _of_folder(folder, name, dora, names)
    return replace(adapter, about=replace(adapter.about, hub=hub))


def _of_folder(folder: Path, name: str, dora: str, names: Collection[str] | None = None) -> Adapter:
    files, beside = read_folder(folder, name), read_beside(folder, name, names)
    config, weights, notes = _as_lora(name, files.config, files.weights)
    check_config(name, config, dora)
    held, base_weights = sorted_tensors(name, config, weights)
    both = sorted(set(beside.parameters) & set(held.trained))
    if both:
        raise ValueError(f"adapters[{name!r}]: {both[0]} is in {WEIGHTS_FILE} and beside it; expected it once")
    held.trained.update(beside.parameters)
    adapter = _made(name, config, held, base_weights)
    about = replace(adapter.about, license=license_beside(folder), id2label=labels_beside(folder))
    sha256 = {**files.sha256, **beside.sha256}
    within = adapters_within(folder, CONFIG_FILE)
    notes = (*unknown_settings(config), *notes, *files.notes, *beside.notes, *within)
    return replace(adapter, source=folder.absolute(), notes=notes, sha256=sha256, about=about)


def outline_of(folder: Path, name: str) -> tuple[Adapter, dict[str, Any]]:
    """An adapter of which shapes alone are known, its tensors being on the meta device, and its configuration.

    Both are checked as :func:`load_adapter` does, without the numbers; DoRA passes, and keeps its magnitudes.

    Raises:
        FileNotFoundError, ValueError: as there.
    """
    files = read_headers(folder, name)
    config, weights, _ = _as_lora(name, files.config, files.weights)
    check_config(name, config, "convert")
    held, _ = sorted_tensors(name, config, weights)
    if not held.parts and not held.stacks:
        raise ValueError(f"adapters[{name!r}]: holds no LoRA tensors")
    factors = {
        path: Factor(
            parts["lora_A.weight"],
            parts["lora_B.weight"],
            held.scalings[path],
            parts.get("lora_B.bias"),
            magnitude=parts.get("lora_magnitude_vector"),
            transposed=path in held.embeddings,
        )
        for path, parts in held.parts.items()
    }
    base = config.get("base_model_name_or_path")
    return Adapter(name, factors, base, held.trained, source=folder.absolute(), stacks=held.stacks), config


def _as_lora(
    name: str, config: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor], tuple[str, ...]]:
    """Configuration and tensors of PEFT's LoRA, as far as they can be made it, and notes on the keys."""
    named, notes = as_peft_writes(weights)
    return *as_lora(name, config, named), notes


def _of_model(model: nn.Module, name: str, dora: str) -> Adapter:
    held_as, config = config_of(model, name)
    check_config(name, settings_as_lora(config), dora)
    held = read_layers(model, held_as, name)
    scaled = [path for path, parts in held.parts.items() if "lora_magnitude_vector" in parts]
    if scaled and dora == "refuse":
        _refuse_dora(name, scaled[0])
    made = _made(name, config, held)
    return replace(made, notes=_NORMS) if getattr(model, "_transformer_norm_layers", None) else made


def _refuse_dora(name: str, path: str) -> NoReturn:
    raise ValueError(f"adapters[{name!r}]: {path} runs DoRA, expected plain LoRA, or dora='exact' or 'convert'")


def _of_mapping(source: Mapping[str, Any], name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config, weights = source["config"], source["weights"]
    for part, value in (("config", config), ("weights", weights)):
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise ValueError(f"adapters[{name!r}]: {part}: expected a mapping from names, found {value!r:.60}")
    for key, value in weights.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"adapters[{name!r}]: {key}: expected a tensor, found {value!r:.60}")
    return dict(config), {key: copied(value) for key, value in weights.items()}


def _made(
    name: str,
    config: Mapping[str, Any],
    held: Held,
    base_weights: Mapping[str, Tensor] | None = None,
) -> Adapter:
    if not held.parts and not held.stacks:
        raise ValueError(f"adapters[{name!r}]: holds no LoRA tensors")
    base_weights = dict(base_weights or {})
    for path, rows in held.token_rows.items():
        count = len(rows.indices)
        if rows.values.dim() != 2 or len(rows.values) != count or len(set(rows.indices)) < count:
            raise ValueError(
                f"adapters[{name!r}]: {path}: expected a row for each of {count} different tokens by "
                f"trainable_token_indices, found {list(rows.values.shape)}"
            )
        _refuse_non_finite(name, f"{path}.trainable_tokens_delta", rows.values)
    in_stacks = {f"{path}.{part}": getattr(one, part) for path, one in held.stacks.items() for part in ("A", "B")}
    for path, value in (*held.trained.items(), *base_weights.items(), *in_stacks.items()):
        if not _counts(path, value):
            _refuse_non_finite(name, path, value)
    factors = {path: _factor(name, path, held) for path in held.parts}
    base = config.get("base_model_name_or_path")
    task_type = config.get("task_type")
    # In memory it is one of PEFT's enumeration.
    about = About(task_type=getattr(task_type, "value", task_type), base_revision=config.get("revision"))
    return Adapter(
        name, factors, base, held.trained, base_weights=base_weights, about=about, token_rows=held.token_rows,
        stacks=held.stacks,
    )


def _factor(name: str, path: str, held: Held) -> Factor:
    parts, scaling = held.parts[path], held.scalings[path]
    A, B = parts["lora_A.weight"], parts["lora_B.weight"]
    bias, magnitude = parts.get("lora_B.bias"), parts.get("lora_magnitude_vector")
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
        raise ValueError(
            f"adapters[{name!r}]: {path}: expected lora_A [r, d_in] and lora_B [d_out, r], found {list(A.shape)} "
            f"and {list(B.shape)}"
        )
    if magnitude is not None and magnitude.dim() > 1:
        refuse_dora_on(name, path, "a convolution")
    for part, value in (("lora_B.bias", bias), ("lora_magnitude_vector", magnitude)):
        if value is not None and value.shape != B.shape[:1]:
            raise ValueError(
                f"adapters[{name!r}]: {path}.{part}: expected [{B.shape[0]}], found {list(value.shape)}"
            )
    for part, value in parts.items():
        _refuse_non_finite(name, f"{path}.{part}", value)
    if not math.isfinite(scaling):
        raise ValueError(f"adapters[{name!r}]: {path}: expected a finite scaling, found {scaling!r}")
    return Factor(A, B, scaling, bias, magnitude=magnitude, transposed=path in held.embeddings)


def _refuse_non_finite(name: str, key: str, value: Tensor) -> None:
    if value.is_meta:
        raise ValueError(f"adapters[{name!r}]: {key} is on the meta device: expected values, load the weights first")
    if not value.is_floating_point():
        raise ValueError(f"adapters[{name!r}]: {key}: expected floating point, found {value.dtype}")
    if not torch.isfinite(value).all():
        raise ValueError(f"adapters[{name!r}]: {key} ({value.dtype}) holds values that are not finite")


def _counts(key: str, value: Tensor) -> bool:
    """Whether a tensor of a module trained in full is a buffer of whole numbers, such as a BatchNorm's batches."""
    return not value.is_meta and value.dtype in (torch.int64, torch.int32) and not key.endswith((".weight", ".bias"))
