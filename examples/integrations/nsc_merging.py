"""The merge of NSC's public code (wonyoung01/nsc_merging) by this library, with the arguments of its own function.

    python examples/integrations/nsc_merging.py

In its ``src/merge.py`` one line is added, in front of ``if __name__ == "__main__":``:

    from nsc_merge.integrations.nsc_merging import train_merged_model

or, to keep its own loop and take only the layers from here, one after its ``merged_model.to(device)``:

    from nsc_merge.integrations.nsc_merging_layers import accelerate; accelerate(merged_model)

What the codebase brings is small and made up here: a module ``utils`` that loads models, a base, adapters and loaders.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.utils import logging

from nsc_merge.integrations.nsc_merging import train_merged_model

TASKS = ("dtd", "eurosat")


class Settings(dict[str, Any]):
    __getattr__ = dict.__getitem__


class Classifier(nn.Module):
    def __init__(self, base: str) -> None:
        super().__init__()
        self.vit = CLIPVisionModelWithProjection.from_pretrained(base)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.vit(pixel_values=pixels).image_embeds


if __name__ == "__main__":
    logging.disable_progress_bar()
    torch.manual_seed(0)
    utils: Any = ModuleType("utils")
    utils.get_base_model = lambda cfg: Classifier(cfg.model.id)
    utils.load_lora_model = lambda model, adapter, head: model
    sys.modules["utils"] = utils
    with tempfile.TemporaryDirectory() as place:
        base = Path(place) / "clip"
        config = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        )
        CLIPVisionModelWithProjection(config).save_pretrained(base)
        for task in TASKS:
            lora = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
            get_peft_model(CLIPVisionModelWithProjection.from_pretrained(base), lora).save_pretrained(f"{place}/{task}")
        args = SimpleNamespace(
            num_steps=10, learning_rate=1e-3, lamda=0.8, kernel=True, ada=False, lambda_reg=0.0,
            merge_type="weight", coeff_type="linear",
        )  # fmt: skip
        merged_model = train_merged_model(
            args,
            cfgs=[
                Settings(
                    task=Settings(name="classification"), data=Settings(name=task), model=Settings(id=str(base))
                )
                for task in TASKS
            ],
            val_loaders=[[{"image": torch.randn(4, 3, 16, 16)} for _ in range(3)] for _ in TASKS],
            model_dirs=[place] * len(TASKS),
            lora_dicts={f"{task}-classification": f"{place}/{task}" for task in TASKS},
            preference=None,
            device="cpu",
            progress=False,
        )
    first, second = merged_model.models
    for path, row in merged_model.result.coefficients.items():
        print(path, {task: round(value, 4) for task, value in row.items()})
    print("models share one merged backbone:", first.vit is second.vit)
