"""Every metric by its name."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nsc_merge.evaluation.metrics import cider_score

IGNORE = -100

Measure = Callable[..., float]
PerSample = Callable[..., Tensor]


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: key in :data:`METRICS`.
        label: for tables.
        unit: of the value, empty for a share from 0 to 1 and for the unit of the labels.
        lower_is_better: direction.
        shapes: what outputs and labels must be.
        measure: ``(outputs, labels) -> float`` over a whole set.
        quality: ``(outputs, labels) -> [N]``, per sample, higher is better.
        loss: ``(outputs, labels) -> scalar``, the usual training loss of such a task; None where there is none.
        options: names of further arguments of all three.
        settings: those that :meth:`with_options` set.
    """

    name: str
    label: str
    unit: str
    lower_is_better: bool
    shapes: str
    measure: Measure
    quality: PerSample
    loss: Callable[..., Tensor] | None = None
    options: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def with_options(self, **given: Any) -> Metric:
        """The same metric with its options set.

        Raises:
            ValueError: if it has no such option.
        """
        for name in given:
            if name not in self.options:
                listed = ", ".join(self.options) or "none"
                raise ValueError(f"{name}: not an option of metric {self.name!r} (options: {listed})")
        if not given:
            return self
        return replace(
            self,
            measure=functools.partial(self.measure, **given),
            quality=functools.partial(self.quality, **given),
            loss=functools.partial(self.loss, **given) if self.loss is not None else None,
            settings=given,
        )


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    """Share of known labels that are predicted.

    Args:
        outputs: logits ``[N, ..., C]``.
        labels: class indices ``[N, ...]``, integers.

    Raises:
        TypeError, ValueError: for other dtypes, shapes or labels, or if no label is known.
    """
    right, known = _hits(outputs, labels)
    return (right.sum() / known.sum()).item()


def accuracy_per_sample(outputs: Tensor, labels: Tensor) -> Tensor:
    """:func:`accuracy` of every sample, ``[N]``: 0 or 1 where a sample is one label."""
    right, known = _hits(outputs, labels)
    return right.reshape(len(labels), -1).sum(1) / known.reshape(len(labels), -1).sum(1)


def mean_iou(outputs: Tensor, labels: Tensor) -> float:
    """Mean over classes of intersection over union, pixels of all samples together.

    Classes that neither occur nor are predicted are left out. Arguments and errors as in :func:`accuracy`.
    """
    return _iou(_confusion(outputs, labels).sum(0, keepdim=True)).item()


def mean_iou_per_sample(outputs: Tensor, labels: Tensor) -> Tensor:
    """:func:`mean_iou` within every sample, ``[N]``."""
    return _iou(_confusion(outputs, labels))


def rmse(outputs: Tensor, labels: Tensor) -> float:
    """Root of the mean squared error over all known labels.

    Args:
        outputs: ``[N, ...]`` or ``[N, ..., 1]``, floating point.
        labels: ``[N, ...]``, floating point.

    Raises:
        TypeError, ValueError: for other dtypes or shapes, or if no label is known.
    """
    error, known = _errors(outputs, labels)
    return error[known].square().mean().sqrt().item()


def l1(outputs: Tensor, labels: Tensor) -> float:
    """Mean absolute error over all known labels; arguments and errors as in :func:`rmse`."""
    error, known = _errors(outputs, labels)
    return error[known].abs().mean().item()


def mean_angle(outputs: Tensor, labels: Tensor) -> float:
    """Mean angle in degrees between vectors, as for surface normals.

    Args:
        outputs: ``[N, ..., D]``, of any length but 0.
        labels: ``[N, ..., D]``, unit vectors, NaN where unknown.

    Raises:
        TypeError, ValueError: as :func:`rmse`.
    """
    angle, known = _angles(outputs, labels)
    return math.degrees(angle[known].mean().item())


def edge_f(
    outputs: Tensor, labels: Tensor, *, tolerance: int = 1, thresholds: int = 99, logits: bool = False
) -> float:
    """F-measure of edges at the best threshold for the whole set (ODS: optimal data set scale; Martin et al. 2004).

    A predicted pixel is right if the truth has an edge at most ``tolerance`` pixels away in each direction, and the
    other way round for recall. The benchmark's own program thins edges and matches pixels one to one instead, so its
    figures differ.

    Args:
        outputs: ``[N, H, W]`` or ``[N, H, W, 1]``: from 0 to 1, or logits.
        labels: ``[N, H, W]``: an edge where above 0.5.
        tolerance: in pixels.
        thresholds: how many, evenly spaced inside (0, 1).
        logits: whether a sigmoid is still to be taken.

    Raises:
        TypeError, ValueError: as :func:`rmse`; or if there is no edge.
    """
    counts = _edge_counts(outputs, labels, tolerance, thresholds, logits).sum(1)
    return _f_measure(counts).max().item()


def edge_f_per_sample(
    outputs: Tensor, labels: Tensor, *, tolerance: int = 1, thresholds: int = 99, logits: bool = False
) -> Tensor:
    """F-measure of every sample, ``[N]``, at the threshold that is best for the whole set; NaN where no edge is, nor is
    predicted.
    """
    counts = _edge_counts(outputs, labels, tolerance, thresholds, logits)
    best = counts[_f_measure(counts.sum(1)).argmax()]
    return _f_measure(best).masked_fill(best.sum(1) == 0, torch.nan)


def exact_match(outputs: Tensor, labels: Tensor) -> float:
    """Share of sequences of which every known token is predicted.

    Args:
        outputs: logits ``[N, T, C]``, or predicted tokens (integers) ``[N, T]`` or longer, of which only the first T
            are asked for.
        labels: tokens ``[N, T]``, integers; :data:`IGNORE` where nothing is asked. Sequences of which nothing is asked
            do not count.

    Raises:
        TypeError, ValueError: as :func:`accuracy`.
    """
    return exact_match_per_sample(outputs, labels).nanmean().item()


def exact_match_per_sample(outputs: Tensor, labels: Tensor) -> Tensor:
    """0 or 1 for every sequence, ``[N]``; NaN where nothing is asked."""
    tokens = outputs[:, : labels.shape[-1]] if outputs.dim() == 2 else outputs
    if not tokens.is_floating_point() and tokens.shape == labels.shape:
        right, known = _compared(tokens, labels)
    else:
        right, known = _hits(outputs, labels)
    matched = (right | ~known).reshape(len(labels), -1).all(1).float()
    return matched.masked_fill(~known.reshape(len(labels), -1).any(1), torch.nan)


def cider(outputs: Tensor, labels: Tensor) -> float:
    """Mean CIDEr of generated captions, from 0 to 1; see :func:`nsc_merge.evaluation.metrics.cider_score.cider`.

    Args:
        outputs: generated tokens ``[N, T]``, integers; :data:`IGNORE` after the end.
        labels: reference captions, tokens ``[N, T']``, or several per sample ``[N, R, T']``, filled up by
            :data:`IGNORE`.

    Raises:
        TypeError, ValueError: for other dtypes or shapes, or fewer than two samples.
    """
    return cider_per_sample(outputs, labels).mean().item()


def cider_per_sample(outputs: Tensor, labels: Tensor) -> Tensor:
    """CIDEr of every caption, ``[N]``."""
    for name, value in (("outputs", outputs), ("labels", labels)):
        if value.is_floating_point():
            raise TypeError(f"{name}: expected tokens as integers, found {value.dtype}")
    if outputs.dim() != 2 or labels.dim() not in (2, 3) or len(outputs) != len(labels):
        raise ValueError(
            f"labels: expected captions [N, T'] or [N, R, T'] for outputs [N, T], found {list(labels.shape)} and "
            f"{list(outputs.shape)}"
        )
    several = labels[:, None] if labels.dim() == 2 else labels
    references = [[_tokens(caption) for caption in sample] for sample in several]
    known = [[caption for caption in sample if caption] for sample in references]
    scores = cider_score.cider_per_sample([_tokens(caption) for caption in outputs], known)
    return torch.tensor(scores, dtype=torch.float64)


def _tokens(caption: Tensor) -> list[int]:
    return caption[caption != IGNORE].tolist()


def cosine(outputs: Tensor, units: Tensor, dim: int = -1) -> Tensor:
    """Cosine between ``outputs`` and unit vectors along ``dim``; faster than F.cosine_similarity on strided axes."""
    return (outputs * units).sum(dim) / outputs.square().sum(dim).sqrt().clamp_min(1e-8)


def cosine_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean of 1 minus the cosine between vectors; shapes as in :func:`mean_angle`."""
    cosines, known = _cosines(outputs, labels)
    return (1 - cosines[known]).mean()


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean over known labels, with classes in the last axis; shapes as in :func:`accuracy`."""
    _check_classes(outputs, labels)
    return F.cross_entropy(outputs.flatten(0, -2), labels.flatten().long(), ignore_index=IGNORE)


def squared_error(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean squared error; shapes as in :func:`rmse`."""
    error, known = _errors(outputs, labels)
    return error[known].square().mean()


def absolute_error(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean absolute error; shapes as in :func:`rmse`."""
    error, known = _errors(outputs, labels)
    return error[known].abs().mean()


def _compared(predicted: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    known = labels != IGNORE
    if not bool(known.any()):
        raise ValueError("labels: expected at least one known label, found none")
    return (predicted == labels) & known, known


def _check_classes(outputs: Tensor, labels: Tensor) -> None:
    if not outputs.is_floating_point():
        raise TypeError(f"outputs: expected logits in floating point, found {outputs.dtype}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype is torch.bool:
        raise TypeError(f"labels: expected class indices as integers, found {labels.dtype}")
    if outputs.dim() < 2 or outputs.shape[:-1] != labels.shape:
        raise ValueError(
            f"outputs: expected logits [N, ..., C] for labels [N, ...], found {list(outputs.shape)} and "
            f"{list(labels.shape)}"
        )
    wrong = labels[(labels != IGNORE) & ((labels < 0) | (labels >= outputs.shape[-1]))]
    if wrong.numel():
        raise ValueError(
            f"labels: expected classes from 0 to {outputs.shape[-1] - 1} (or {IGNORE}), found {int(wrong[0])}"
        )


def _hits(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    _check_classes(outputs, labels)
    return _compared(outputs.argmax(-1), labels)


def _confusion(outputs: Tensor, labels: Tensor) -> Tensor:
    """``[N, C, C]``: pixels by true and predicted class."""
    _, known = _hits(outputs, labels)
    classes = outputs.shape[-1]
    cells = (labels.clamp(min=0) * classes + outputs.argmax(-1)).reshape(len(labels), -1)
    counts = torch.zeros(len(labels), classes * classes, dtype=torch.float64, device=labels.device)
    return counts.scatter_add_(1, cells, known.reshape(len(labels), -1).double()).view(-1, classes, classes)


def _iou(confusion: Tensor) -> Tensor:
    both = confusion.diagonal(dim1=1, dim2=2)
    either = confusion.sum(1) + confusion.sum(2) - both
    return torch.where(either > 0, both / either, torch.nan).nanmean(1)


def _errors(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Signed errors, and where the label is known."""
    for name, value in (("outputs", outputs), ("labels", labels)):
        if not value.is_floating_point():
            raise TypeError(f"{name}: expected floating point, found {value.dtype}")
    if outputs.shape == (*labels.shape, 1):
        outputs = outputs[..., 0]
    if outputs.shape != labels.shape:
        raise ValueError(
            f"outputs: expected {list(labels.shape)} or {[*labels.shape, 1]}, the shape of the labels, found "
            f"{list(outputs.shape)}"
        )
    known = ~labels.isnan()
    if not bool(known.any()):
        raise ValueError("labels: expected at least one known label, found none")
    return outputs - labels, known


def _negative_per_sample(power: int, outputs: Tensor, labels: Tensor) -> Tensor:
    error, known = _errors(outputs, labels)
    size = torch.where(known, error.abs() ** power, 0.0).reshape(len(labels), -1).sum(1)
    return -((size / known.reshape(len(labels), -1).sum(1)) ** (1 / power))


def _cosines(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    _errors(outputs, labels)
    if outputs.dim() < 2 or outputs.shape != labels.shape:
        raise ValueError(f"outputs: expected vectors [N, ..., D], found {list(outputs.shape)}")
    return cosine(outputs, labels), ~labels.isnan().any(-1)


def _angles(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    cosines, known = _cosines(outputs, labels)
    return torch.acos(cosines.clamp(-1, 1)), known


def _negative_angle_per_sample(outputs: Tensor, labels: Tensor) -> Tensor:
    angle, known = _angles(outputs, labels)
    total = torch.where(known, angle, 0.0).reshape(len(labels), -1).sum(1)
    return -torch.rad2deg(total / known.reshape(len(labels), -1).sum(1))


def _edge_counts(outputs: Tensor, labels: Tensor, tolerance: int, thresholds: int, logits: bool) -> Tensor:
    """``[thresholds, N, 4]``: right and all predicted edge pixels, found and all true ones."""
    _, known = _errors(outputs, labels)
    if labels.dim() != 3:
        raise ValueError(f"labels: expected edge maps [N, H, W], found {list(labels.shape)}")
    for name, value, least in (("tolerance", tolerance, 0), ("thresholds", thresholds, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected a whole number of at least {least}, found {value!r}")
    scores = outputs.reshape(labels.shape)
    scores = scores.sigmoid() if logits else scores
    truth = (labels > 0.5) & known
    if not bool(truth.any()):
        raise ValueError("labels: expected at least one edge pixel (above 0.5), found none")
    near_truth = _grown(truth, tolerance)
    counts = []
    for step in range(1, thresholds + 1):
        predicted = (scores > step / (thresholds + 1)) & known
        pairs = (predicted & near_truth, predicted, truth & _grown(predicted, tolerance), truth)
        counts.append(torch.stack([pair.flatten(1).sum(1) for pair in pairs], 1))
    return torch.stack(counts).double()


def _grown(mask: Tensor, tolerance: int) -> Tensor:
    width = 2 * tolerance + 1
    return F.max_pool2d(mask.float()[:, None], width, 1, tolerance)[:, 0] > 0


def _f_measure(counts: Tensor) -> Tensor:
    right, predicted, found, true = counts.unbind(-1)
    precision, recall = right / predicted.clamp(min=1), found / true.clamp(min=1)
    return 2 * precision * recall / (precision + recall).clamp(min=1e-12)


def _edge_loss(outputs: Tensor, labels: Tensor, *, logits: bool = False, **_others: int) -> Tensor:
    if not logits:
        return absolute_error(outputs, labels)
    _, known = _errors(outputs, labels)
    return F.binary_cross_entropy_with_logits(outputs.reshape(labels.shape)[known], labels[known])


_CLASSES = "outputs: logits [N, ..., C]; labels: integers [N, ...], -100 where unknown"
_VALUES = "outputs: [N, ...] or [N, ..., 1]; labels: [N, ...], NaN where unknown"

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "acc", "", False, _CLASSES, accuracy, accuracy_per_sample, cross_entropy),
        Metric("miou", "mIoU", "", False, _CLASSES, mean_iou, mean_iou_per_sample, cross_entropy),
        Metric(
            "rmse", "RMSE", "", True, _VALUES, rmse, functools.partial(_negative_per_sample, 2), squared_error
        ),
        Metric("l1", "L1", "", True, _VALUES, l1, functools.partial(_negative_per_sample, 1), absolute_error),
        Metric(
            "mean_angle",
            "deg",
            "degrees",
            True,
            "outputs: [N, ..., D]; labels: unit vectors [N, ..., D], NaN where unknown",
            mean_angle,
            _negative_angle_per_sample,
            cosine_loss,
        ),
        Metric(
            "edge_f",
            "edge F",
            "",
            False,
            "outputs: [N, H, W] or [N, H, W, 1]; labels: [N, H, W], an edge above 0.5",
            edge_f,
            edge_f_per_sample,
            _edge_loss,
            ("tolerance", "thresholds", "logits"),
        ),
        Metric(
            "exact_match",
            "EM",
            "",
            False,
            "outputs: logits [N, T, C] or tokens [N, T]; labels: tokens [N, T], -100 where nothing is asked",
            exact_match,
            exact_match_per_sample,
            cross_entropy,
        ),
        Metric(
            "cider",
            "CIDEr",
            "",
            False,
            "outputs: tokens [N, T]; labels: tokens [N, T'] or [N, R, T'], filled up by -100",
            cider,
            cider_per_sample,
        ),
    )
}
