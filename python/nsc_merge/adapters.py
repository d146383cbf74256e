"""LoRA adapters in the PEFT format: read from a folder or from memory, checked to the last tensor."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_KEY = re.compile(rf"(?:{re.escape(_PREFIX)})(?P<path>.+)\.lora_(?P<side>[AB])\.weight")

# Settings under which an adapter is no longer the plain update s B A of one nn.Linear.
_REFUSED = {
    "use_dora": "DoRA rescales each row by a magnitude that depends on the whole merged weight, so its "
    "update is not additive and has no merge coefficient",
    "lora_bias": "biases of lora_B are not merged",
    "fan_in_fan_out": "transposed (Conv1D) layers are not supported",
    "use_qalora": "QALoRA pools the input of lora_A, which is then not the layer's own input",
    "alora_invocation_tokens": "activated LoRA is switched on by tokens and cannot be folded into weights",
    "target_parameters": "LoRA on bare parameters is not supported, only on nn.Linear",
}


@dataclass(frozen=True)
class Factor:
    """The update ``scaling * B @ A`` of one linear layer.

    Attributes:
        A: down-projection ``[r, d_in]``.
        B: up-projection ``[d_out, r]``.
        scaling: alpha / r, or alpha / sqrt(r) for rsLoRA.
    """

    A: Tensor
    B: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def delta(self) -> Tensor:
        """The dense update ``[d_out, d_in]``, in float64."""
        return self.scaling * (self.B.double() @ self.A.double())


@dataclass(frozen=True)
class Adapter:
    """One task's LoRA adapter.

    Attributes:
        name: the task.
        factors: module path in the base model -> its update.
        base_model: what the adapter's configuration says it was trained on, if anything.
    """

    name: str
    factors: dict[str, Factor]
    base_model: str | None = None


AdapterSource: TypeAlias = "str | os.PathLike[str] | Adapter | Mapping[str, Any]"


def load_adapter(source: AdapterSource, name: str) -> Adapter:
    """Read one adapter.

    Args:
        source: a PEFT folder (``adapter_config.json`` and ``adapter_model.safetensors``), an
            :class:`Adapter`, or a mapping with ``config`` (as in ``adapter_config.json``) and ``weights``
            (PEFT's keys -> tensors).
        name: name of the task.

    Raises:
        FileNotFoundError: if the folder lacks one of the two files; other weight formats are never opened.
        TypeError: if ``source`` is none of the above.
        ValueError: if the adapter is not plain LoRA, if a tensor is left over or missing, or if a shape
            disagrees with the configuration.
    """
    if isinstance(source, Adapter):
        return source
    if isinstance(source, str | os.PathLike):
        config, weights = _read_folder(Path(source), name)
    elif isinstance(source, Mapping) and {"config", "weights"} <= set(source):
        config, weights = dict(source["config"]), dict(source["weights"])
    else:
        raise TypeError(
            f"adapters[{name!r}]: expected a PEFT folder, an Adapter or a mapping with 'config' and 'weights'"
            f", found {type(source).__name__}"
        )
    return _from_peft(name, config, weights)


def _read_folder(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else "no such folder"
            raise FileNotFoundError(f"adapters[{name!r}]: {folder / file} is missing (found: {found})")
    from safetensors import SafetensorError, safe_open

    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"adapters[{name!r}]: {folder / CONFIG_FILE} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(
            f"adapters[{name!r}]: {folder / CONFIG_FILE}: expected a JSON object, found {config!r:.40}"
        )
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt", device="cpu") as file:
            return config, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a mapping
    except SafetensorError as error:
        raise ValueError(
            f"adapters[{name!r}]: {folder / WEIGHTS_FILE} is not valid safetensors: {error}"
        ) from None


def _from_peft(name: str, config: dict[str, Any], weights: dict[str, Tensor]) -> Adapter:
    _refuse_unsupported(name, config)
    sides: dict[str, dict[str, Tensor]] = {}
    left_over = []
    for key, value in weights.items():
        match = _KEY.fullmatch(key)
        if match:
            sides.setdefault(match["path"], {})[match["side"]] = value
        else:
            left_over.append(key)
    if left_over:
        raise ValueError(
            f"adapters[{name!r}]: {len(left_over)} of {len(weights)} tensors would be ignored, so nothing "
            f"is loaded: {_listed(left_over)}. Expected {_PREFIX}<module>.lora_A.weight and .lora_B.weight"
        )
    if not sides:
        raise ValueError(f"adapters[{name!r}]: holds no LoRA tensors")
    factors = {path: _factor(name, path, pair, config) for path, pair in sides.items()}
    return Adapter(name, factors, config.get("base_model_name_or_path"))


def _refuse_unsupported(name: str, config: dict[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"adapters[{name!r}]: peft_type: expected 'LORA', found {kind!r}")
    for setting, reason in _REFUSED.items():
        if config.get(setting):
            raise ValueError(f"adapters[{name!r}]: {setting}={config[setting]!r} is refused: {reason}")
    if config.get("bias", "none") != "none":
        raise ValueError(f"adapters[{name!r}]: bias: expected 'none', found {config['bias']!r}")


def _factor(name: str, path: str, pair: dict[str, Tensor], config: dict[str, Any]) -> Factor:
    if len(pair) != 2:
        raise ValueError(
            f"adapters[{name!r}]: {path} has lora_{next(iter(pair))} only; expected lora_A and lora_B"
        )
    A, B = pair["A"], pair["B"]
    try:
        rank = _by_pattern(config.get("rank_pattern"), path, config.get("r"))
        alpha = _by_pattern(config.get("alpha_pattern"), path, config.get("lora_alpha"))
    except re.error as error:
        raise ValueError(
            f"adapters[{name!r}]: rank_pattern or alpha_pattern holds {error.pattern!r}: {error}"
        ) from None
    for setting, value in (("r", rank), ("lora_alpha", alpha)):
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ValueError(
                f"adapters[{name!r}]: {setting} of {path}: expected a positive number, found {value!r}"
            )
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != rank or B.shape[1] != rank:
        raise ValueError(
            f"adapters[{name!r}]: {path}: expected lora_A [{rank}, d_in] and lora_B [d_out, {rank}] by the "
            f"configuration, found {list(A.shape)} and {list(B.shape)}"
        )
    for side, value in pair.items():
        if not value.is_floating_point() or not torch.isfinite(value).all():
            raise ValueError(
                f"adapters[{name!r}]: {path}.lora_{side} ({value.dtype}) holds values that are not finite"
            )
    return Factor(A, B, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _by_pattern(patterns: dict[str, Any] | None, path: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the path, at a dot, wins."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _listed(names: list[str], limit: int = 5) -> str:
    shown = ", ".join(sorted(names)[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
