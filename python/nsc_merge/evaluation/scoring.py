"""Measures a merge on a suite: applies it to the base model, predicts a split, and takes it out again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import zip_longest
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from nsc_merge.evaluation import joint_classes
from nsc_merge.evaluation.metrics import IGNORE, Outputs, Predicted
from nsc_merge.evaluation.normalise import Scores
from nsc_merge.evaluation.suite import Suite
from nsc_merge.methods import METHODS
from nsc_merge.models.attachment import merged_linears
from nsc_merge.models.bases.quantised import is_linear, is_quantised
from nsc_merge.models.bases.stored_weights import check_in_memory, stored
from nsc_merge.models.forward_contexts import shared_forward, unscaled
from nsc_merge.models.merged.matrices import Matrix
from nsc_merge.models.merged.outside import added_outside
from nsc_merge.results.merged_update import MergedUpdate
from nsc_merge.results.result import MergeResult

Candidate: TypeAlias = "MergeResult | nn.Module | Mapping[str, MergeResult | nn.Module]"
"""What is measured: a merge, another model, or one of those per task."""

_Model = Callable[[], AbstractContextManager[nn.Module]]
_Batches = tuple[tuple[Mapping[str, Tensor], Tensor] | None, ...]
_Work = tuple[list[str], _Batches]
_Output = tuple[str, Tensor, Tensor]

# Numbers of which means over models are held at a time, 1 GiB.
_HELD = 2**28


@contextmanager
def applied(model: nn.Module, update: MergedUpdate) -> Iterator[nn.Module]:
    """``model`` with the merged update in its weights, for the duration of a ``with`` block; beside those that are
    quantised, which have no room for it, as an adapter is served on them.

    Raises:
        TypeError, ValueError: as :meth:`MergedUpdate.merged`, before any weight changes.
    """
    check_in_memory(model)
    places = merged_linears(model, update.adapters)
    modules = {path: model.get_submodule(path) for path, one in places.items() if not isinstance(one, Matrix)}
    codes = [path for path, module in modules.items() if is_linear(module) and is_quantised(module)]
    merged = update.merged(model, [path for path in places if path not in codes])
    beside = {path: list(update.terms(path)) for path in codes}
    with unscaled(model), added_outside(model, beside), ExitStack() as stack:
        for name, value in merged.items():
            stack.enter_context(stored(model, name).holding(value))
        yield model


@torch.no_grad()
def predict(
    suite: Suite, candidate: Candidate, split: str, tasks: Sequence[str] | None = None, *, share: bool = False
) -> dict[str, tuple[Outputs, Tensor]]:
    """Task -> outputs and labels over a whole split, on the CPU; of some ``tasks``, or of all. Logits over a vocabulary
    are large: a suite that has ``kept`` says what is kept of the outputs of a batch; else those of sequences are held
    where a label is known.

    Where every task has an update of its own, each is predicted with its own; the outputs of an ensemble are the mean
    over the models of all tasks. With ``share``, tasks whose batches hold the very same tensors share the forwards of
    a model that serves them all; it is not for heads that generate, which need more than one forward of a batch.
    """
    wanted = list(suite.tasks) if tasks is None else list(tasks)
    parts: dict[str, list[tuple[Outputs, Tensor]]] = {task: [] for task in wanted}
    kept = getattr(suite, "kept", None)

    def keep(task: str, output: Tensor, label: Tensor) -> None:
        less = output if kept is None else kept(task, output, label)
        parts[task].append((less, label) if isinstance(less, Predicted) else _of_known_labels(less, label))

    for served, models in models_of(suite, candidate, wanted):
        work = [
            (together, batches)
            for together in ([served] if share else [[task] for task in served])
            for batches in zip_longest(*(suite.labelled(task, split) for task in together))
        ]
        if len(models) == 1:
            with models[0]() as model:
                for one in work:
                    _forward(suite, model, one, keep)
        while work and len(models) > 1:
            means = _means(suite, models, work)
            work = work[len(means) :]
            for mean in itertools.chain(*means):
                keep(*mean)
    found = {}
    for task in wanted:
        outputs, labels = zip(*parts.pop(task), strict=True)
        found[task] = _together(outputs), _joined(labels, torch.nan)
    return found


def score(suite: Suite, predicted: Mapping[str, tuple[Outputs, Tensor]]) -> Scores:
    """Metric and loss of what :func:`predict` returned."""
    losses = {task: suite.loss(task, *pair) for task, pair in predicted.items()}
    return Scores(
        {task: suite.measure(task, *pair) for task, pair in predicted.items()},
        {task: float(loss) for task, loss in losses.items() if loss is not None},
    )


@torch.no_grad()
def joint_hits(
    suite: Suite,
    candidate: Candidate,
    tasks: Sequence[str],
    kind: str,
    names: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, dict[int, float]] | None:
    """Hits@k over the classes of all ``tasks`` together, by task and, under ``"all"``, over all samples.

    Costs a forward for every pair of tasks. None where every task has a model of its own, as it may not be known
    which task a sample is of.

    Args:
        suite: classifies with one label per sample.
        candidate: what is measured.
        tasks: whose samples, those to test on, and classes.
        kind: of scores; see :meth:`nsc_merge.evaluation.joint_classes.Union.scores`.
        names: task -> names of its classes, if classes of the same name are one.
    """
    groups = models_of(suite, candidate, list(suite.tasks))
    if len(groups) > 1:
        return None
    ((_, models),) = groups
    # Outputs of a task's head on the samples of another, by both.
    outputs = {(source, head): torch.zeros((), device="cpu") for source in tasks for head in tasks}
    for number, enter in enumerate(models, 1):
        with enter() as model:
            for source, head in outputs:
                whole = _joined(
                    [suite.output(head, model, inputs) for inputs, _ in suite.labelled(source, "test")]
                )
                outputs[source, head] = outputs[source, head] + (whole - outputs[source, head]) / number
    union = joint_classes.Union.of({task: outputs[task, task].shape[-1] for task in tasks}, names)
    every_score, every_label = [], []
    found = {}
    for source in tasks:
        label = _joined([label for _, label in suite.labelled(source, "test")])
        known = label != IGNORE
        scores = union.scores({head: outputs[source, head][known] for head in tasks}, kind)
        truth = union.labels(source, label[known])
        found[source] = joint_classes.hits(scores, truth)
        every_score.append(scores)
        every_label.append(truth)
    found["all"] = joint_classes.hits(torch.cat(every_score), torch.cat(every_label))
    return found


def models_of(suite: Suite, candidate: Candidate, tasks: list[str]) -> list[tuple[list[str], list[_Model]]]:
    """Tasks that share models, and the models whose outputs are averaged for them; each is made when it is entered."""
    if isinstance(candidate, nn.Module):
        return [(tasks, [lambda: nullcontext(candidate)])]
    if isinstance(candidate, Mapping):
        return [([task], models_of(suite, candidate[task], [task])[0][1]) for task in tasks]
    if not candidate.per_task:
        return [(tasks, [partial(applied, suite.model, candidate)])]
    models = {task: partial(applied, suite.model, candidate.for_task(task)) for task in candidate.per_task}
    if candidate.method in METHODS and METHODS[candidate.method].averages_outputs:
        return [(tasks, list(models.values()))]
    models = {task: models[task] for task in tasks}
    return [([task], [model]) for task, model in models.items()]


def _forward(suite: Suite, model: nn.Module, work: _Work, keep: Callable[[str, Tensor, Tensor], None]) -> None:
    """Hand over what the heads of tasks make of a batch of each, with its labels; they share the forwards of ``model``.
    """
    tasks, batches = work
    with shared_forward(model) if len(tasks) > 1 else nullcontext():
        for task, batch in zip(tasks, batches, strict=True):
            if batch is not None:
                inputs, label = batch
                keep(task, suite.output(task, model, inputs), label)


def _means(suite: Suite, models: list[_Model], work: list[_Work]) -> list[list[_Output]]:
    """Means over several models, of as many of the first batches as have :data:`_HELD` numbers; of sequences where a
    label is known. Each model is entered once for all of these.
    """
    means: list[list[_Output]] = []
    each: list[_Output] = []

    def hold(task: str, output: Tensor, label: Tensor) -> None:
        if not output.is_floating_point():
            raise ValueError(f"ensemble: the outputs of {task} are tokens, which have no mean")
        output, label = _of_known_labels(output, label)
        each.append((task, output.float().cpu(), label))

    for number, enter in enumerate(models, 1):
        with enter() as model:
            held = 0
            for place, one in enumerate(work):
                each.clear()
                _forward(suite, model, one, hold)
                if number == 1:
                    means.append(list(each))
                    held += sum(output.numel() for _, output, _ in each)
                    if held >= _HELD:
                        break
                    continue
                means[place] = [
                    (task, mean + (output - mean) / number, label)
                    for (task, mean, label), (_, output, _) in zip(means[place], each, strict=True)
                ]
        work = work[: len(means)]
    return means


def _together(parts: Sequence[Any]) -> Outputs:
    if not isinstance(parts[0], Predicted):
        return _joined(parts)
    classes, surprise, counts = zip(*parts, strict=True)
    return Predicted(_joined(classes), _joined(surprise), max(counts))


def _of_known_labels(output: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Logits ``[N, T, C]`` and labels ``[N, T]`` without the places that are asked for in no sample, the known ones of
    each in front; others as they are.
    """
    if output.dim() != 3 or label.is_floating_point() or output.shape[:2] != label.shape:
        return output, label
    known = label != IGNORE
    longest = max(1, int(known.sum(1).max()))
    places = known.int().sort(dim=1, descending=True, stable=True).indices[:, :longest]
    there = places.to(output.device)[..., None].expand(-1, -1, output.shape[-1])
    return output.gather(1, there), label.gather(1, places)


def _joined(parts: Sequence[Tensor], missing: float = 0.0) -> Tensor:
    """Batches as one, in float32 or as integers. Where their shapes differ, as those of sequences may, they are filled
    up: with :data:`IGNORE` if integers, else with ``missing``.
    """
    kind = torch.float32 if parts[0].is_floating_point() else parts[0].dtype
    shape = [max(extents) for extents in zip(*(part.shape[1:] for part in parts), strict=True)]
    whole = torch.full(
        (sum(map(len, parts)), *shape), missing if kind is torch.float32 else IGNORE, dtype=kind, device="cpu"
    )
    start = 0
    for part in parts:
        whole[(slice(start, start + len(part)), *map(slice, part.shape[1:]))] = part
        start += len(part)
    return whole
