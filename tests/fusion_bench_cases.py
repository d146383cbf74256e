"""Small models, adapters of PEFT on them, and data sets, as FusionBench's pools hold them."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, T5Config, T5ForConditionalGeneration

TASKS = ["first", "second", "third"]


def clip() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=16, patch_size=8)).eval()


def t5() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 16, "num_heads": 2, "num_layers": 2, "vocab_size": 64}
    return T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0)).eval()


def peft_models(base: nn.Module, targets: list[str], **settings: Any) -> dict[str, nn.Module]:
    """A PeftModel around a copy of the base for each task, of ranks 2, 3 and 4, the last of the first target alone."""
    models = {}
    for number, task in enumerate(TASKS):
        own = targets if number < 2 else targets[:1]
        config = LoraConfig(r=2 + number, lora_alpha=6, target_modules=own, **settings)
        model = get_peft_model(deepcopy(base), config)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "lora_" in name:
                    value.copy_(0.1 * torch.randn(value.shape, generator=generator))
        models[task] = model.eval()
    return models


def whole(models: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The same with the adapters in the weights."""
    return {task: deepcopy(model).merge_and_unload().requires_grad_(True) for task, model in models.items()}


def saved(models: dict[str, nn.Module], folder: Path) -> dict[str, str]:
    for task, model in models.items():
        model.save_pretrained(folder / task)
    return {task: str(folder / task) for task in models}


def images(seed: int) -> list[tuple[torch.Tensor, int]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(3, 16, 16, generator=generator), 0) for _ in range(8)]


def texts(seed: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, 64, (8, 6), generator=generator).tolist()
    return [{"input_ids": row, "attention_mask": [1] * 5 + [0], "labels": [1, 2]} for row in rows]
