"""Classes: of samples, of pixels and of tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nsc_merge.evaluation.metrics.labels import IGNORE, compared

# Over what several classes of a sample are counted.
AVERAGES = ("micro", "macro")


class Predicted(NamedTuple):
    """What figures and losses take of logits ``[N, ..., C]``: two numbers a label, where a vocabulary has a hundred
    thousand logits.

    Attributes:
        classes: ``[N, ...]``, the class of the highest logit; C, which no label is, where some logit is NaN, and where
            no label is known.
        surprise: ``[N, ...]``, float32: the cross entropy; 0 where no label is known.
        size: C.
    """

    classes: Tensor
    surprise: Tensor
    size: int


Outputs = Tensor | Predicted


def predicted(outputs: Tensor, labels: Tensor) -> Predicted:
    """What is left of logits, on the CPU; one sample after another, as what is computed of them is as large.

    Arguments and errors as in :func:`accuracy`.
    """
    _check_classes(outputs, labels)
    classes = torch.full(labels.shape, outputs.shape[-1], device="cpu")
    surprise = torch.zeros(labels.shape, device="cpu")
    for number, label in enumerate(labels):
        known = label != IGNORE
        logits = outputs[number][known.to(outputs.device)].float()
        classes[number][known] = _highest(logits).cpu()
        wanted = label[known].long().to(logits.device)
        surprise[number][known] = F.cross_entropy(logits, wanted, reduction="none").cpu()
    return Predicted(classes, surprise, outputs.shape[-1])


def accuracy(outputs: Outputs, labels: Tensor) -> float:
    """Share of known labels that are predicted: torchmetrics' micro average. Where some logit is NaN, nothing is.

    Args:
        outputs: logits ``[N, ..., C]``, or what :func:`predicted` keeps of them.
        labels: class indices ``[N, ...]``, integers.

    Raises:
        TypeError, ValueError: for other dtypes, shapes or labels, or if no label is known.
    """
    right, known = hits(outputs, labels)
    return right.sum().item() / known.sum().item()


def accuracy_per_sample(outputs: Outputs, labels: Tensor) -> Tensor:
    """:func:`accuracy` of every sample, ``[N]``: 0 or 1 where a sample is one label."""
    right, known = hits(outputs, labels)
    # Of whole numbers division makes torch's default dtype, which may be a narrow one.
    return right.reshape(len(labels), -1).sum(1).float() / known.reshape(len(labels), -1).sum(1)


def mean_iou(outputs: Outputs, labels: Tensor) -> float:
    """Mean over classes of intersection over union, pixels of all samples together: torchmetrics' macro average of the
    Jaccard index, which leaves out classes that neither occur nor are predicted.

    Arguments and errors as in :func:`accuracy`; a pixel of which some logit is NaN is missed.
    """
    return _iou(_whole_confusion(outputs, labels)).item()


def mean_iou_per_sample(outputs: Outputs, labels: Tensor) -> Tensor:
    """:func:`mean_iou` within every sample, ``[N]``, which torchmetrics has no average over classes for."""
    return _iou(_confusion(outputs, labels))


def f1(outputs: Outputs, labels: Tensor) -> float:
    """Mean F-measure over the classes that occur or are predicted, all known labels together: scikit-learn's macro
    average.

    Arguments and errors as in :func:`accuracy`; what predicts nothing is missed.
    """
    both, either = _f_parts(outputs, labels)
    return (2 * both / either)[either > 0].mean().item()


def f1_binary(outputs: Outputs, labels: Tensor) -> float:
    """F-measure of class 1 of two; 0 where it neither occurs nor is predicted. As :func:`f1`.

    Raises:
        ValueError: for more classes, too.
    """
    both, either = _f_parts(outputs, labels)
    if len(both) != 2:
        raise ValueError(f"outputs: expected logits of two classes, found {len(both)}; f1 is of any number of them")
    return (2 * both[1] / either[1].clamp(min=1)).item()


def _f_parts(outputs: Outputs, labels: Tensor) -> tuple[Tensor, Tensor]:
    """``[C]`` each: true positives, and how often a class occurs plus how often it is predicted."""
    (confusion,) = _whole_confusion(outputs, labels)
    return confusion.diagonal(), confusion.sum(0)[:-1] + confusion.sum(1)


def matthews(outputs: Outputs, labels: Tensor) -> float:
    """Matthews' correlation of known and predicted classes, from -1 to 1, of any number of them (Gorodkin 2004); 0
    where there is one class alone on a side, as scikit-learn has it.

    Arguments and errors as in :func:`accuracy`; what predicts nothing is one more class.
    """
    (confusion,) = _whole_confusion(outputs, labels)
    true, predicted, total = confusion.sum(1), confusion.sum(0), confusion.sum()
    covariance = total * confusion.diagonal().sum() - (true * predicted[:-1]).sum()
    spread = (total**2 - true.square().sum()) * (total**2 - predicted.square().sum())
    return (covariance / spread.sqrt()).item() if spread > 0 else 0.0


def perplexity(outputs: Outputs, labels: Tensor) -> float:
    """Exponential of the mean cross entropy over known labels; arguments and errors as in :func:`accuracy`."""
    return cross_entropy(outputs, labels).double().exp().item()


def negative_entropy_per_sample(outputs: Outputs, labels: Tensor) -> Tensor:
    """Minus the mean :func:`cross_entropy` of every sample, ``[N]``; NaN where no label is known."""
    _, known = hits(outputs, labels)
    if isinstance(outputs, Predicted):
        flat = outputs.surprise * known
    else:
        flat = F.cross_entropy(
            outputs.flatten(0, -2), labels.flatten().long(), ignore_index=IGNORE, reduction="none"
        )
    return -flat.reshape(len(labels), -1).sum(1) / known.reshape(len(labels), -1).sum(1)


def cross_entropy(outputs: Outputs, labels: Tensor) -> Tensor:
    """Mean over known labels, with classes in the last axis; shapes as in :func:`accuracy`."""
    _check_classes(outputs, labels)
    if isinstance(outputs, Predicted):
        return outputs.surprise[labels != IGNORE].double().mean()
    return F.cross_entropy(outputs.flatten(0, -2), labels.flatten().long(), ignore_index=IGNORE)


def _check_classes(outputs: Outputs, labels: Tensor) -> None:
    if isinstance(outputs, Predicted):
        # As when they were made.
        return
    if not outputs.is_floating_point():
        raise TypeError(f"outputs: expected logits in floating point, found {outputs.dtype}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype is torch.bool:
        raise TypeError(f"labels: expected class indices as integers, found {labels.dtype}")
    if outputs.dim() < 2 or outputs.shape[:-1] != labels.shape:
        raise ValueError(
            f"outputs: expected logits [N, ..., C] for labels [N, ...], found {list(outputs.shape)} and "
            f"{list(labels.shape)}"
        )
    if outputs.shape[-1] == 1:
        raise ValueError(
            f"outputs: expected logits of two classes or more, found one, {list(outputs.shape)}, as heads of "
            "regressions have; expected such a head, or a metric of values such as rmse or pearson"
        )
    wrong = labels[(labels != IGNORE) & ((labels < 0) | (labels >= outputs.shape[-1]))]
    if wrong.numel():
        raise ValueError(
            f"labels: expected classes from 0 to {outputs.shape[-1] - 1} (or {IGNORE}), found {int(wrong[0])}"
        )


def hits(outputs: Outputs, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where known labels are predicted, and where labels are known; errors as in :func:`accuracy`."""
    _check_classes(outputs, labels)
    return compared(classes_of(outputs), labels)


def classes_of(outputs: Outputs) -> Tensor:
    return outputs.classes if isinstance(outputs, Predicted) else _highest(outputs)


def _highest(outputs: Tensor) -> Tensor:
    """The class of the highest logit; C, which no label is, where some logit is NaN, as argmax takes that for it."""
    return outputs.argmax(-1).masked_fill(outputs.isnan().any(-1), outputs.shape[-1])


def _whole_confusion(outputs: Outputs, labels: Tensor) -> Tensor:
    """``[1, C, C + 1]``, of all samples together; see :func:`_confusion`."""
    _check_classes(outputs, labels)
    if isinstance(outputs, Predicted):
        flat: Outputs = Predicted(outputs.classes.flatten()[None], outputs.surprise.flatten()[None], outputs.size)
    else:
        flat = outputs.flatten(0, -2)[None]
    return _confusion(flat, labels.flatten()[None])


def _confusion(outputs: Outputs, labels: Tensor) -> Tensor:
    """``[N, C, C + 1]``: pixels by true and predicted class, and of the latter none."""
    _, known = hits(outputs, labels)
    classes = outputs.size if isinstance(outputs, Predicted) else outputs.shape[-1]
    cells = (labels.long().clamp(min=0) * (classes + 1) + classes_of(outputs)).reshape(len(labels), -1)
    counts = torch.zeros(len(labels), classes * (classes + 1), dtype=torch.float64, device=labels.device)
    counts.scatter_add_(1, cells, known.reshape(len(labels), -1).double())
    return counts.view(-1, classes, classes + 1)


def _iou(confusion: Tensor) -> Tensor:
    both = confusion.diagonal(dim1=1, dim2=2)
    either = confusion.sum(1)[:, :-1] + confusion.sum(2) - both
    return torch.where(either > 0, both / either, torch.nan).nanmean(1)


def multilabel_f1(outputs: Tensor, labels: Tensor, average: str = "micro") -> float:
    """F1 of all classes of all samples that a logit above 0 predicts, by torchmetrics.

    Args:
        outputs: logits ``[N, C]``, floating point; what is no number predicts nothing.
        labels: ``[N, C]``, 1 where a class is true and 0 where it is not, NaN where that is unknown.
        average: ``"micro"``, over all classes and samples together, or ``"macro"``, the mean over classes that occur or
            are predicted.

    Raises:
        TypeError, ValueError: for other dtypes, shapes or labels, or if no label is known.
    """
    from torchmetrics.functional.classification import multilabel_f1_score

    known = _known_of_all(outputs, labels)
    predicted = (outputs > 0).int()
    truth = labels.masked_fill(~known, -1).int()
    return multilabel_f1_score(predicted, truth, labels.shape[1], average=average, ignore_index=-1).item()


def multilabel_f1_per_sample(outputs: Tensor, labels: Tensor, average: str = "micro") -> Tensor:
    """F1 of the classes of every sample, ``[N]``: 1 where none is true and none predicted, NaN where none is known."""
    known = _known_of_all(outputs, labels)
    predicted, truth = (outputs > 0) & known, (labels == 1) & known
    both, either = (predicted & truth).sum(1).double(), (predicted.sum(1) + truth.sum(1)).double()
    found = torch.where(either > 0, 2 * both / either, 1.0)
    return found.masked_fill(~known.any(1), torch.nan)


def binary_cross_entropy(outputs: Tensor, labels: Tensor, average: str = "micro") -> Tensor:
    """Mean over known labels, as transformers trains heads of several classes that may be true; shapes as in
    :func:`multilabel_f1`.
    """
    known = _known_of_all(outputs, labels)
    return F.binary_cross_entropy_with_logits(outputs[known], labels[known].to(outputs.dtype))


def _known_of_all(outputs: Tensor, labels: Tensor) -> Tensor:
    for name, value in (("outputs", outputs), ("labels", labels)):
        if not value.is_floating_point():
            raise TypeError(f"{name}: expected floating point, found {value.dtype}")
    if outputs.dim() != 2 or outputs.shape != labels.shape:
        raise ValueError(
            f"outputs, labels: expected logits and labels [N, C], found {list(outputs.shape)} and {list(labels.shape)}"
        )
    known = ~labels.isnan()
    if not bool(known.any()):
        raise ValueError("labels: expected at least one known label, found none")
    wrong = labels[known & (labels != 0) & (labels != 1)]
    if wrong.numel():
        raise ValueError(f"labels: expected 0, 1 or NaN, found {float(wrong[0])}")
    return known


def pairwise_accuracy(outputs: Tensor, labels: Tensor) -> float:
    """Share of rows whose preferred text has a higher score than every other of the row; a tie is none.

    Args:
        outputs: scores ``[N, S]``, as a reward model gives each of S texts.
        labels: the place of the preferred one in each row, ``[N]``, integers.

    Raises:
        TypeError, ValueError: for other dtypes or shapes.
    """
    return pairwise_accuracy_per_sample(outputs, labels).mean().item()


def pairwise_accuracy_per_sample(outputs: Tensor, labels: Tensor) -> Tensor:
    """1 or 0, in float64."""
    _check_scores(outputs, labels)
    wanted = outputs.gather(1, labels[:, None])
    # Of a score that is no number, neither is higher.
    above = (wanted > outputs).sum(1) == outputs.shape[1] - 1
    return above.double()


def preference_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """The negative log-likelihood of the preferred texts where each is preferred in proportion to exp(score) (Bradley
    and Terry 1952, as reward models are trained; of more than two texts Plackett and Luce); arguments and errors as in
    :func:`pairwise_accuracy`.
    """
    _check_scores(outputs, labels)
    return F.cross_entropy(outputs.float(), labels)


def scores_of_rows(outputs: Tensor, rows: int) -> Tensor:
    """The scores ``[rows, S]`` of what a head gives for every text, ``[rows * S]`` or ``[rows * S, 1]``; on the CPU.

    Raises:
        ValueError: if it gives more than a score.
    """
    if outputs.dim() not in (1, 2) or outputs.shape[1:].numel() != 1:
        raise ValueError(
            f"outputs: expected one score of every text, found {list(outputs.shape)}; pairwise_accuracy is of heads "
            "with num_labels 1, as those of reward models"
        )
    return outputs.reshape(rows, -1).float().cpu()


def _check_scores(outputs: Tensor, labels: Tensor) -> None:
    if not outputs.is_floating_point() or labels.is_floating_point():
        raise TypeError(f"outputs, labels: expected floats and integers, found {outputs.dtype} and {labels.dtype}")
    if outputs.dim() != 2 or outputs.shape[1] < 2 or labels.shape != outputs.shape[:1]:
        raise ValueError(
            f"outputs, labels: expected scores [N, S] of at least two texts and places [N], found "
            f"{list(outputs.shape)} and {list(labels.shape)}"
        )
