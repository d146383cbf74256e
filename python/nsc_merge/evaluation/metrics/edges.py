"""Edge maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nsc_merge.evaluation.metrics.regression import (
    absolute_error,
    errors,
)
from nsc_merge.utils.option_checks import check_count


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


def _edge_counts(outputs: Tensor, labels: Tensor, tolerance: int, thresholds: int, logits: bool) -> Tensor:
    """``[thresholds, N, 4]``: right and all predicted edge pixels, found and all true ones."""
    _, known = errors(outputs, labels)
    if labels.dim() != 3:
        raise ValueError(f"labels: expected edge maps [N, H, W], found {list(labels.shape)}")
    check_count("tolerance", tolerance, 0)
    check_count("thresholds", thresholds)
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


def edge_loss(outputs: Tensor, labels: Tensor, *, logits: bool = False, **_others: int) -> Tensor:
    if not logits:
        return absolute_error(outputs, labels)
    _, known = errors(outputs, labels)
    return F.binary_cross_entropy_with_logits(outputs.reshape(labels.shape)[known], labels[known])
