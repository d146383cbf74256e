"""The heterogeneous ViT suite: eight tasks on composed scenes, one small ViT, LoRA on q, k, v and o.

Four dense tasks share the photo scenes; a classification, a count, an angle and a saliency mask share the shaded ones.
Scenes, model, training and the base itself are those of ``nsc-merge demo``, whose package documents them. Heads
are fitted on frozen features first. The seed changes the adapters' initialisation, the heads and the order of
batches; base and scenes stay.

    <work>/vit/seed<seed>/<kind>/<task>/     kind: adapters, or permuted (trained on labels in a wrong order)
        adapter/, <task>.safetensors         the PEFT folder and the head
        steps/<number>/                      the adapter after so many steps, as a PEFT folder
        steps.jsonl                          step, validation loss and metric
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from suite import Inputs, Log, TaskInfo, building
from torch import Tensor, nn

from nsc_merge.demo import evaluate as demo
from nsc_merge.demo import tasks as demo_tasks
from nsc_merge.demo.data import SCENES, Scene, SceneSet, Split, make_scenes
from nsc_merge.demo.model import Head, load_backbone, load_head, patch_features
from nsc_merge.demo.run import shipped_assets
from nsc_merge.demo.tasks import Task, measure
from nsc_merge.demo.train import fit_adapter, save_adapter, save_head

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

    name = "vit"

    def __init__(self, folder: Path, seed: int, settings: Settings) -> None:
        self.seed = seed
        self.tasks = {
            task.name: TaskInfo(task.name, task.metric, task.lower_is_better, _kind(task))
            for task in TASKS.values()
        }
        self.model = load_backbone(shipped_assets() / "base")
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
        values = [
            self.measure(task, output[None], label[None])
            for output, label in zip(outputs, labels, strict=True)
        ]
        return direction * torch.tensor(values)


def load(
    work: Path,
    seed: int,
    *,
    log: Log = print,
    progress: bool | None = None,
    settings: Settings | None = None,
    permuted: Sequence[str] = (),
) -> ViTSuite:
    """The suite at ``seed``; what is missing below ``work`` is trained first.

    Args:
        work: folder for trained parts.
        seed: of adapters, heads and the order of batches.
        log: receives a line per trained part.
        progress: as in :class:`nsc_merge.progress.Progress`.
        settings: the suite's own when None.
        permuted: tasks to train once more, with their labels in a wrong order.
    """
    settings = settings or Settings()
    folder = work / "vit" / f"seed{seed}"
    missing = [
        (kind, TASKS[name])
        for kind, names in (("adapters", TASKS), ("permuted", permuted))
        for name in names
        if not (folder / kind / name).is_dir()
    ]
    train_sets: dict[Scene, SceneSet] = {}
    val_sets = _scene_sets("val", settings.val_scenes) if missing else {}
    for kind, task in missing:
        if task.scene not in train_sets:
            train_sets[task.scene] = _labelled(
                make_scenes(
                    settings.train_scenes, "train", task.scene, _TRAIN_SEED + SCENES.index(task.scene)
                )
            )
        with building(folder / kind / task.name) as part:
            log(
                f"vit seed {seed} {kind}: "
                + _train(
                    part,
                    task,
                    train_sets[task.scene],
                    _labelled(val_sets[task.scene]),
                    seed,
                    settings,
                    permute=kind == "permuted",
                    progress=progress,
                )
            )
    return ViTSuite(folder, seed, settings)


def kept_adapters(
    work: Path, seed: int, task: str, kind: str = "adapters"
) -> list[tuple[dict[str, float], Path]]:
    """Of every step that was kept: ``step``, ``loss`` and ``metric`` on validation scenes, and the PEFT folder.

    Empty if the task was not trained that way.
    """
    folder = work / "vit" / f"seed{seed}" / kind / task
    if not folder.is_dir():
        return []
    lines = (folder / "steps.jsonl").read_text(encoding="utf-8").splitlines()
    return [(entry, folder / "steps" / f"{entry['step']:04d}") for entry in map(json.loads, lines)]


def _train(
    folder: Path,
    task: Task,
    scenes: SceneSet,
    held_out: SceneSet,
    seed: int,
    settings: Settings,
    *,
    permute: bool,
    progress: bool | None,
) -> str:
    started = time.perf_counter()
    torch.manual_seed(1000 * seed + list(TASKS).index(task.name))
    label = scenes.labels[task.name]
    if permute:
        label = label[torch.randperm(len(label), generator=torch.Generator().manual_seed(7 + seed))]
    every = max(1, math.ceil(settings.steps / (settings.kept_steps - 1)))
    entries: list[dict[str, float]] = []

    def watch(step: int, model: PeftModel, head: Head) -> None:
        if step % every and step != settings.steps:
            return
        with torch.no_grad():
            output = head(
                torch.cat([patch_features(model, pixels) for pixels in held_out.pixels.split(_BATCH)])
            )
        truth = held_out.labels[task.name]
        loss = demo_tasks.loss(task, output, truth).item()
        entries.append({"step": step, "loss": loss, "metric": measure(task, output, truth)})
        save_adapter(model, folder / "steps" / f"{step:04d}")

    model, head = fit_adapter(
        load_backbone(shipped_assets() / "base"),
        task,
        scenes,
        label,
        probe_steps=settings.probe_steps,
        probe_scenes=settings.probe_scenes,
        steps=settings.steps,
        progress=progress,
        watch=watch,
    )
    save_adapter(model, folder / "adapter")
    save_head(head, folder)
    (folder / "steps.jsonl").write_text(
        "".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8"
    )
    first, last = entries[0], entries[-1]
    return (
        f"{task.name}: validation {task.metric} {first['metric']:.4g} -> {last['metric']:.4g}, "
        f"{time.perf_counter() - started:.0f} s"
    )


def _labelled(scenes: SceneSet) -> SceneSet:
    """With the labels of the two tasks that the demo does not have."""
    return replace(
        scenes, labels={**scenes.labels, CLS.name: scenes.primary, SAL.name: scenes.salient.long()}
    )


def _scene_sets(split: Split, count: int) -> dict[Scene, SceneSet]:
    return demo.scene_sets(list(TASKS.values()), split, count)


def _kind(task: Task) -> str:
    if task.dense:
        return "dense"
    return "classification" if task.metric == "acc" else "regression"
