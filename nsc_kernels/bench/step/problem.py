"""What one step of a merge is measured on: a model with random weights, its adapters and its batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from nsc_merge.adapters import Adapter, Factor
from nsc_merge.models.families import family_of, scored_paths

LAM = 0.4


@dataclass(frozen=True)
class Shape:
    """Of the model, the adapters and the batches.

    Attributes:
        tokens: per row, with those of the image.
        batches: how many different ones there are; tasks share them in turn.
        vision_layers: blocks of the vision tower of a LLaVA; 0 for a LLaMA.
        classes: of an image classifier, a ViT; 0 for a language model.
        vision_d: width of the vision tower.
        patches: along each side of an image. Each is 14 pixels wide and becomes a token.
        all_linears: 1 for adapters on every linear of a decoder's block, 0 for q and v alone.
    """

    layers: int = 8
    d: int = 512
    intermediate: int = 1376
    heads: int = 8
    kv_heads: int = 8
    vocabulary: int = 1024
    tasks: int = 6
    rank: int = 16
    rows: int = 2
    tokens: int = 128
    batches: int = 6
    vision_layers: int = 0
    vision_d: int = 1024
    patches: int = 24
    all_linears: int = 0
    classes: int = 0


def vit_of(shape: Shape) -> PreTrainedModel:
    side = round((shape.tokens - 1) ** 0.5)
    if side * side + 1 != shape.tokens:
        raise ValueError(f"tokens: a ViT has a square of patches and one more, such as 197, found {shape.tokens}")
    config = ViTConfig(
        hidden_size=shape.d,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        image_size=16 * side,
        patch_size=16,
    )
    config.num_labels = shape.classes
    return ViTForImageClassification(config)


@contextmanager
def defaults(on: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """The device and the type as what new tensors are on and of.

    To make things in, not to time them in: torch's mode for a default device sees every function and every attribute of
    a tensor, in Python.
    """
    kind = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with on:
            yield
    finally:
        torch.set_default_dtype(kind)


def model_of(shape: Shape) -> PreTrainedModel:
    """With random weights, of torch's default type and on its default device."""
    if shape.classes:
        return vit_of(shape)
    words = LlamaConfig(
        hidden_size=shape.d,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        use_cache=False,
    )
    if not shape.vision_layers:
        return LlamaForCausalLM(words)
    vision = CLIPVisionConfig(
        hidden_size=shape.vision_d,
        intermediate_size=4 * shape.vision_d,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_d // 64,
        image_size=14 * shape.patches,
        patch_size=14,
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=words, image_token_index=shape.vocabulary - 1)
    )


def batch_of(shape: Shape) -> dict[str, Tensor]:
    """Of torch's default type and on its default device: rows without padding, the image in front of the text."""
    if shape.classes:
        side = 16 * round((shape.tokens - 1) ** 0.5)
        return {"pixel_values": torch.randn(shape.rows, 3, side, side, device="cpu")}
    batch = {
        "input_ids": torch.randint(shape.vocabulary - 1, (shape.rows, shape.tokens), device="cpu"),
        "attention_mask": torch.ones(shape.rows, shape.tokens, dtype=torch.long, device="cpu"),
    }
    if shape.vision_layers:
        batch["input_ids"][:, : shape.patches**2] = shape.vocabulary - 1
        batch["pixel_values"] = torch.randn(shape.rows, 3, *[14 * shape.patches] * 2, device="cpu")
    return batch


class Problem:
    """A model with random weights, adapters on q and v or on all linears, and one batch per task, on one device and of
    one dtype.
    """

    def __init__(self, shape: Shape, on: torch.device, dtype: torch.dtype) -> None:
        self.shape, self.on, self.dtype = shape, on, dtype
        with defaults(on, dtype):
            self._make(shape)

    def _make(self, shape: Shape) -> None:
        torch.manual_seed(0)
        self.model = model_of(shape).eval()
        self.model.requires_grad_(False)
        self.names = [f"task{k}" for k in range(shape.tasks)]
        blocks = "vit.layers" if shape.classes else "model.layers"
        if shape.vision_layers:
            blocks = "model.language_model.layers"
        self.paths = [
            path
            for path, module in self.model.named_modules()
            if path.startswith(f"{blocks}.")
            and isinstance(module, nn.Linear)
            and (shape.all_linears or path.endswith(("q_proj", "v_proj")))
        ]
        self.adapters = {
            name: Adapter(
                name,
                {
                    path: Factor(
                        torch.randn(shape.rank, linear.in_features, device="cpu") / linear.in_features**0.5,
                        0.02 * torch.randn(linear.out_features, shape.rank, device="cpu"),
                        2.0,
                    )
                    for path, linear in ((path, self.model.get_submodule(path)) for path in self.paths)
                },
            )
            for name in self.names
        }
        distinct = [batch_of(shape) for _ in range(shape.batches)]
        self.batches = [distinct[task % shape.batches] for task in range(shape.tasks)]
        self.passes = [
            (batch, [task for task, other in enumerate(self.batches) if other is batch]) for batch in distinct
        ]
        self.family = family_of(self.model)
        self.scored = scored_paths(self.family, self.model, self.paths, None, "last_quarter")

    def factors(self, path: str) -> list[Factor]:
        return [adapter.factors[path] for adapter in self.adapters.values()]
