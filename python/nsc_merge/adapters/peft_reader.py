"""LoRA adapters in the PEFT format: read from a folder or from memory, checked to the last tensor."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from nsc_merge.adapters.adapter import Adapter, Factor
from nsc_merge.adapters.adapter_files import read_folder, widened

PREFIX = "base_model.model."
_KEY = re.compile(r"(?P<path>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_magnitude_vector)")

# Settings under which an adapter is no longer the plain update s B A of one nn.Linear.
_REFUSED = {
    "use_dora": "DoRA rescales each row by a magnitude that depends on the whole merged weight, so its "
    "update is not additive and has no merge coefficient; dora='convert' approximates it by a LoRA update",
    "fan_in_fan_out": "transposed (Conv1D) layers are not supported",
    "use_qalora": "QALoRA pools the input of lora_A, which is then not the layer's own input",
    "use_bdlora": "block-diagonal factors are not supported",
    "arrow_config": "Arrow routes every token to adapters of its own choice and has no merge coefficient",
    "kasa_config": "KaSA changes the base weights",
    "monteclora_config": "MonteCLoRA samples its factors",
    "alora_invocation_tokens": "activated LoRA is switched on by tokens and cannot be folded into weights",
    "target_parameters": "LoRA on bare parameters is not supported, only on nn.Linear",
    "trainable_token_indices": "trained rows of an embedding are not merged",
    "layer_replication": "replicated layers are not in the base model",
}
# Initialisations that move a part of the base weights into the factors.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


AdapterSource: TypeAlias = "str | os.PathLike[str] | Adapter | Mapping[str, Any] | nn.Module"


def load_adapter(source: AdapterSource, name: str, *, dora: str = "refuse") -> Adapter:
    """Read one adapter.

    Args:
        source: a PEFT folder (``adapter_config.json`` and ``adapter_model.safetensors``), an
            :class:`Adapter`, a ``PeftModel`` that holds an adapter called ``name`` or only one, or a mapping
            with ``config`` (as in ``adapter_config.json``) and ``weights`` (PEFT's keys -> tensors).
        name: name of the task.
        dora: ``"refuse"``, or ``"convert"``: keep the magnitudes, from which
            :func:`nsc_merge.models.fitting.fit` makes plain updates.

    Raises:
        FileNotFoundError: if the folder lacks one of the two files; other weight formats are never opened.
        TypeError: if ``source`` is none of the above.
        ValueError: if the adapter is not plain LoRA, if a tensor is left over or missing, or if a shape
            disagrees with the configuration.
    """
    if dora not in ("refuse", "convert"):
        raise ValueError(f"dora: expected 'refuse' or 'convert', found {dora!r}")
    if isinstance(source, Adapter):
        return source
    folder, sha256 = None, {}
    if isinstance(source, str | os.PathLike):
        folder = Path(source)
        files = read_folder(folder, name)
        config, weights, sha256 = files.config, files.weights, files.sha256
    elif isinstance(source, Mapping) and {"config", "weights"} <= set(source):
        config, weights = dict(source["config"]), dict(source["weights"])
    elif isinstance(source, nn.Module) and hasattr(source, "peft_config"):
        config, weights = _read_peft_model(source, name)
    else:
        raise TypeError(
            f"adapters[{name!r}]: expected a PEFT folder, an Adapter, a PeftModel or a mapping with 'config' "
            f"and 'weights', found {type(source).__name__}"
        )
    # Merging is done on the CPU wherever the model is; attaching moves the factors to their linears.
    adapter = _from_peft(name, config, {key: widened(value.cpu()) for key, value in weights.items()}, folder, dora)
    return replace(adapter, sha256=sha256)


def _read_peft_model(model: nn.Module, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from peft import get_peft_model_state_dict

    held: Any = model.peft_config
    if name not in held and len(held) != 1:
        raise ValueError(f"adapters[{name!r}]: the PeftModel holds {sorted(held)}, expected one of that name")
    held_as = name if name in held else next(iter(held))
    # PEFT's own default for embeddings may ask the hub.
    weights = get_peft_model_state_dict(model, adapter_name=held_as, save_embedding_layers=False)
    config = held[held_as].to_dict()
    if config.get("modules_to_save"):
        config["modules_to_save"] = list(config["modules_to_save"])
    return config, {key: value.detach() for key, value in weights.items()}


def _from_peft(
    name: str, config: dict[str, Any], weights: dict[str, Tensor], folder: Path | None, dora: str
) -> Adapter:
    _check_types(name, config)
    _refuse_unsupported(name, config, dora)
    parts: dict[str, dict[str, Tensor]] = {}
    trained: dict[str, Tensor] = {}
    left_over = []
    whole = config.get("modules_to_save") or []
    for key, value in weights.items():
        path = key.removeprefix(PREFIX)
        match = _KEY.fullmatch(path)
        if path == key:
            left_over.append(key)
        elif match and _is_expected(match["part"], config):
            parts.setdefault(match["path"], {})[match["part"]] = value
        elif not match and _is_within(path, whole):
            trained[path] = value
        else:
            left_over.append(key)
    if left_over:
        raise ValueError(
            f"adapters[{name!r}]: {len(left_over)} of {len(weights)} tensors would be ignored, so nothing "
            f"is loaded: {_listed(left_over)}. Expected {PREFIX}<module>.lora_A.weight and .lora_B.weight, "
            f"and modules_to_save {list(whole)}"
        )
    if not parts:
        raise ValueError(f"adapters[{name!r}]: holds no LoRA tensors")
    factors = {path: _factor(name, path, tensors, config) for path, tensors in parts.items()}
    for path, value in trained.items():
        _refuse_non_finite(name, path, value)
    return Adapter(name, factors, config.get("base_model_name_or_path"), trained, folder)


def _is_within(path: str, modules: Sequence[str]) -> bool:
    """PEFT's rule for ``modules_to_save``: a module counts if its path ends with one of the names."""
    parts = path.split(".")
    parents = [".".join(parts[:end]) for end in range(1, len(parts))]
    return any(parent.endswith(module) for parent in parents for module in modules)


def _is_expected(part: str, config: dict[str, Any]) -> bool:
    """Whether the configuration announces this kind of tensor; another would be ignored by PEFT too."""
    needs = {"lora_B.bias": "lora_bias", "lora_magnitude_vector": "use_dora"}
    return part not in needs or bool(config.get(needs[part]))


def _check_types(name: str, config: dict[str, Any]) -> None:
    for setting in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(setting) or {}, dict):
            raise ValueError(
                f"adapters[{name!r}]: {setting}: expected patterns and numbers, found {config[setting]!r:.60}"
            )
    whole = config.get("modules_to_save") or []
    if not isinstance(whole, list) or not all(isinstance(module, str) for module in whole):
        raise ValueError(f"adapters[{name!r}]: modules_to_save: expected names, found {whole!r:.60}")
    base = config.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise ValueError(
            f"adapters[{name!r}]: base_model_name_or_path: expected text, found {base!r:.60}"
        )


def _refuse_unsupported(name: str, config: dict[str, Any], dora: str) -> None:
    kind = config.get("peft_type")
    if getattr(kind, "value", kind) != "LORA":
        raise ValueError(f"adapters[{name!r}]: peft_type: expected 'LORA', found {kind!r}")
    for setting, reason in _REFUSED.items():
        if config.get(setting) and not (setting == "use_dora" and dora == "convert"):
            raise ValueError(f"adapters[{name!r}]: {setting}={config[setting]!r} is refused: {reason}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        raise ValueError(
            f"adapters[{name!r}]: init_lora_weights={start!r} is refused: training started by changing the "
            "base weights. PEFT writes an equivalent plain adapter with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    if config.get("bias", "none") != "none":
        raise ValueError(f"adapters[{name!r}]: bias: expected 'none', found {config['bias']!r}")


def _factor(name: str, path: str, parts: dict[str, Tensor], config: dict[str, Any]) -> Factor:
    needed = ["lora_A.weight", "lora_B.weight"]
    needed += ["lora_B.bias"] if config.get("lora_bias") else []
    needed += ["lora_magnitude_vector"] if config.get("use_dora") else []
    if set(parts) != set(needed):
        found = ", ".join(sorted(part.removesuffix(".weight") for part in parts))
        raise ValueError(f"adapters[{name!r}]: {path} has {found} only; expected {', '.join(needed)}")
    A, B = parts["lora_A.weight"], parts["lora_B.weight"]
    bias, magnitude = parts.get("lora_B.bias"), parts.get("lora_magnitude_vector")
    try:
        rank = _by_pattern(config.get("rank_pattern"), path, config.get("r"))
        alpha = _by_pattern(config.get("alpha_pattern"), path, config.get("lora_alpha"))
    except re.error as error:
        raise ValueError(
            f"adapters[{name!r}]: rank_pattern or alpha_pattern holds {error.pattern!r}: {error}"
        ) from None
    for setting, value in (("r", rank), ("lora_alpha", alpha)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(
                f"adapters[{name!r}]: {setting} of {path}: expected a positive number, found {value!r}"
            )
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != rank or B.shape[1] != rank:
        raise ValueError(
            f"adapters[{name!r}]: {path}: expected lora_A [{rank}, d_in] and lora_B [d_out, {rank}] by the "
            f"configuration, found {list(A.shape)} and {list(B.shape)}"
        )
    for part, value in (("lora_B.bias", bias), ("lora_magnitude_vector", magnitude)):
        if value is not None and value.shape != B.shape[:1]:
            raise ValueError(
                f"adapters[{name!r}]: {path}.{part}: expected [{B.shape[0]}], found {list(value.shape)}"
            )
    for part, value in parts.items():
        _refuse_non_finite(name, f"{path}.{part}", value)
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return Factor(A, B, scaling, bias, magnitude=magnitude)


def _refuse_non_finite(name: str, key: str, value: Tensor) -> None:
    if not value.is_floating_point() or not torch.isfinite(value).all():
        raise ValueError(f"adapters[{name!r}]: {key} ({value.dtype}) holds values that are not finite")


def _by_pattern(patterns: dict[str, Any] | None, path: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the path, at a dot, wins."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _listed(names: list[str], limit: int = 5) -> str:
    shown = ", ".join(sorted(names)[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
