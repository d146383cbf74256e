"""The tasks of ``vit.py`` on a vision transformer without a class token: a small SigLIP tower.

A class token takes part in every attention although none of the heads reads it. The earlier study whose figures
``acceptance_ranges.py`` holds the suites to had none, so this suite is the closer one to it. The base is pre-trained
like that of ``nsc-merge demo``, once, in about ten minutes of a core, and kept in ``<work>/siglip/base``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from nsc_merge.demo.model import SHAPE, WIDTH, initialise, patch_features
from nsc_merge.demo.train import pretrain

from ..suite import Log
from . import vit
from .training import new_folder

NAME = "siglip"
PERMUTED = vit.PERMUTED
_MODULES = ("q_proj", "k_proj", "v_proj", "out_proj")


def load(
    work: Path,
    seed: int,
    *,
    log: Log = print,
    progress: bool | None = None,
    **others: Any,
) -> vit.ViTSuite:
    """The suite at ``seed``; what is missing below ``work`` is trained first. Arguments as :func:`vit.load`."""
    folder = work / NAME / "base"
    if not folder.is_dir():
        with new_folder(folder) as part:
            pretrain(part, seed=0, log=log, progress=progress, new_model=new_tower, features=masked_features)

    def load_tower() -> nn.Module:
        return SiglipVisionModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()

    base = vit.Base(NAME, load_tower, _MODULES)
    return vit.load(work, seed, log=log, progress=progress, base=base, **others)


def new_tower(seed: int) -> SiglipVisionModel:
    """A freshly initialised tower of the ViT's shape, with a token for masked patches, which SigLIP does not have."""
    model = SiglipVisionModel(SiglipVisionConfig(**SHAPE, hidden_act="gelu", vision_use_head=False))
    model.embeddings.mask_token = nn.Parameter(torch.zeros(WIDTH))
    initialise(model, seed)
    return model


def masked_features(model: SiglipVisionModel, pixels: Tensor, bool_masked_pos: Tensor) -> Tensor:
    """Final features ``[N, 36, 64]``, the mask token standing in for the patches where ``bool_masked_pos`` is true."""

    def replace(projection: nn.Module, inputs: tuple[Tensor, ...], patches: Tensor) -> Tensor:
        masked = bool_masked_pos.view(len(patches), 1, *patches.shape[2:])
        return torch.where(masked, model.embeddings.get_parameter("mask_token").view(1, -1, 1, 1), patches)

    handle = model.embeddings.patch_embedding.register_forward_hook(replace)
    try:
        return patch_features(model, pixels)
    finally:
        handle.remove()
