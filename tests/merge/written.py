"""Adapters that tests write by PEFT: each once, after which its files are written as they were."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

FILES = ("README.md", "adapter_config.json", "adapter_model.safetensors")
_held: dict[str, dict[str, bytes]] = {}


def write(
    model: nn.Module,
    folder: Path,
    seed: int,
    fill: Callable[[PeftModel, int], None],
    config: dict[str, Any],
    **save: Any,
) -> Path:
    """PEFT's folder of an adapter of a copy of a model.

    Args:
        model: the base.
        folder: to write.
        seed: given to ``fill``.
        fill: gives the adapter its numbers.
        config: of ``LoraConfig``.
        save: of ``save_pretrained``.
    """
    key = repr((_digest(model), seed, fill.__module__, sorted(config.items()), save))
    if key not in _held:
        peft_model = get_peft_model(copy.deepcopy(model), LoraConfig(**config))
        with torch.no_grad():
            fill(peft_model, seed)
        peft_model.save_pretrained(folder, **save)
        _held[key] = {name: (folder / name).read_bytes() for name in FILES}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in _held[key].items():
        (folder / name).write_bytes(content)
    return folder


def _digest(model: nn.Module) -> str:
    """Of what an adapter's files may take from the base."""
    config = getattr(model, "config", None)
    digest = hashlib.sha256(f"{model} {config} {getattr(model, 'name_or_path', '')}".encode())
    for name, value in model.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype} {value.device}".encode())
        if value.device.type == "cpu":
            digest.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
