"""Adapters kept along their training, with the validation loss and metric of every step that was kept.

<folder>/steps/<number>/    the adapter after so many steps, as a PEFT folder
<folder>/steps.jsonl        step, loss, metric
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch


@torch.no_grad()
def keep(
    folder: Path,
    step: int,
    steps: int,
    count: int,
    save: Callable[[Path], None],
    measure: Callable[[], tuple[float, float]],
) -> None:
    """Keep the adapter as it is, if it is the turn of this step.

    Args:
        folder: of the adapter.
        step: how many are done: to be called before the first step and after every step.
        steps: of the whole training.
        count: how many adapters are kept at most, from the untrained to the final one.
        save: writes the PEFT folder that it is given.
        measure: validation loss and metric of the model as it is.
    """
    every = max(1, math.ceil(steps / (count - 1)))
    if step % every and step != steps:
        return
    save(folder / "steps" / f"{step:04d}")
    loss, metric = measure()
    with (folder / "steps.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "loss": loss, "metric": metric}) + "\n")


def kept_entries(folder: Path) -> list[dict[str, float]]:
    """``step``, ``loss`` and ``metric`` of every step that was kept; empty if the task was not trained that way."""
    path = folder / "steps.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def kept_adapters(work: Path, suite: str, seed: int, task: str, kind: str) -> list[tuple[dict[str, float], Path]]:
    """The entries of a suite's adapter, each with its PEFT folder."""
    folder = work / suite / f"seed{seed}" / kind / task
    return [(entry, folder / "steps" / f"{entry['step']:04d}") for entry in kept_entries(folder)]
