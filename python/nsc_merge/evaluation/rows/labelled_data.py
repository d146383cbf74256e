"""Labelled data of a task: of safetensors, or made of raw data as calibration is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsc_merge.calibration.batch_files import Batches, read_batches
from nsc_merge.calibration.batches import MASK
from nsc_merge.calibration.on_disk import Keep, in_memory
from nsc_merge.calibration.raw.labels import LABELS, Labelling
from nsc_merge.calibration.raw.reading import batches_of, is_raw
from nsc_merge.evaluation.eval_recipe import TaskRecipe
from nsc_merge.evaluation.metrics import absolute_error, cross_entropy, squared_error
from nsc_merge.models.real_tokens import of_tokens
from nsc_merge.recipes.calibration_keys import CalibrationSource


def read_labelled(
    place: Path | CalibrationSource,
    task: TaskRecipe,
    recipe: Any,
    argument: str,
    *,
    predicts_tokens: bool,
    in_front: bool = False,
    classes: Sequence[str],
    count: int | None = None,
    tags: bool = False,
    keep: Keep = in_memory,
) -> tuple[Batches, str]:
    """Batches of inputs with labels, and the name of these among the tensors.

    Args:
        place: safetensors, or raw data.
        task: whose they are.
        recipe: of the evaluation.
        argument: how messages call the data.
        predicts_tokens: whether the outputs are logits of tokens, and labels of raw data the tokens of an answer.
        in_front: whether texts of raw data are padded in front, as what is written behind them needs it.
        classes: names of the task's classes, where they are known.
        count: of the classes, where it is known.
        tags: whether the outputs are logits of classes of tokens, and labels of raw data those of words.
        keep: where what is made of raw data is held.

    Raises:
        FileNotFoundError, ValueError: naming ``argument``, what was found and what was expected.
    """
    if isinstance(place, CalibrationSource) and place.local and not is_raw(place.source):
        place = Path(place.source)
    if isinstance(place, Path):
        name = task.labels or LABELS
        batches = read_batches(place, recipe.batch_size, argument)
        if name not in batches.names:
            raise ValueError(f"{argument}: expected a tensor {name!r} in {place}, found {batches.names}")
    else:
        name = LABELS
        kind = _kind(task, argument, tokens=task.generate or predicts_tokens, tags=tags)
        labelling = Labelling(kind, task.labels, classes, count, generated=task.generate)
        settings = place.settings
        # All samples, whatever is drawn for methods.
        settings = replace(
            settings,
            samples=settings.samples if "samples" in place.own else None,
            padding_side="left" if in_front else settings.padding_side,
            target=None,
        )
        batches = batches_of(
            place.source, recipe.model, settings, recipe.batch_size, argument, local=place.local,
            base_revision=recipe.revision, labelling=labelling, keep=keep,
        )  # fmt: skip
    _check_numbers(batches, name, argument)
    return batches, name


def _kind(task: TaskRecipe, argument: str, *, tokens: bool, tags: bool) -> str:
    """What the labels of raw data are to be, for a task's metric."""
    metric = task.metric
    if task.alone and metric.compares is not None:
        return metric.compares
    if tokens:
        return "answer"
    if metric.loss is cross_entropy:
        return "tags" if tags else "class"
    if metric.loss in (squared_error, absolute_error):
        return "value"
    if metric.several:
        return "classes"
    raise ValueError(
        f"{argument}: raw data hold classes, numbers or answers, and {metric.name} is of others; expected .safetensors "
        "of inputs and labels"
    )


def _check_numbers(batches: Batches, labels: str, argument: str) -> None:
    """Refuse data of which no figure would be a number, whatever is measured; masks may be infinite."""
    for batch in batches:
        for name, value in batch.items():
            if not value.is_floating_point() or name.endswith(MASK):
                continue
            wrong = value.isinf() if name == labels else ~value.isfinite()
            if bool(wrong.any()):
                way = ", or NaN where none is known" if name == labels else ""
                raise ValueError(f"{argument}: expected finite numbers in {name}{way}, found {float(value[wrong][0])}")


def padded_behind(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The same texts, their tokens and labels, with padding at the end: in front, padding would be asked for the first
    token, and models of absolute positions (GPT-2) would count it.
    """
    mask = of_tokens(batch.get(MASK))
    if mask is None or "position_ids" in batch or bool((mask[:, 0] != 0).all()):
        return batch
    first = (mask != 0).int().argmax(1)
    places = (torch.arange(mask.shape[1], device="cpu") + first[:, None]) % mask.shape[1]
    return {name: value.gather(1, places) if value.shape == mask.shape else value for name, value in batch.items()}


def shuffled(batches: Sequence[Mapping[str, Tensor]], seed: int) -> list[Mapping[str, Tensor]]:
    """All rows in random order, cut into batches of the same sizes; only the batches where shapes differ, or where
    samples have several images each.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = {tuple((name, value.shape[1:]) for name, value in batch.items()) for batch in batches}
    if len(shapes) > 1 or any(len({len(value) for value in batch.values()}) > 1 for batch in batches):
        return [batches[number] for number in torch.randperm(len(batches), generator=generator, device="cpu").tolist()]
    sizes = [len(next(iter(batch.values()))) for batch in batches]
    order = torch.randperm(sum(sizes), generator=generator, device="cpu").split(sizes)
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    return [{name: value[rows] for name, value in whole.items()} for rows in order]
