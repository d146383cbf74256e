"""What NSC's public code (wonyoung01/nsc_merging) takes, made here: a CLIP vision model, adapters of PEFT, loaders, and
its settings.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from bench.swaps.checkouts import imported_from

# Its hooks take the 16 columns of an adapter by its data set's place in a list of the code's own.
TASKS = ("stanford_cars", "dtd", "eurosat", "gtsrb", "mnist", "resisc45", "sun397", "svhn")
RANK, LAMBDA = 16, 0.4
# They log, debug, read settings and train language models.
ABSENT = (
    "wandb", "ipdb", "omegaconf", "requests", "trl", "trl.trainer", "trl.trainer.sft_config", "trl.trainer.sft_trainer",
)  # fmt: skip


class Settings(dict):
    """As OmegaConf's, with names as attributes."""

    __getattr__ = dict.__getitem__


def write_inputs(
    folder: Path,
    *,
    tasks: int,
    width: int,
    blocks: int,
    image: int = 16,
    batch: int = 2,
    batches: int = 5,
    alpha: int = RANK,
    modules: Sequence[str] = ("q_proj", "v_proj"),
) -> dict[str, Any]:
    """Write base, adapters and heads into ``folder``; returns the arguments of ``train_merged_model``, without
    ``args`` and ``device``.
    """
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    # Its loaders look for "clip" in the name.
    base = folder / "clip"
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=32,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        image_size=image,
        patch_size=8,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(base)
    cfgs, loaders, adapters = [], [], {}
    for name in TASKS[:tasks]:
        model = get_peft_model(
            CLIPVisionModelWithProjection.from_pretrained(base),
            LoraConfig(r=RANK, lora_alpha=alpha, target_modules=list(modules)),
        )
        for key, value in model.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(value, std=0.8 / width**0.5)
        model.save_pretrained(str(folder / name))
        torch.save(torch.randn(10, 32), folder / f"{name}.pt")
        adapters[f"{name}-classification"] = str(folder / name)
        cfgs.append(
            Settings(
                task=Settings(name="classification"),
                data=Settings(name=name, cliphead_name=f"{name}.pt"),
                model=Settings(name="clip", id=str(base), cliphead_dir=str(folder)),
            )
        )
        loaders.append([{"image": torch.randn(batch, 3, image, image)} for _ in range(batches)])
    return {
        "cfgs": cfgs,
        "val_loaders": loaders,
        "model_dirs": [str(folder)] * tasks,
        "lora_dicts": adapters,
        "preference": torch.full((tasks,), 1 / tasks),
        "baselines_val": None,
    }


def arguments(tasks: int, steps: int, **more: Any) -> SimpleNamespace:
    """Of its command line."""
    settings = {
        "num_steps": steps, "lambda_reg": 0.0, "merge_type": "weight", "coeff_type": "linear", "lamda": LAMBDA * tasks,
        "learning_rate": 1e-3, "tracking": False, "kernel": True, "ada": False,
    }  # fmt: skip
    return SimpleNamespace(**{**settings, **more})


@contextmanager
def their_merge(repository: Path) -> Iterator[Any]:
    """Its module ``merge``, in a block."""
    with imported_from([repository / "src", repository], ABSENT):
        import merge

        yield merge


class Classifier(nn.Module):
    """Stands for the codebase's own: a backbone and the vectors of its classes."""

    head: Tensor

    def __init__(self, base: str, head: Path) -> None:
        super().__init__()
        self.vit = CLIPVisionModelWithProjection.from_pretrained(base)
        self.register_buffer("head", torch.load(head, weights_only=True))

    def forward(self, pixels: Tensor) -> Tensor:
        embeds = self.vit(pixel_values=pixels).image_embeds
        return nn.functional.normalize(embeds, dim=-1) @ self.head.t()


@contextmanager
def stand_in() -> Iterator[None]:
    """A module ``utils`` in place of the codebase's, with what ours takes of it."""
    utils: Any = ModuleType("utils")
    utils.get_base_model = lambda cfg: Classifier(cfg.model.id, Path(cfg.model.cliphead_dir) / cfg.data.cliphead_name)
    utils.load_lora_model = lambda model, adapter, head: model
    before = sys.modules.get("utils")
    sys.modules["utils"] = utils
    try:
        yield
    finally:
        del sys.modules["utils"]
        if before is not None:
            sys.modules["utils"] = before
