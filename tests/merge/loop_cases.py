"""Small decoders and a LLaVA with random adapters, for the tests of the loop."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from nsc_merge import Adapter, Factor, merge

TASKS = ["a", "b", "c"]
IMAGE_TOKEN = 63


def text_config(**settings) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.2,
        **settings,
    )


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(text_config()).eval()


def llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        initializer_factor=5.0,
    )
    config = LlavaConfig(vision_config=vision, text_config=text_config(), image_token_index=IMAGE_TOKEN)
    return LlavaForConditionalGeneration(config).eval()


def adapters_for(model: nn.Module, names: Iterable[str] = ("q_proj", "v_proj")) -> dict[str, Adapter]:
    """Random adapters of unequal ranks on the decoder's ``names``; task c leaves out block 0."""
    generator = torch.Generator().manual_seed(1)
    linears = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.rsplit(".", 1)[-1] in names and "vision" not in path
    }
    found = {}
    for rank, task in enumerate(TASKS, 2):
        factors = {
            path: Factor(
                torch.randn(rank, linear.in_features, generator=generator),
                0.1 * torch.randn(linear.out_features, rank, generator=generator),
                1.5,
            )
            for path, linear in linears.items()
            if task != "c" or ".layers.0." not in path
        }
        found[task] = Adapter(task, factors)
    return found


def text_batches(count: int = 2, rows: int = 2, tokens: int = 7) -> dict[str, list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(2)
    return {
        task: [{"input_ids": torch.randint(0, 60, (rows, tokens), generator=generator)} for _ in range(count)]
        for task in TASKS
    }


def image_batches(count: int = 2) -> dict[str, list[dict[str, Tensor]]]:
    """Two rows of four image tokens and five of text, the second row with two of them padded."""
    generator = torch.Generator().manual_seed(3)

    def one() -> dict[str, Tensor]:
        text = torch.randint(0, 60, (2, 5), generator=generator)
        mask = torch.ones(2, 9, dtype=torch.long)
        mask[1, -2:] = 0
        return {
            "input_ids": torch.cat([torch.full((2, 4), IMAGE_TOKEN), text], 1),
            "attention_mask": mask,
            "pixel_values": torch.randn(2, 3, 8, 8, generator=generator),
        }

    return {task: [one() for _ in range(count)] for task in TASKS}


def trajectory(model: nn.Module, adapters, calibration, **options):
    """The result of a few steps, one task at a time unless told otherwise."""
    settings = {"recipe": "vision", "lr": 1e-2, "steps": 4, "progress": False, "batch_tasks": False}
    return merge(model, adapters, calibration, **{**settings, **options})


def values(result) -> Tensor:
    return torch.tensor([list(row.values()) for row in result.coefficients.values()], dtype=torch.float64)


def same_course(first, second):
    torch.testing.assert_close(values(first), values(second), rtol=0, atol=1e-5)
    for one, other in zip(first.history, second.history, strict=True):
        assert one["omega"] == pytest.approx(other["omega"], abs=1e-5)
    assert (values(first) - 0.4).abs().max() > 1e-3


class Around(nn.Module):
    """A model of transformers inside something that says nothing of itself."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, **inputs):
        return self.inside(**inputs)
