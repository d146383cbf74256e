"""The heterogeneous ViT suite: eight tasks on composed scenes, one small ViT, LoRA on q, k, v and o.

Four dense tasks share the photo scenes; a classification, a count, an angle and a saliency mask share the shaded ones.
Scenes, model, training and the base itself are those of ``nsc-merge demo``, whose package documents them. Heads
are fitted on frozen features first. The seed changes the adapters' initialisation, the heads and the order of
batches; base and scenes stay. The same tasks on another base are another suite: ``siglip.py``.

    <work>/<suite>/seed<seed>/<kind>/<task>/    kind: adapters, or permuted (trained on labels in a wrong order)
        adapter/, <task>.safetensors            the PEFT folder and the head
        steps/, steps.jsonl                     along the training, see kept_adapters.py
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nsc_merge.demo import evaluate as demo
from nsc_merge.demo import tasks as demo_tasks
from nsc_merge.demo.data import SCENES, Scene, SceneSet, Split, make_scenes
from nsc_merge.demo.model import Head, load_backbone, load_head, patch_features
from nsc_merge.demo.run import shipped_assets
from nsc_merge.demo.tasks import Task, measure
from nsc_merge.demo.train import LORA_MODULES, fit_adapter, save_adapter, save_head
from nsc_merge.evaluation.heads import Inputs

from ..suite import Log, TaskInfo
from .kept_adapters import keep, kept_entries
from .training import train_missing

if TYPE_CHECKING:
    from peft import PeftModel

CLS = Task("cls", "shaded", False, 10, "acc", False)
SAL = Task("sal", "shaded", True, 2, "mIoU", False)
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *(demo_tasks.TASKS[name] for name in ("semseg", "depth", "normal", "edge")),
        CLS,
        *(demo_tasks.TASKS[name] for name in ("count", "angle")),
        SAL,
    )
}
PERMUTED = ("depth", "count", "sal")
_TRAIN_SEED = 10
_BATCH = 128


@dataclass(frozen=True)
class Base:
    """What the tasks are trained on.

    Attributes:
        name: of the suite, and of its folder.
        load: reads a fresh copy, in float32 and evaluation mode.
        target_modules: last components of the paths of the linears that carry adapters.
    """

    name: str
    load: Callable[[], nn.Module]
    target_modules: Sequence[str]


VIT = Base("vit", lambda: load_backbone(shipped_assets() / "base"), LORA_MODULES)


@dataclass(frozen=True)
class Settings:
    """How much is trained and measured; the defaults are the suite, anything less is for tests.

    Attributes:
        train_scenes: of each kind.
        val_scenes: of each kind: calibration, tuning, and the curves of ``steps.jsonl``.
        test_scenes: of each kind.
        probe_scenes: on whose frozen features heads are fitted first.
        probe_steps: of that fit.
        steps: of adapter and head together.
        kept_steps: how many adapters are kept along the way, from the untrained to the final one.
    """

    train_scenes: int = 8192
    val_scenes: int = 256
    test_scenes: int = 768
    probe_scenes: int = 4096
    probe_steps: int = 300
    steps: int = 300
    kept_steps: int = 26


class ViTSuite:
    """The suite at one seed, all parts trained."""

    def __init__(self, base: Base, folder: Path, seed: int, settings: Settings) -> None:
        self.name, self.seed = base.name, seed
        self.tasks = {
            task.name: TaskInfo(task.name, task.metric, task.lower_is_better, _kind(task)) for task in TASKS.values()
        }
        self.model = base.load()
        self.adapters = {name: folder / "adapters" / name / "adapter" for name in TASKS}
        self.heads = {name: load_head(folder / "adapters" / name, task) for name, task in TASKS.items()}
        counts: dict[Split, int] = {"val": settings.val_scenes, "test": settings.test_scenes}
        self._scenes = {
            split: {kind: _labelled(part) for kind, part in _scene_sets(split, count).items()}
            for split, count in counts.items()
        }
        # Batches are made once, so that tasks on the same scenes share them as objects.
        self._inputs = {
            (split, kind): [{"pixel_values": pixels} for pixels in part.pixels.split(_BATCH)]
            for split, parts in self._scenes.items()
            for kind, part in parts.items()
        }

    def calibration(self, batch: int, steps: int) -> dict[str, list[dict[str, Tensor]]]:
        return demo.calibration_batches(list(TASKS.values()), self._scenes["val"], batch, steps, self.seed)

    def labelled(self, task: str, split: Split) -> list[tuple[dict[str, Tensor], Tensor]]:
        kind = TASKS[task].scene
        labels = self._scenes[split][kind].labels[task].split(_BATCH)
        return list(zip(self._inputs[split, kind], labels, strict=True))

    def output(self, task: str, model: nn.Module, batch: Inputs) -> Tensor:
        """``[N, C]``, or ``[N, 24, 24, C]`` for a dense task."""
        return self.heads[task](patch_features(model, batch["pixel_values"])).movedim(1, -1)

    def loss(self, task: str, output: Tensor, label: Tensor) -> Tensor:
        return demo_tasks.loss(TASKS[task], output.movedim(-1, 1), label)

    def measure(self, task: str, outputs: Tensor, labels: Tensor) -> float:
        return measure(TASKS[task], outputs.movedim(-1, 1), labels)

    def quality(self, task: str, outputs: Tensor, labels: Tensor) -> Tensor:
        direction = -1 if TASKS[task].lower_is_better else 1
        values = [self.measure(task, output[None], label[None]) for output, label in zip(outputs, labels, strict=True)]
        return direction * torch.tensor(values)


def load(
    work: Path,
    seed: int,
    *,
    log: Log = print,
    progress: bool | None = None,
    settings: Settings | None = None,
    permuted: Sequence[str] = (),
    base: Base = VIT,
) -> ViTSuite:
    """The suite at ``seed``; what is missing below ``work`` is trained first.

    Args:
        work: folder for trained parts.
        seed: of adapters, heads and the order of batches.
        log: receives a line per trained part.
        progress: as in :class:`nsc_merge.utils.progress.Progress`.
        settings: the suite's own when None.
        permuted: tasks to train once more, with their labels in a wrong order.
        base: what is adapted; it names the suite.
    """
    settings = settings or Settings()

    @cache
    def train_scenes(kind: Scene) -> SceneSet:
        return _labelled(make_scenes(settings.train_scenes, "train", kind, _TRAIN_SEED + SCENES.index(kind)))

    @cache
    def val_scenes() -> dict[Scene, SceneSet]:
        return {kind: _labelled(part) for kind, part in _scene_sets("val", settings.val_scenes).items()}

    def train_one(part: Path, name: str, permute: bool) -> str:
        task = TASKS[name]
        learnt, held_out = train_scenes(task.scene), val_scenes()[task.scene]
        label = learnt.labels[name]
        if permute:
            label = label[torch.randperm(len(label), generator=torch.Generator().manual_seed(7 + seed))]
        return _train(part, base, task, learnt, label, held_out, settings, progress=progress)

    folder = train_missing(work, base.name, seed, list(TASKS), permuted, train_one, log)
    return ViTSuite(base, folder, seed, settings)


def _train(
    folder: Path,
    base: Base,
    task: Task,
    scenes: SceneSet,
    label: Tensor,
    held_out: SceneSet,
    settings: Settings,
    *,
    progress: bool | None,
) -> str:
    started = time.perf_counter()

    def watch(step: int, model: PeftModel, head: Head) -> None:
        def measured() -> tuple[float, float]:
            output = head(torch.cat([patch_features(model, pixels) for pixels in held_out.pixels.split(_BATCH)]))
            truth = held_out.labels[task.name]
            return demo_tasks.loss(task, output, truth).item(), measure(task, output, truth)

        keep(folder, step, settings.steps, settings.kept_steps, partial(save_adapter, model), measured)

    model, head = fit_adapter(
        base.load(),
        task,
        scenes,
        label,
        probe_steps=settings.probe_steps,
        probe_scenes=settings.probe_scenes,
        steps=settings.steps,
        progress=progress,
        target_modules=base.target_modules,
        watch=watch,
    )
    save_adapter(model, folder / "adapter")
    save_head(head, folder)
    first, last = (kept_entries(folder)[end] for end in (0, -1))
    return (
        f"{task.name}: validation {task.metric} {first['metric']:.4g} -> {last['metric']:.4g}, "
        f"{time.perf_counter() - started:.0f} s"
    )


def _labelled(scenes: SceneSet) -> SceneSet:
    """With the labels of the two tasks that the demo does not have."""
    return replace(scenes, labels={**scenes.labels, CLS.name: scenes.primary, SAL.name: scenes.salient.long()})


def _scene_sets(split: Split, count: int) -> dict[Scene, SceneSet]:
    return demo.scene_sets(list(TASKS.values()), split, count)


def _kind(task: Task) -> str:
    if task.dense:
        return "dense"
    return "classification" if task.metric == "acc" else "regression"
