"""Makes the demo's assets from nothing: pre-trains the ViT, then trains one PEFT adapter and one head per
task.

Everything is stored as float16 safetensors. The settings are those of a small study that preceded the demo:
gently trained adapters (the head is first fitted on frozen features, then trained together with the adapter),
because adapters trained hard together with a random head cannot be merged by any method at this size.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsc_merge.demo.data import SCENES, Scene, SceneSet, make_scenes
from nsc_merge.demo.model import (
    PATCH,
    PATCHES,
    WIDTH,
    Head,
    load_backbone,
    new_backbone,
    patch_features,
    to_image,
)
from nsc_merge.demo.tasks import TASKS, Task, loss, measure
from nsc_merge.utils.progress import Progress

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

RANK = 8
LORA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj"]

_PRETRAIN_SCENES = 16384
_PRETRAIN_STEPS = 4500
_PRETRAIN_BATCH = 64
_PRETRAIN_LR = 1.5e-3
_TRAIN_SCENES = 8192
_PROBE_STEPS = 300
_PROBE_SCENES = 4096
_ADAPTER_STEPS = 300
_ADAPTER_BATCH = 48
_ADAPTER_LR = 1.5e-3
_HELD_OUT = 512

Log = Callable[[str], None]


def retrain(assets: Path, *, seed: int = 0, log: Log = print, progress: bool | None = None) -> None:
    """Write base, adapters and heads into ``assets``; parts that are already there are kept.

    Args:
        assets: folder to fill; ``base/``, ``adapters/<task>/`` and ``heads/<task>.safetensors`` appear in it.
        seed: seeds the initialisation, the scenes and the order of batches.
        log: receives one line per finished part.
        progress: True draws a bar and False shows nothing; None draws it on a terminal and prints lines elsewhere.
    """
    assets.mkdir(parents=True, exist_ok=True)
    if (assets / "base" / "model.safetensors").exists():
        log(f"{assets / 'base'} is already there: kept (delete it to train it again)")
    else:
        pretrain(assets / "base", seed=seed, log=log, progress=progress)
    sets: dict[str, SceneSet] = {}
    for task in TASKS.values():
        if (assets / "heads" / f"{task.name}.safetensors").exists():
            log(f"{task.name} is already there: kept")
            continue
        if task.scene not in sets:
            sets[task.scene] = make_scenes(
                _TRAIN_SCENES, "train", task.scene, seed=_scene_seed(seed, task.scene)
            )
        train_adapter(assets, task, sets[task.scene], seed=seed, log=log, progress=progress)


def pretrain(
    folder: Path,
    *,
    seed: int,
    log: Log,
    progress: bool | None,
    new_model: Callable[[int], PreTrainedModel] = new_backbone,
    features: Callable[..., Tensor] = patch_features,
) -> None:
    """Pre-train on masked reconstruction and per-pixel digit segmentation; save the model in ``folder``.

    Args:
        folder: for the transformers model, in float16.
        seed: of weights, scenes and the order of batches.
        log: receives one line.
        progress: as in :class:`Progress`.
        new_model: makes the model of a seed, with a trainable ``embeddings.mask_token``.
        features: of the patch tokens, ``[N, 36, 64]``, given the model, pixels and ``bool_masked_pos`` ``[N, 36]``.
    """
    started = time.perf_counter()
    torch.manual_seed(seed)
    scenes = [
        make_scenes(_PRETRAIN_SCENES, "train", scene, _scene_seed(seed, scene) + 900) for scene in SCENES
    ]
    pixels, clean, digits = (
        torch.cat([getattr(part, field) for part in scenes]) for field in ("pixels", "clean", "digits")
    )
    held_out = [make_scenes(_HELD_OUT, "val", scene, _scene_seed(seed, scene) + 950) for scene in SCENES]
    model = new_model(seed)
    reconstruct, segment = nn.Linear(WIDTH, PATCH**2), nn.Linear(WIDTH, 11 * PATCH**2)
    parameters = [*model.parameters(), *reconstruct.parameters(), *segment.parameters()]
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.05},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=_PRETRAIN_LR,
        betas=(0.9, 0.95),
    )

    def losses(x: Tensor, target: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        masked = torch.rand(len(x), PATCHES, device="cpu") < 0.4
        masked[: len(x) // 3] = False
        tokens = features(model, x, bool_masked_pos=masked)
        rebuilt = to_image(reconstruct(tokens))
        return F.mse_loss(rebuilt, target), F.cross_entropy(to_image(segment(tokens)), label.long())

    model.train()
    with Progress("pre-training", _PRETRAIN_STEPS, progress) as bar:
        for step in range(_PRETRAIN_STEPS):
            _set_rate(optimiser, _PRETRAIN_LR, step, _PRETRAIN_STEPS, warmup=200)
            rows = torch.randint(len(pixels), (_PRETRAIN_BATCH,), device="cpu")
            rebuild, digit = losses(pixels[rows], clean[rows], digits[rows])
            _update(optimiser, rebuild + 0.5 * digit, parameters)
            bar.update(loss=f"{rebuild.item():.3f}+{digit.item():.3f}")
    model.eval()
    with torch.no_grad():
        scores = [
            [value.item() for value in losses(part.pixels, part.clean, part.digits)] for part in held_out
        ]
    summary = ", ".join(
        f"{scene}: reconstruction {rebuild:.3f}, digits {digit:.3f}"
        for scene, (rebuild, digit) in zip(SCENES, scores, strict=True)
    )
    model.get_submodule("embeddings").register_parameter("mask_token", None)
    model.half().save_pretrained(folder)
    log(f"base pre-trained in {time.perf_counter() - started:.0f} s; held-out losses: {summary}")


def train_adapter(
    assets: Path, task: Task, scenes: SceneSet, *, seed: int, log: Log, progress: bool | None
) -> None:
    """Train the head on frozen features, then head and LoRA together; save both under ``assets``."""
    started = time.perf_counter()
    torch.manual_seed(1000 * seed + list(TASKS).index(task.name))
    model, head = fit_adapter(
        load_backbone(assets / "base"),
        task,
        scenes,
        scenes.labels[task.name],
        probe_steps=_PROBE_STEPS,
        probe_scenes=_PROBE_SCENES,
        steps=_ADAPTER_STEPS,
        progress=progress,
    )

    held_out = make_scenes(_HELD_OUT, "val", task.scene, _scene_seed(seed, task.scene) + 1)
    model.eval()
    with torch.no_grad():
        truth = held_out.labels[task.name]
        score = measure(task, head(patch_features(model, held_out.pixels)), truth)
        with model.disable_adapter():
            base_score = measure(task, head(patch_features(model, held_out.pixels)), truth)

    save_adapter(model.half(), assets / "adapters" / task.name)
    save_head(head.half(), assets / "heads")
    log(
        f"{task.name}: validation {task.metric} {score:.4g} (base with this head: {base_score:.4g}), "
        f"{time.perf_counter() - started:.0f} s"
    )


def fit_adapter(
    backbone: nn.Module,
    task: Task,
    scenes: SceneSet,
    label: Tensor,
    *,
    probe_steps: int,
    probe_scenes: int,
    steps: int,
    progress: bool | None,
    target_modules: Sequence[str] = LORA_MODULES,
    watch: Callable[[int, PeftModel, Head], None] | None = None,
) -> tuple[PeftModel, Head]:
    """Train a head on the backbone's features, then a LoRA adapter together with it.

    All random choices come from torch's global generator.

    Args:
        backbone: to be adapted; it becomes part of what is returned.
        task: what the head predicts.
        scenes: to learn from.
        label: of ``scenes``, as in :attr:`SceneSet.labels`.
        probe_steps: of the head alone, on the features of the first ``probe_scenes`` scenes.
        probe_scenes: see ``probe_steps``.
        steps: of head and adapter together.
        progress: as in :class:`Progress`.
        target_modules: last components of the paths of the linears that LoRA is trained on.
        watch: called with the number of steps done, before the first step and after every step.
    """
    from peft import LoraConfig, get_peft_model

    head = Head(task)
    _fit_head(backbone, head, scenes.pixels[:probe_scenes], label, probe_steps)
    model = get_peft_model(
        backbone,
        LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules=list(target_modules), bias="none"),
    )
    parameters = [p for p in [*model.parameters(), *head.parameters()] if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=_ADAPTER_LR, weight_decay=1e-6)
    if watch is not None:
        watch(0, model, head)
    with Progress(f"{task.name} adapter", steps, progress) as bar:
        for step in range(steps):
            _set_rate(optimiser, _ADAPTER_LR, step, steps, warmup=max(1, round(0.06 * steps)))
            rows = torch.randint(len(scenes), (_ADAPTER_BATCH,), device="cpu")
            value = loss(task, head(patch_features(model, scenes.pixels[rows])), label[rows])
            _update(optimiser, value, parameters)
            bar.update(loss=f"{value.item():.4f}")
            if watch is not None:
                watch(step + 1, model, head)
    return model, head


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write a PEFT folder that is the same wherever it is trained: no local path, no list in a set's order."""
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = None
    if isinstance(config["target_modules"], list):
        config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_head(head: Head, folder: Path) -> None:
    """Write ``folder/<task>.safetensors``, which :func:`nsc_merge.demo.model.load_head` reads."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    tensors = {name: value.contiguous() for name, value in head.state_dict().items()}
    save_file(tensors, folder / f"{head.task.name}.safetensors")


def _fit_head(backbone: nn.Module, head: Head, pixels: Tensor, label: Tensor, steps: int) -> None:
    """Train ``head`` alone on the frozen features of ``pixels``."""
    with torch.no_grad():
        features = torch.cat([patch_features(backbone, x) for x in pixels.split(512)])
    optimiser = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        rows = torch.randint(len(features), (64 if head.task.dense else 256,), device="cpu")
        value = loss(head.task, head(features[rows]), label[rows])
        optimiser.zero_grad()
        value.backward()
        optimiser.step()


def _update(optimiser: torch.optim.Optimizer, value: Tensor, parameters: Iterable[Tensor]) -> None:
    optimiser.zero_grad()
    value.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimiser.step()


def _set_rate(optimiser: torch.optim.Optimizer, peak: float, step: int, steps: int, warmup: int) -> None:
    rate = peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimiser.param_groups:
        group["lr"] = rate


def _scene_seed(seed: int, scene: Scene) -> int:
    return 10_000 * seed + 10 + SCENES.index(scene)
