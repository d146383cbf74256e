"""LoRA adapters in the PEFT format: read from a folder or from memory, checked to the last tensor."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor, nn

from nsc_merge.adapters.adapter import About, Adapter, Factor, TokenRows
from nsc_merge.adapters.adapter_files import WEIGHTS_FILE, read_folder, read_headers
from nsc_merge.adapters.folder_about import labels_beside, license_beside
from nsc_merge.adapters.formats.parameter_stacks import FACTORS, stacks_of
from nsc_merge.adapters.hub import fetch
from nsc_merge.adapters.peft_config import (
    Scalings,
    check_config,
    check_targets,
    is_announced,
    is_within,
    owns_parameter,
    token_indices,
)
from nsc_merge.adapters.peft_keys import PREFIX, as_peft_writes
from nsc_merge.adapters.peft_models import Held, config_of, copied, read_layers
from nsc_merge.adapters.weights_beside import read_beside
from nsc_merge.utils.option_checks import is_hub_id

DORA = ("exact", "convert", "refuse")

_KEY = re.compile(r"(?P<path>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_magnitude_vector)")

# What PEFT saves of the base beside LoRA on embeddings or a language model's head, or where these were resized.
_BASE_KEY = re.compile(r"(?P<path>.+)\.base_layer\.(?P<parameter>weight|bias)|((.+\.)?(embed_tokens|lm_head)\.weight)")
# LoRA on an embedding, whose weight [V, d] it is the update of: transposed, and of no ".weight".
_EMBEDDED = re.compile(r"(?P<path>.+)\.lora_embedding_(?P<part>[AB])")
_ROWS = re.compile(r"(?P<path>.+)\.token_adapter\.trainable_tokens_delta")
# PEFT's copies in a state dict of a module that was trained in full, which its files hold under the module's name.
_COPIES = re.compile(r"\.(modules_to_save|original_module)\.")
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|lm_head)(\.|$)")
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
        ValueError: if the adapter is not plain LoRA, if a tensor is left over or missing, if a shape
            disagrees with the configuration, or if weights lie beside the adapter that cannot be read.
    """
    if dora not in DORA:
        raise ValueError(f"dora: expected one of {list(DORA)}, found {dora!r}")
    adapter = _loaded(source, name, dora)
    return replace(adapter, dora=dora) if dora == "convert" else adapter


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
        config, given = _of_mapping(source, name)
        check_config(name, config, dora)
        weights, notes = as_peft_writes(given)
        return replace(_made(name, config, *_sorted(name, config, weights)), notes=notes)
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
    check_config(name, files.config, dora)
    weights, notes = as_peft_writes(files.weights)
    held, base_weights = _sorted(name, files.config, weights)
    both = sorted(set(beside.parameters) & set(held.trained))
    if both:
        raise ValueError(f"adapters[{name!r}]: {both[0]} is in {WEIGHTS_FILE} and beside it; expected it once")
    held.trained.update(beside.parameters)
    adapter = _made(name, files.config, held, base_weights)
    about = replace(adapter.about, license=license_beside(folder), id2label=labels_beside(folder))
    sha256 = {**files.sha256, **beside.sha256}
    return replace(adapter, source=folder, notes=(*notes, *files.notes, *beside.notes), sha256=sha256, about=about)


def outline_of(folder: Path, name: str) -> tuple[Adapter, dict[str, Any]]:
    """An adapter of which shapes alone are known, its tensors being on the meta device, and its configuration.

    Both are checked as :func:`load_adapter` does, without the numbers; DoRA passes, and keeps its magnitudes.

    Raises:
        FileNotFoundError, ValueError: as there.
    """
    files = read_headers(folder, name)
    check_config(name, files.config, "convert")
    held, _ = _sorted(name, files.config, as_peft_writes(files.weights)[0])
    if not held.parts and not held.stacks:
        raise ValueError(f"adapters[{name!r}]: holds no LoRA tensors")
    factors = {
        path: Factor(
            parts["lora_A.weight"],
            parts["lora_B.weight"],
            held.scalings[path],
            parts.get("lora_B.bias"),
            magnitude=parts.get("lora_magnitude_vector"),
        )
        for path, parts in held.parts.items()
    }
    base = files.config.get("base_model_name_or_path")
    return Adapter(name, factors, base, held.trained, source=folder, stacks=held.stacks), files.config


def _of_model(model: nn.Module, name: str, dora: str) -> Adapter:
    held_as, config = config_of(model, name)
    check_config(name, config, dora)
    held = read_layers(model, held_as, name)
    scaled = [path for path, parts in held.parts.items() if "lora_magnitude_vector" in parts]
    if scaled and dora == "refuse":
        _refuse_dora(name, scaled[0])
    return _made(name, config, held)


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


def _sorted(name: str, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> tuple[Held, dict[str, Tensor]]:
    """What the tensors of PEFT's file are, and those of them that are the base model's."""
    held = Held({}, {}, {}, {}, {})
    base_weights: dict[str, Tensor] = {}
    of_parameters: dict[str, dict[str, Tensor]] = {}
    left_over = []
    whole = tuple(config.get("modules_to_save") or ())
    for key, value in weights.items():
        path = key.removeprefix(PREFIX)
        match = _KEY.fullmatch(path)
        if path == key or _COPIES.search(path):
            left_over.append(key)
        elif match and match["part"] in FACTORS and owns_parameter(config, match["path"]):
            of_parameters.setdefault(match["path"], {})[match["part"]] = value
        elif match and is_announced(match["part"], config):
            # Of a convolution, the dimensions of the kernel belong to the inputs of lora_A, and are ones in lora_B.
            flat = value.flatten(1) if value.dim() > 2 else value
            held.parts.setdefault(match["path"], {})[match["part"]] = flat
        elif not match and is_within(path, whole):
            held.trained[path] = value
        elif embedded := _EMBEDDED.fullmatch(path):
            if config.get("use_dora"):
                _refuse_dora_on(name, embedded["path"], "an embedding")
            part = "lora_B.weight" if embedded["part"] == "A" else "lora_A.weight"
            held.parts.setdefault(embedded["path"], {})[part] = value.t().contiguous()
        elif (rows := _ROWS.fullmatch(path)) and (indices := token_indices(config, rows["path"])):
            held.token_rows[rows["path"]] = TokenRows(indices, value)
        elif base := _BASE_KEY.fullmatch(path):
            base_weights[f"{base['path']}.{base['parameter']}" if base["path"] else path] = value
        else:
            left_over.append(key)
    if left_over:
        raise ValueError(
            f"adapters[{name!r}]: {len(left_over)} of {len(weights)} tensors would be ignored, so nothing "
            f"is loaded: {_listed(left_over)}. Expected {PREFIX}<module>.lora_A.weight and .lora_B.weight, "
            f"and modules_to_save {list(whole)}, as PEFT's save_pretrained writes them"
        )
    if config.get("ensure_weight_tying"):
        # PEFT saves what it trained as one with an embedding under every name, and adds those names as it loads.
        for path in [path for path, value in base_weights.items() if _is_tied(value, held.trained.values())]:
            held.trained[path] = base_weights.pop(path)
    tied = _EMBEDDING if config.get("ensure_weight_tying") else None
    check_targets(name, config, [path for path in held.parts if not (tied and tied.search(path))])
    held.scalings.update(_scaled(name, config, held.parts))
    held.stacks.update(stacks_of(name, config, of_parameters))
    return held, base_weights


def _scaled(name: str, config: Mapping[str, Any], held: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
    """The scaling of every module, once its tensors are those that the configuration announces."""
    needed = {"lora_A.weight", "lora_B.weight"}
    needed |= {"lora_B.bias"} if config.get("lora_bias") else set()
    needed |= {"lora_magnitude_vector"} if config.get("use_dora") else set()
    settings = Scalings(name, config)
    scalings = {}
    for path, parts in held.items():
        if set(parts) != needed:
            found = ", ".join(sorted(part.removesuffix(".weight") for part in parts))
            raise ValueError(f"adapters[{name!r}]: {path} has {found} only; expected {', '.join(sorted(needed))}")
        rank, scalings[path] = settings.of(path)
        A, B = parts["lora_A.weight"], parts["lora_B.weight"]
        if A.shape[:1] != (rank,) or B.shape[1:] != (rank,):
            raise ValueError(
                f"adapters[{name!r}]: {path}: expected lora_A [{rank}, d_in] and lora_B [d_out, {rank}] by the "
                f"configuration, found {list(A.shape)} and {list(B.shape)}; LoRA on a convolution in several groups is "
                "not merged, nor by PEFT"
            )
    return scalings


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
    for path, value in {**held.trained, **base_weights, **in_stacks}.items():
        _refuse_non_finite(name, path, value)
    factors = {path: _factor(name, path, parts, held.scalings[path]) for path, parts in held.parts.items()}
    base = config.get("base_model_name_or_path")
    task_type = config.get("task_type")
    # In memory it is one of PEFT's enumeration.
    about = About(task_type=getattr(task_type, "value", task_type), base_revision=config.get("revision"))
    return Adapter(
        name, factors, base, held.trained, base_weights=base_weights, about=about, token_rows=held.token_rows,
        stacks=held.stacks,
    )


def _is_tied(value: Tensor, trained: Iterable[Tensor]) -> bool:
    return any(value.shape == one.shape and torch.equal(value, one) for one in trained)


def _factor(name: str, path: str, parts: Mapping[str, Tensor], scaling: float) -> Factor:
    A, B = parts["lora_A.weight"], parts["lora_B.weight"]
    bias, magnitude = parts.get("lora_B.bias"), parts.get("lora_magnitude_vector")
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
        raise ValueError(
            f"adapters[{name!r}]: {path}: expected lora_A [r, d_in] and lora_B [d_out, r], found {list(A.shape)} "
            f"and {list(B.shape)}"
        )
    if magnitude is not None and magnitude.dim() > 1:
        _refuse_dora_on(name, path, "a convolution")
    for part, value in (("lora_B.bias", bias), ("lora_magnitude_vector", magnitude)):
        if value is not None and value.shape != B.shape[:1]:
            raise ValueError(
                f"adapters[{name!r}]: {path}.{part}: expected [{B.shape[0]}], found {list(value.shape)}"
            )
    for part, value in parts.items():
        _refuse_non_finite(name, f"{path}.{part}", value)
    if not math.isfinite(scaling):
        raise ValueError(f"adapters[{name!r}]: {path}: expected a finite scaling, found {scaling!r}")
    return Factor(A, B, scaling, bias, magnitude=magnitude)


def _refuse_dora_on(name: str, path: str, what: str) -> NoReturn:
    raise ValueError(
        f"adapters[{name!r}]: {path}: DoRA on {what} is not merged, expected it on linears; train with "
        "use_dora=False, or leave this task out of the merge"
    )


def _refuse_non_finite(name: str, key: str, value: Tensor) -> None:
    if value.is_meta:
        raise ValueError(f"adapters[{name!r}]: {key} is on the meta device: expected values, load the weights first")
    if not value.is_floating_point() or not torch.isfinite(value).all():
        raise ValueError(f"adapters[{name!r}]: {key} ({value.dtype}) holds values that are not finite")


def _listed(names: list[str], limit: int = 5) -> str:
    shown = ", ".join(sorted(names)[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
