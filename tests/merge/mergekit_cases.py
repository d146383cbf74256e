"""A small Llama with adapters of unequal ranks on unequal modules, and configurations of mergekit about them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from zoo import write_adapter

ADAPTERS: dict[str, dict[str, Any]] = {
    "french": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "legal": {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "up_proj"]},
    "medical": {"r": 2, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
}
WEIGHTS = (0.7, 0.3, 0.5)


def write_place(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A folder with ``base`` and ``adapters``."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    base = LlamaForCausalLM(config).to(dtype)
    base.save_pretrained(folder / "base")
    for seed, (name, settings) in enumerate(ADAPTERS.items(), 1):
        write_adapter(base, folder / "adapters" / name, seed, task_type="CAUSAL_LM", **settings)
    return folder


def config(method: str, names: Sequence[str] = tuple(ADAPTERS), own: Any = None, **shared: Any) -> dict[str, Any]:
    """Of the adapters by name, each with its weight and ``own`` parameters; paths are relative to their folder."""
    models = [
        {"model": f"base+adapters/{name}", "parameters": {"weight": weight, **(own or {})}}
        for name, weight in zip(names, WEIGHTS, strict=False)
    ]
    written = {"merge_method": method, "base_model": "base", "models": models, "dtype": "float32"}
    return {**written, "parameters": shared} if shared else written
