"""The demo's backbone, a genuine ``transformers.ViTModel`` of 0.34 M parameters, and its task heads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsc_merge.demo.data import SIZE
from nsc_merge.demo.tasks import Task
from nsc_merge.utils.safetensors_checks import read_safetensors

if TYPE_CHECKING:
    from transformers import ViTModel

PATCH = 4
WIDTH = 64
BLOCKS = 8
PATCHES = (SIZE // PATCH) ** 2
# What a transformers configuration of a vision transformer takes.
SHAPE: dict[str, Any] = {
    "num_channels": 1,
    "image_size": SIZE,
    "patch_size": PATCH,
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "intermediate_size": 3 * WIDTH,
}


def new_backbone(seed: int) -> ViTModel:
    """A freshly initialised ViT: 24x24 grey images, patch 4, width 64, 8 blocks, 4 heads.

    Weights are drawn with standard deviation ``d_in ** -0.5``, and the projections that write into the
    residual stream are shrunk by the square root of their number: transformers' default of 0.02 suits width
    768, and at width 64 it starts training with almost no signal.
    """
    from transformers import ViTConfig, ViTModel

    model = ViTModel(ViTConfig(**SHAPE), add_pooling_layer=False, use_mask_token=True)
    initialise(model, seed)
    return model


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Draw the weights of a vision transformer of :data:`SHAPE`, as :func:`new_backbone` says."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            # The patch projection is a convolution; the other embeddings are added to what it gives.
            added = name.startswith("embeddings.") and parameter.dim() != 4
            std = 0.02 if added else parameter[0].numel() ** -0.5
            if name.endswith(("o_proj.weight", "out_proj.weight", "fc2.weight")):
                std *= (2 * BLOCKS) ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator, device="cpu") * std)


def load_backbone(folder: Path) -> ViTModel:
    """The trained ViT of ``folder``, in float32 and evaluation mode."""
    from transformers import ViTModel

    model = ViTModel.from_pretrained(
        folder, dtype=torch.float32, add_pooling_layer=False, local_files_only=True
    )
    return model.eval()


def patch_features(model: nn.Module, pixels: Tensor, **inputs) -> Tensor:
    """Final features of the patch tokens, ``[N, 36, 64]``; a class token, which comes first, is left out."""
    return model(pixel_values=pixels, **inputs).last_hidden_state[:, -PATCHES:]


def to_image(values: Tensor) -> Tensor:
    """Per-patch predictions ``[N, 36, channels * 16]`` laid out as an image ``[N, channels, 24, 24]``."""
    return F.fold(values.transpose(1, 2), SIZE, PATCH, stride=PATCH)


class Head(nn.Linear):
    """One linear layer: on every patch token for a dense task, on their mean otherwise."""

    def __init__(self, task: Task) -> None:
        super().__init__(WIDTH, task.channels * PATCH**2 if task.dense else task.channels)
        self.task = task

    def forward(self, features: Tensor) -> Tensor:
        """Predictions, ``[N, C, 24, 24]`` or ``[N, C]``, from patch features ``[N, 36, 64]``."""
        if self.task.dense:
            return to_image(super().forward(features))
        return super().forward(features.mean(1))


def load_head(folder: Path, task: Task) -> Head:
    """The trained head ``folder/<task>.safetensors``, in float32."""
    head = Head(task)
    head.load_state_dict(
        {name: value.float() for name, value in read_safetensors(folder / f"{task.name}.safetensors").items()}
    )
    return head.requires_grad_(False)
