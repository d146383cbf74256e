"""Small but genuine parts: a transformers ViT and adapters written by peft itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import written
from data_cases import heads, pooled
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

BLOCKS = 4
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture
def offline(monkeypatch):
    """No look at the network; what a command sets of it is undone."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def model() -> ViTModel:
    torch.manual_seed(0)
    config = ViTConfig(
        num_channels=1,
        image_size=8,
        patch_size=4,
        hidden_size=32,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        intermediate_size=48,
        initializer_range=0.2,
    )
    return ViTModel(config, add_pooling_layer=False).eval()


@pytest.fixture
def write_adapter(model: ViTModel, tmp_path: Path) -> Callable[..., Path]:
    """Writes a PEFT folder with random factors, saved by peft; keyword arguments go to LoraConfig."""

    def write(name: str, seed: int, **config) -> Path:
        settings = {"r": 4, "lora_alpha": 6, "target_modules": PROJECTIONS, **config}
        return written.write(model, tmp_path / name, seed, _fill, settings)

    return write


def _fill(peft_model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for key, value in peft_model.named_parameters():
        if "lora_" in key:
            value.copy_(0.15 * torch.randn(value.shape, generator=generator))
        elif value.requires_grad:
            value.add_(0.05 * torch.randn(value.shape, generator=generator))


@pytest.fixture
def folders(write_adapter) -> dict[str, Path]:
    """Three adapters: plain; rsLoRA with other ranks in places; absent from some modules."""
    return {
        "plain": write_adapter("plain", 1),
        "mixed": write_adapter(
            "mixed",
            2,
            r=3,
            lora_alpha=5,
            use_rslora=True,
            rank_pattern={"layers.1.attention.q_proj": 6},
            alpha_pattern={"o_proj": 2},
        ),
        "partial": write_adapter("partial", 3, target_modules=["v_proj", "o_proj"]),
    }


@pytest.fixture
def images() -> Tensor:
    return torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def calibration(folders) -> dict[str, list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(9)
    return {
        task: [{"pixel_values": torch.randn(4, 1, 8, 8, generator=generator)} for _ in range(2)]
        for task in folders
    }


@pytest.fixture
def random_lambdas() -> Callable[[dict[str, nn.Module]], None]:
    """Gives every merged linear coefficients of its own; absent adapters keep 0."""

    def draw(merged: dict[str, nn.Module]) -> None:
        generator = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for module in merged.values():
                drawn = 0.5 * torch.randn(module.lam.shape, generator=generator, dtype=torch.float64)
                module.lam.copy_(torch.where(module.lam == 0, 0.0, drawn))

    return draw


@pytest.fixture
def outputs():
    return {task: lambda model, batch, head=head: pooled(model, batch) @ head for task, head in heads().items()}
