"""A folder that the command line can merge in, and what is in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn
from zoo import KINDS, write_adapter


def make_place(base: nn.Module, folder: Path) -> Path:
    """Fill a folder with a base (of kind llama-cls), two adapters, their inputs and a recipe."""
    base.save_pretrained(folder / "base")
    for seed, task in enumerate(("nli", "topic"), 1):
        settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "SEQ_CLS"}
        write_adapter(base, folder / "adapters" / task, seed, **settings)
        inputs = [KINDS["llama-cls"].inputs(10 * seed + i) for i in range(2)]
        stacked = {name: torch.cat([one[name] for one in inputs]) for name in inputs[0]}
        (folder / "inputs").mkdir(exist_ok=True)
        save_file(stacked, folder / "inputs" / f"{task}.safetensors")
    recipe = {
        "model": "base",
        "adapters": {"nli": "adapters/nli", "topic": "adapters/topic"},
        "calibration": {"nli": "inputs/nli.safetensors", "topic": "inputs/topic.safetensors"},
        "batch_size": 2,
        "options": {"steps": 4, "lr": 0.01},
        "output": {"dir": "merged", "formats": ["lora", "model"], "plots": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def on_cpu(place: Path) -> None:
    """For tests that compare two runs to the bit: on a GPU torch's own attention adds gradients in no fixed order."""
    recipe = place / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "device: cpu\n")


def contents(folder: Path) -> dict[str, bytes]:
    """Path within the folder -> bytes, of every file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ctrl-C at the second step of whatever shows its progress."""
    calls = []

    def interrupt(self, count=1, **values):
        calls.append(values)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nsc_merge.utils.progress.Progress.update", interrupt)
        yield
