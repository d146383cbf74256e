"""Writes a LoRA adapter in the PEFT format, as :mod:`nsc_merge.adapters.peft_reader` reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nsc_merge.adapters.adapter import Factor
from nsc_merge.adapters.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from nsc_merge.adapters.peft_reader import PREFIX


def write_adapter(
    folder: Path,
    factors: Mapping[str, Factor],
    whole: Mapping[str, Mapping[str, Tensor]],
    base_model: str | None,
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``.

    Args:
        folder: that there is.
        factors: module path -> update of rank 1 at least, with a scaling of 1: alpha is r everywhere.
        whole: path of a module kept in full (``modules_to_save``) -> its parameters by name.
        base_model: what the adapter is for, if that is known.

    Raises:
        ValueError: naming a tensor that is not finite, before anything is written.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    has_bias = any(factor.bias is not None for factor in factors.values())
    for path, factor in factors.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = factor.A.float().contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = factor.B.float().contiguous()
        if has_bias:
            bias = torch.zeros(factor.B.shape[0]) if factor.bias is None else factor.bias.float()
            tensors[f"{PREFIX}{path}.lora_B.bias"] = bias
    for path, parameters in whole.items():
        for name, value in parameters.items():
            tensors[f"{PREFIX}{path}.{name}"] = value.contiguous()
    overflowed = next((key for key, value in tensors.items() if not value.isfinite().all()), None)
    if overflowed is not None:
        raise ValueError(
            f"{overflowed.removeprefix(PREFIX)}: not finite in {tensors[overflowed].dtype}; expected coefficients and "
            "adapters whose products it holds"
        )
    ranks = {path: factor.rank for path, factor in factors.items()}
    largest = max(ranks.values(), default=1)
    other = {re.escape(path): value for path, value in ranks.items() if value != largest}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": list(ranks),
        "modules_to_save": list(whole) or None,
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": has_bias,
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
