"""Measures merged models on the demo's tasks and tunes task arithmetic with labels, for comparison."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from nsc_merge.adapters import Adapter, load_adapter
from nsc_merge.api import merge
from nsc_merge.demo.data import SCENES, Scene, SceneSet, Split, make_scenes
from nsc_merge.demo.model import Head, load_backbone, load_head, patch_features
from nsc_merge.demo.tasks import TASKS, Task, loss, measure, normalised
from nsc_merge.evaluation.normalise import Scores, average
from nsc_merge.results.result import MergeResult

if TYPE_CHECKING:
    from transformers import ViTModel

VALIDATION_SCENES = 256
TEST_SCENES = 768
FOLDS = 8
COARSE_SCALES = tuple(round(0.1 * step, 1) for step in range(1, 11))
FINE_STEP = 0.05

Name = TypeVar("Name", str, float)
Given = TypeVar("Given")
Found = TypeVar("Found")

_SPLIT_SEED = {"val": 7_000, "test": 8_000}


@dataclass(frozen=True)
class Bundle:
    """The trained parts: base, one adapter and one head per task."""

    backbone: ViTModel
    adapters: dict[str, Adapter]
    heads: dict[str, Head]

    @property
    def tasks(self) -> list[Task]:
        return [head.task for head in self.heads.values()]


def load_bundle(assets: Path, tasks: Sequence[str]) -> Bundle:
    """Load base, adapters and heads from ``assets``.

    Raises:
        FileNotFoundError: if a part is missing.
    """
    if not (assets / "base" / "model.safetensors").is_file():
        raise FileNotFoundError(f"assets: {assets} holds no base/model.safetensors; make it with --retrain")
    return Bundle(
        backbone=load_backbone(assets / "base"),
        adapters={name: load_adapter(assets / "adapters" / name, name) for name in tasks},
        heads={name: load_head(assets / "heads", TASKS[name]) for name in tasks},
    )


def scene_sets(tasks: Sequence[Task], split: Split, count: int) -> dict[Scene, SceneSet]:
    """Kind of scene -> ``count`` scenes, for the kinds that ``tasks`` live on."""
    wanted = {task.scene for task in tasks}
    return {
        kind: make_scenes(count, split, kind, _SPLIT_SEED[split] + index)
        for index, kind in enumerate(SCENES)
        if kind in wanted
    }


def calibration_batches(
    tasks: Sequence[Task], scenes: Mapping[Scene, SceneSet], batch: int, count: int, seed: int
) -> dict[str, list[dict[str, Tensor]]]:
    """Task -> ``count`` batches of unlabelled images, shuffled anew on every pass over the scenes.

    Tasks on one kind of scene share their batches, as their data sets coincide.
    """
    batches: dict[str, list[dict[str, Tensor]]] = {}
    for kind, part in scenes.items():
        generator = torch.Generator().manual_seed(100 * seed + SCENES.index(kind))
        passes = -(-count * batch // len(part))
        order = torch.cat([torch.randperm(len(part), generator=generator, device="cpu") for _ in range(passes)])
        batches[kind] = [{"pixel_values": part.pixels[rows]} for rows in order.split(batch)[:count]]
    return {task.name: batches[task.scene] for task in tasks}


@torch.inference_mode()
def predict(
    model: nn.Module, heads: Mapping[str, Head], scenes: Mapping[Scene, SceneSet]
) -> dict[str, Tensor]:
    """Task -> predictions on the scenes that it lives on; one pass of the backbone per kind of scene."""
    outputs = {}
    for kind in sorted({head.task.scene for head in heads.values()}):
        features = torch.cat([patch_features(model, part) for part in scenes[kind].pixels.split(128)])
        outputs.update({name: head(features) for name, head in heads.items() if head.task.scene == kind})
    return {name: outputs[name] for name in heads}


def predict_each(
    bundle: Bundle, merges: Mapping[Name, MergeResult], scenes: Mapping[Scene, SceneSet]
) -> dict[Name, dict[str, Tensor]]:
    """Name -> predictions of the base with that merge."""

    def one(merged: MergeResult) -> dict[str, Tensor]:
        return predict(merged_model(bundle, merged), bundle.heads, scenes)

    return dict(zip(merges, _two_at_a_time(one, merges.values()), strict=True))


def _two_at_a_time(function: Callable[[Given], Found], values: Iterable[Given]) -> list[Found]:
    """``function`` of every value; a model this small is quickest on one core, so that two of them take two."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(function, values))


def score(
    outputs: Mapping[str, Tensor], heads: Mapping[str, Head], scenes: Mapping[Scene, SceneSet]
) -> Scores:
    """Metric and loss of every task's predictions."""
    metrics, losses = {}, {}
    for name, output in outputs.items():
        task = heads[name].task
        label = scenes[task.scene].labels[name]
        metrics[name] = measure(task, output, label)
        losses[name] = loss(task, output, label).item()
    return Scores(metrics, losses)


def percents(scores: Scores, reference: Scores) -> dict[str, float]:
    """Task -> percent of ``reference``, higher is better."""
    return scores.normalised(reference, {name: task.lower_is_better for name, task in TASKS.items()})


def standard_error(
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    heads: Mapping[str, Head],
    scenes: Mapping[Scene, SceneSet],
    reference: Scores,
) -> float:
    """Standard error, over :data:`FOLDS` parts of the scenes, of the gap between two methods' averages."""
    gaps = torch.zeros(FOLDS, device="cpu")
    for name, head in heads.items():
        parts = (
            values.chunk(FOLDS) for values in (ours[name], theirs[name], scenes[head.task.scene].labels[name])
        )
        for fold, (our, their, label) in enumerate(zip(*parts, strict=True)):
            our_percent, their_percent = (
                normalised(head.task, measure(head.task, output, label), reference.metrics[name])
                for output in (our, their)
            )
            gaps[fold] += (our_percent - their_percent) / len(heads)
    return (gaps.std() / FOLDS**0.5).item()


def merged_model(bundle: Bundle, result: MergeResult) -> nn.Module:
    """A copy of the base with the merged update in its weights."""
    return result.apply(copy.deepcopy(bundle.backbone))


def task_arithmetic(bundle: Bundle, scale: float) -> MergeResult:
    """All adapters with one coefficient."""
    return merge(bundle.backbone, bundle.adapters, method="task_arithmetic", scale=scale)


def distilled_outputs(bundle: Bundle) -> dict[str, Any]:
    """The options by which ``method="distill"`` sees what the tasks' heads predict."""

    def through(head: Head) -> Callable[[nn.Module, Mapping[str, Tensor]], Tensor]:
        return lambda model, batch: head(patch_features(model, batch["pixel_values"])).movedim(1, -1)

    return {
        "outputs": {name: through(head) for name, head in bundle.heads.items()},
        "likelihood": {task.name: "categorical" if task.classes else "gaussian" for task in bundle.tasks},
    }


def predict_alone(bundle: Bundle, scenes: Mapping[Scene, SceneSet]) -> dict[str, Tensor]:
    """Task -> predictions of the base with that task's adapter alone, in full."""
    own = {
        name: merge(bundle.backbone, {name: adapter}, method="task_arithmetic", scale=1.0)
        for name, adapter in bundle.adapters.items()
    }

    def one(name: str) -> dict[str, Tensor]:
        return predict(merged_model(bundle, own[name]), {name: bundle.heads[name]}, scenes)

    return {name: output for found in _two_at_a_time(one, own) for name, output in found.items()}


@dataclass(frozen=True)
class TunedScales:
    """Scales of task arithmetic chosen with labels: by the normalised average, and by the summed loss."""

    by_average: float
    by_loss: float


def tune_task_arithmetic(bundle: Bundle, scenes: Mapping[Scene, SceneSet]) -> TunedScales:
    """Choose the scale on labelled ``scenes``: :data:`COARSE_SCALES` first, then one finer step to each side.

    The summed raw loss is how the paper's supplement tunes its baselines; the normalised average is what
    tables report, and so the stronger baseline.
    """
    reference = score(predict_alone(bundle, scenes), bundle.heads, scenes)
    measured: dict[float, Scores] = {}

    def best(quality: Callable[[Scores], float]) -> float:
        def top(scales: Sequence[float]) -> float:
            merges = {scale: task_arithmetic(bundle, scale) for scale in scales if scale not in measured}
            for scale, outputs in predict_each(bundle, merges, scenes).items():
                measured[scale] = score(outputs, bundle.heads, scenes)
            return max(scales, key=lambda scale: quality(measured[scale]))

        coarse = top(COARSE_SCALES)
        return top([round(coarse + step * FINE_STEP, 2) for step in (-1, 0, 1)])

    return TunedScales(
        by_average=best(lambda scores: average(percents(scores, reference))),
        by_loss=best(lambda scores: -sum(scores.losses.values())),
    )
