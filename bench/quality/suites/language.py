"""What the language suites share: heads on frozen features, adapters written by PEFT, and a suite on padded text."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nsc_merge.demo.train import RANK, save_adapter
from nsc_merge.evaluation.heads import Inputs
from nsc_merge.evaluation.metrics import IGNORE

from ..suite import TaskInfo
from .kept_adapters import keep, kept_entries
from .training import train

if TYPE_CHECKING:
    from peft import PeftModel

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Settings:
    """How much is trained and measured; a suite's defaults are the suite, anything less is for tests.

    Attributes:
        train: examples of a task.
        val: calibration, tuning, and the curves along training.
        test: examples that are measured.
        steps: of an adapter.
        batch: examples of a step.
        lr: highest learning rate of an adapter.
        kept_steps: how many adapters are kept along the way, from the untrained to the final one.
    """

    train: int = 4096
    val: int = 256
    test: int = 768
    steps: int = 200
    batch: int = 16
    lr: float = 2e-3
    kept_steps: int = 26


@dataclass(frozen=True)
class Examples:
    """Inputs of a transformers model with as many labels as rows."""

    inputs: dict[str, Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, chosen: Tensor | slice) -> tuple[dict[str, Tensor], Tensor]:
        return {name: value[chosen] for name, value in self.inputs.items()}, self.labels[chosen]

    def batches(self, size: int) -> list[tuple[dict[str, Tensor], Tensor]]:
        return [self.rows(slice(start, start + size)) for start in range(0, len(self), size)]


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """The last real token's features next to their mean over real tokens, ``[N, 2 d]``."""
    weights = mask.to(hidden)[..., None]
    mean = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
    return torch.cat([hidden[torch.arange(len(mask)), mask.sum(1) - 1], mean], 1)


def fit_head(features: Tensor, labels: Tensor, head: nn.Linear, loss: Loss, *, steps: int, batch: int = 128) -> None:
    """Fit a head alone, on features that do not change."""

    def one() -> Tensor:
        rows = torch.randint(len(labels), (batch,))
        return loss(head(features[rows]), labels[rows])

    train(one, head.parameters(), label="head", steps=steps, lr=1e-2, weight_decay=0.0, progress=False)


def permute(examples: Examples) -> Examples:
    """The same inputs with the labels in another order, from torch's global generator."""
    return type(examples)(examples.inputs, examples.labels[torch.randperm(len(examples))])


def with_lora(model: nn.Module, target_modules: list[str] | str, *, rank: int = RANK, **others: Any) -> PeftModel:
    """``model`` with an untrained LoRA.

    Args:
        model: to be adapted; it becomes part of what is returned.
        target_modules: the linears, as PEFT understands it.
        rank: of the updates, and their ``lora_alpha``.
        others: of PEFT's configuration.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=target_modules, bias="none", **others)
    return get_peft_model(model, config)


def train_adapter(
    folder: Path,
    model: PeftModel,
    output: Callable[[Inputs], Tensor],
    loss: Loss,
    measure: Callable[[Tensor, Tensor], float],
    examples: Examples,
    held_out: Examples,
    *,
    task: str,
    settings: Settings,
    progress: bool | None,
    head: nn.Module | None = None,
    drawn: Callable[[], Tensor] | None = None,
) -> str:
    """Train a PEFT model and save its adapter.

    Args:
        folder: for ``adapter/``, and what :mod:`.kept_adapters` keeps.
        model: to be trained.
        output: of the task, given model inputs.
        loss: given outputs and labels.
        measure: the metric, given outputs and labels.
        examples: to learn from, in an order from torch's global generator.
        held_out: measured along the training.
        task: its name, for the progress display.
        settings: steps, batch, learning rate and how many adapters are kept.
        progress: as in :class:`nsc_merge.utils.progress.Progress`.
        head: trained together with the adapter, if the task has one.
        drawn: gives the rows of a step, from torch's global generator; any, as often as others, when None.

    Returns:
        What came of it, in words.
    """
    started = time.perf_counter()
    save = partial(save_adapter, model)

    def step() -> Tensor:
        rows = torch.randint(len(examples), (settings.batch,)) if drawn is None else drawn()
        inputs, label = examples.rows(rows)
        return loss(output(inputs), label)

    def measured() -> tuple[float, float]:
        outputs = torch.cat([output(inputs) for inputs, _ in held_out.batches(256)])
        return loss(outputs, held_out.labels).item(), measure(outputs, held_out.labels)

    train(
        step,
        [p for part in (model, head) if part is not None for p in part.parameters() if p.requires_grad],
        label=f"{task} adapter",
        steps=settings.steps,
        lr=settings.lr,
        weight_decay=1e-6,
        progress=progress,
        watch=lambda done: keep(folder, done, settings.steps, settings.kept_steps, save, measured),
    )
    save(folder / "adapter")
    first, last = (kept_entries(folder)[end] for end in (0, -1))
    return f"{task}: validation loss {first['loss']:.3f} -> {last['loss']:.3f}, {time.perf_counter() - started:.0f} s"


def calibration(sets: Mapping[str, Examples], batch: int, steps: int, seed: int) -> dict[str, list[dict[str, Tensor]]]:
    """Task -> ``steps`` batches of inputs, drawn without labels in an order that the seed gives."""
    found = {}
    for number, (task, examples) in enumerate(sets.items()):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        order = torch.cat(
            [torch.randperm(len(examples), generator=generator) for _ in range(1 + batch * steps // len(examples))]
        )
        found[task] = [examples.rows(rows)[0] for rows in order[: batch * steps].split(batch)]
    return found


def regression_loss(output: Tensor, label: Tensor) -> Tensor:
    """Of ``output [N, 1]``; labels are scaled to a spread of about 1."""
    return nn.functional.smooth_l1_loss(output[:, 0], label, beta=0.5)


def absolute_error(outputs: Tensor, labels: Tensor) -> float:
    """Mean, of ``outputs [N, 1]``."""
    return (outputs[:, 0] - labels).abs().mean().item()


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    return (outputs.argmax(-1) == labels).float().mean().item()


def answer_loss(output: Tensor, label: Tensor) -> Tensor:
    """Of tokens that were to be written, the mean over those that are not IGNORE."""
    return nn.functional.cross_entropy(output.flatten(0, -2), label.flatten(), ignore_index=IGNORE)


def right(outputs: Tensor, labels: Tensor) -> Tensor:
    """1 where every token of an answer is right, which greedy decoding then writes as well."""
    return ((outputs.argmax(-1) == labels) | (labels == IGNORE)).view(len(labels), -1).all(1).float()


def share_right(outputs: Tensor, labels: Tensor) -> float:
    """The share of answers that are right."""
    return right(outputs, labels).mean().item()


class TextSuite:
    """What :class:`bench.quality.suite.Suite` asks for, over :class:`Examples`."""

    name: str
    batch = 64

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        tasks: Mapping[str, TaskInfo],
        sets: dict[str, dict[str, Examples]],
        seed: int,
    ) -> None:
        self.model, self.tasks, self.sets, self.seed = model, dict(tasks), sets, seed
        self.adapters = {name: folder / "adapters" / name / "adapter" for name in tasks}

    def calibration(self, batch: int, steps: int) -> dict[str, list[dict[str, Tensor]]]:
        return calibration(self.sets["val"], batch, steps, self.seed)

    def labelled(self, task: str, split: str) -> list[tuple[dict[str, Tensor], Tensor]]:
        return self.sets[split][task].batches(self.batch)

    def loss(self, task: str, output: Tensor, label: Tensor) -> Tensor:
        if self.tasks[task].kind == "regression":
            return regression_loss(output, label)
        return nn.functional.cross_entropy(output, label)

    def measure(self, task: str, outputs: Tensor, labels: Tensor) -> float:
        if self.tasks[task].kind == "regression":
            return absolute_error(outputs, labels)
        return accuracy(outputs, labels)

    def quality(self, task: str, outputs: Tensor, labels: Tensor) -> Tensor:
        if self.tasks[task].kind == "regression":
            return -(outputs[:, 0] - labels).abs()
        return (outputs.argmax(-1) == labels).float()

    def output(self, task: str, model: nn.Module, batch: Inputs) -> Tensor:
        raise NotImplementedError

    def next_tokens(self, model: nn.Module, batch: Inputs) -> Tensor:
        """Logits ``[N, T, V]`` of what follows every token, where tasks write."""
        return model(**batch).logits


def masks(lengths: Sequence[int] | Tensor, width: int) -> Tensor:
    """``[N, width]``, 1 at the first tokens of every row."""
    return (torch.arange(width) < torch.as_tensor(lengths)[:, None]).long()
