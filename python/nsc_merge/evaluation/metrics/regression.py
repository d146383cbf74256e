"""Values and vectors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def rmse(outputs: Tensor, labels: Tensor) -> float:
    """Root of the mean squared error over all known labels, by torchmetrics.

    Args:
        outputs: ``[N, ...]`` or ``[N, ..., 1]``, floating point.
        labels: ``[N, ...]``, floating point.

    Raises:
        TypeError, ValueError: for other dtypes or shapes, or if no label is known.
    """
    from torchmetrics.functional.regression import mean_squared_error

    return mean_squared_error(*_pairs(outputs, labels), squared=False).item()


def l1(outputs: Tensor, labels: Tensor) -> float:
    """Mean absolute error over all known labels, by torchmetrics; arguments and errors as in :func:`rmse`."""
    from torchmetrics.functional.regression import mean_absolute_error

    return mean_absolute_error(*_pairs(outputs, labels)).item()


def pearson(outputs: Tensor, labels: Tensor) -> float:
    """Pearson's correlation over all known labels, by scipy; NaN where a side does not vary, or is no number.

    Arguments and errors as in :func:`rmse`.
    """
    return _correlation("pearsonr", outputs, labels)


def spearman(outputs: Tensor, labels: Tensor) -> float:
    """Spearman's correlation of ranks, as :func:`pearson`."""
    return _correlation("spearmanr", outputs, labels)


def mean_angle(outputs: Tensor, labels: Tensor) -> float:
    """Mean angle in degrees between vectors, as for surface normals.

    Args:
        outputs: ``[N, ..., D]``, of any length but 0.
        labels: ``[N, ..., D]``, NaN where unknown; of any length but 0, too.

    Raises:
        TypeError, ValueError: as :func:`rmse`; or if a label has length 0.
    """
    angle, known = _angles(outputs, labels)
    return math.degrees(angle[known].mean().item())


def cosine(outputs: Tensor, units: Tensor, dim: int = -1) -> Tensor:
    """Cosine between ``outputs`` and unit vectors along ``dim``; faster than F.cosine_similarity on strided axes."""
    return (outputs * units).sum(dim) / outputs.square().sum(dim).sqrt().clamp_min(1e-8)


def cosine_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean of 1 minus the cosine between vectors; shapes as in :func:`mean_angle`."""
    cosines, known = _cosines(outputs, labels)
    return (1 - cosines[known]).mean()


def squared_error(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean squared error; shapes as in :func:`rmse`."""
    error, known = errors(outputs, labels)
    return error[known].square().mean()


def absolute_error(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean absolute error; shapes as in :func:`rmse`."""
    error, known = errors(outputs, labels)
    return error[known].abs().mean()


def errors(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
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


def _correlation(name: str, outputs: Tensor, labels: Tensor) -> float:
    from scipy import stats

    first, second = (values.double() for values in _pairs(outputs, labels))
    # scipy warns of these.
    if not bool(first.isfinite().all()) or any(len(values.unique()) < 2 for values in (first, second)):
        return math.nan
    return float(getattr(stats, name)(first.numpy(), second.numpy()).statistic)


def _pairs(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and labels where the label is known."""
    _, known = errors(outputs, labels)
    return outputs.reshape(labels.shape)[known], labels[known]


def negative_error_per_sample(power: int, outputs: Tensor, labels: Tensor) -> Tensor:
    error, known = errors(outputs, labels)
    size = torch.where(known, error.abs() ** power, 0.0).reshape(len(labels), -1).sum(1)
    return -((size / known.reshape(len(labels), -1).sum(1)) ** (1 / power))


def _cosines(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    errors(outputs, labels)
    if outputs.dim() < 2 or outputs.shape != labels.shape:
        raise ValueError(f"outputs: expected vectors [N, ..., D], found {list(outputs.shape)}")
    # Half of the digits of a cosine are lost in an angle that is small.
    directions, known = F.normalize(labels.double(), dim=-1, eps=1e-30), ~labels.isnan().any(-1)
    if bool((labels == 0).all(-1).any()):
        raise ValueError("labels: expected vectors with a direction, found one of length 0; expected NaN where unknown")
    return cosine(outputs.double(), directions), known


def _angles(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    cosines, known = _cosines(outputs, labels)
    return torch.acos(cosines.clamp(-1, 1)), known


def negative_angle_per_sample(outputs: Tensor, labels: Tensor) -> Tensor:
    angle, known = _angles(outputs, labels)
    total = torch.where(known, angle, 0.0).reshape(len(labels), -1).sum(1)
    return -torch.rad2deg(total / known.reshape(len(labels), -1).sum(1))
