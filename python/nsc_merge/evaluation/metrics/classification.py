"""Classes: of samples, of pixels and of tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nsc_merge.evaluation.metrics.labels import IGNORE, compared


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    """Share of known labels that are predicted: torchmetrics' micro average.

    Args:
        outputs: logits ``[N, ..., C]``.
        labels: class indices ``[N, ...]``, integers.

    Raises:
        TypeError, ValueError: for other dtypes, shapes or labels, or if no label is known.
    """
    from torchmetrics.functional.classification import multiclass_accuracy

    predicted, classes = _predicted(outputs, labels), outputs.shape[-1]
    # What torchmetrics would check is checked.
    share = multiclass_accuracy(
        predicted, labels, classes, average="micro", ignore_index=IGNORE, validate_args=False
    )
    return share.item()


def accuracy_per_sample(outputs: Tensor, labels: Tensor) -> Tensor:
    """:func:`accuracy` of every sample, ``[N]``: 0 or 1 where a sample is one label."""
    right, known = hits(outputs, labels)
    return right.reshape(len(labels), -1).sum(1) / known.reshape(len(labels), -1).sum(1)


def mean_iou(outputs: Tensor, labels: Tensor) -> float:
    """Mean over classes of intersection over union, pixels of all samples together: torchmetrics' macro average of the
    Jaccard index, which leaves out classes that neither occur nor are predicted.

    Arguments and errors as in :func:`accuracy`.
    """
    from torchmetrics.functional.classification import multiclass_jaccard_index

    predicted, classes = _predicted(outputs, labels), outputs.shape[-1]
    return multiclass_jaccard_index(predicted, labels, classes, ignore_index=IGNORE, validate_args=False).item()


def mean_iou_per_sample(outputs: Tensor, labels: Tensor) -> Tensor:
    """:func:`mean_iou` within every sample, ``[N]``, which torchmetrics has no average over classes for."""
    return _iou(_confusion(outputs, labels))


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean over known labels, with classes in the last axis; shapes as in :func:`accuracy`."""
    _check_classes(outputs, labels)
    return F.cross_entropy(outputs.flatten(0, -2), labels.flatten().long(), ignore_index=IGNORE)


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


def _predicted(outputs: Tensor, labels: Tensor) -> Tensor:
    hits(outputs, labels)
    return outputs.argmax(-1)


def hits(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    _check_classes(outputs, labels)
    return compared(outputs.argmax(-1), labels)


def _confusion(outputs: Tensor, labels: Tensor) -> Tensor:
    """``[N, C, C]``: pixels by true and predicted class."""
    _, known = hits(outputs, labels)
    classes = outputs.shape[-1]
    cells = (labels.clamp(min=0) * classes + outputs.argmax(-1)).reshape(len(labels), -1)
    counts = torch.zeros(len(labels), classes * classes, dtype=torch.float64, device=labels.device)
    return counts.scatter_add_(1, cells, known.reshape(len(labels), -1).double()).view(-1, classes, classes)


def _iou(confusion: Tensor) -> Tensor:
    both = confusion.diagonal(dim1=1, dim2=2)
    either = confusion.sum(1) + confusion.sum(2) - both
    return torch.where(either > 0, both / either, torch.nan).nanmean(1)
