"""What suites train: each part once, in a folder that is there when all of it is, and one loop for language suites."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from nsc_merge.utils.atomic_folder import replacing_folder
from nsc_merge.utils.progress import Progress

from ..suite import Log

# Parts are made where there are none, so that nothing becomes obsolete.
new_folder = partial(replacing_folder, obsolete=lambda path, written: False)


def train_missing(
    work: Path,
    suite: str,
    seed: int,
    tasks: Sequence[str],
    permuted: Iterable[str],
    train_one: Callable[[Path, str, bool], str],
    log: Log,
) -> Path:
    """Train what ``work`` does not hold yet of a suite's seed, each task from a state of torch's generator of its own.

    Args:
        work: folder for trained parts.
        suite: its name.
        seed: of what differs between repetitions.
        tasks: all of the suite.
        permuted: tasks to train once more, with their labels in a wrong order.
        train_one: trains into a folder the task of that name, with permuted labels if so told; returns a line.
        log: receives the lines.

    Returns:
        The seed's folder.
    """
    folder = work / suite / f"seed{seed}"
    for kind, names in (("adapters", tasks), ("permuted", permuted)):
        for name in names:
            if not (folder / kind / name).is_dir():
                torch.manual_seed(1000 * seed + tasks.index(name))
                with new_folder(folder / kind / name) as part:
                    line = train_one(part, name, kind == "permuted")
                log(f"{suite} seed {seed} {kind}: {line}")
    return folder


def train(
    loss: Callable[[], Tensor],
    parameters: Iterable[nn.Parameter],
    *,
    label: str,
    steps: int,
    lr: float,
    weight_decay: float,
    warmup: float = 0.06,
    progress: bool | None = None,
    watch: Callable[[int], None] | None = None,
) -> None:
    """AdamW with a linear warm-up and a cosine decay; gradients are clipped to norm 1.

    Args:
        loss: draws a batch and returns its loss; called once per step.
        parameters: to train.
        label: shown by the progress display.
        steps: number of updates.
        lr: highest learning rate.
        weight_decay: of parameters with two or more dimensions.
        warmup: share of the steps.
        progress: as in :class:`nsc_merge.utils.progress.Progress`.
        watch: called with the number of steps done, before the first step and after every step.
    """
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimiser, max(1, round(warmup * steps)), steps)
    if watch is not None:
        watch(0)
    with Progress(label, steps, progress) as bar:
        for step in range(steps):
            value = loss()
            optimiser.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            schedule.step()
            bar.update(loss=f"{value.item():.4f}")
            if watch is not None:
                watch(step + 1)


def scale_initial_weights(model: nn.Module, blocks: int, seed: int) -> None:
    """Draw weights with standard deviation ``d_in ** -0.5``, less where a block writes into the residual stream.

    The default of transformers, 0.02, suits a width of a few thousand; at a hundred it starts with almost no signal.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                continue
            std = parameter[0].numel() ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")):
                std *= (2 * blocks) ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
