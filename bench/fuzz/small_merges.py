"""Small merges whose saves a campaign cuts short, and whether what one wrote is right."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import nsc_merge
from nsc_merge.adapters import Adapter, Factor

RANK, SCALING, SCALE = 2, 1.5, 0.3
TASKS = ("depth v1", "depth_v1", "SST2")


class Save(NamedTuple):
    """One call of ``save``."""

    result: nsc_merge.MergeResult
    format: str | list[str]
    rank: int | None = None

    def to(self, out: Path) -> None:
        self.result.save(out, self.format, rank=self.rank, max_shard_size="20KB")


def saves() -> dict[str, Save]:
    """Merges of one model, with coefficients, factors and updates per task, in every format; by a name each."""
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.ViTModel(
        transformers.ViTConfig(
            num_channels=1, image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=24,
        ),
        add_pooling_layer=False,
    ).eval()  # fmt: skip
    generator = torch.Generator().manual_seed(1)

    def factor() -> Factor:
        return Factor(torch.randn(RANK, 16, generator=generator), torch.randn(16, RANK, generator=generator), SCALING)

    paths = [f"layers.{block}.attention.{name}" for block in range(2) for name in ("q_proj", "v_proj")]
    adapters = {
        task: Adapter(task, {path: factor() for path in paths}, trained={"head.weight": torch.full((2, 16), float(i))})
        for i, task in enumerate(TASKS)
    }
    summed = nsc_merge.merge(model, adapters, method="task_arithmetic", scale=SCALE)
    alone = nsc_merge.merge(model, adapters, method="finetuned")
    cut = nsc_merge.merge(model, adapters, method="ties")
    return {
        "sum as lora": Save(summed, "lora"),
        "sum as model": Save(summed, "model"),
        "sum as coefficients": Save(summed, "coefficients"),
        "sum as both": Save(summed, ["lora", "model"]),
        "alone as lora": Save(alone, "lora"),
        "alone as both": Save(alone, ["model", "lora"], 1),
        "ties as lora": Save(cut, ["lora"], 2),
    }


def faults(save: Save, out: Path) -> list[str]:
    """What is wrong with a finished save of a sum, against the sum of the adapters' own factors in float64."""
    if save.result.method != "task_arithmetic" or save.format == "coefficients":
        return []
    expected: dict[str, Tensor] = {}
    for adapter in save.result.adapters.values():
        for path, factor in adapter.factors.items():
            update = SCALE * SCALING * factor.B.double() @ factor.A.double()
            expected[path] = expected.get(path, 0.0) + update
    found: list[str] = []
    places = {save.format: out} if isinstance(save.format, str) else {name: out / name for name in save.format}
    for format, place in places.items():
        updates = _adapter(place) if format == "lora" else _model(place, save.result.model.state_dict())
        for path, value in expected.items():
            if (updates[path] - value).norm() > 1e-5 * value.norm():
                found.append(f"{format}: {path} is not the sum of the adapters")
    return found


def _adapter(folder: Path) -> dict[str, Tensor]:
    tensors = {name: value.double() for name, value in load_file(folder / "adapter_model.safetensors").items()}
    paths = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    return {
        path.removeprefix("base_model.model."): tensors[f"{path}.lora_B.weight"] @ tensors[f"{path}.lora_A.weight"]
        for path in paths
    }


def _model(folder: Path, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    merged = transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False).state_dict()
    return {
        name.removesuffix(".weight"): merged[name].double() - value.double()
        for name, value in base.items()
        if name.endswith(".weight")
    }
