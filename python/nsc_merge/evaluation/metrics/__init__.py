"""What a task's outputs are measured by: every metric with its direction, unit, per-sample quality and loss.

Classes, and the components of a vector, are in the last axis of the outputs; samples are in the first. Labels that are
not known are left out: :data:`IGNORE` among class indices, NaN among values.

>>> METRICS["miou"].measure(outputs, labels)
"""

from __future__ import annotations

from nsc_merge.evaluation.metrics.classification import (
    Outputs,
    Predicted,
    accuracy,
    accuracy_per_sample,
    cross_entropy,
    f1,
    f1_binary,
    matthews,
    mean_iou,
    mean_iou_per_sample,
    pairwise_accuracy,
    perplexity,
    predicted,
    preference_loss,
    scores_of_rows,
)
from nsc_merge.evaluation.metrics.edges import edge_f, edge_f_per_sample
from nsc_merge.evaluation.metrics.entities import check_tags, entities, entity_f1, entity_f1_per_sample
from nsc_merge.evaluation.metrics.generation import OWN, cider, cider_per_sample, exact_match, exact_match_per_sample
from nsc_merge.evaluation.metrics.labels import IGNORE
from nsc_merge.evaluation.metrics.metric import Metric
from nsc_merge.evaluation.metrics.registry import METRICS
from nsc_merge.evaluation.metrics.regression import (
    absolute_error,
    cosine,
    cosine_loss,
    l1,
    mean_angle,
    pearson,
    rmse,
    spearman,
    squared_error,
)

__all__ = [
    "IGNORE",
    "METRICS",
    "OWN",
    "Metric",
    "Outputs",
    "Predicted",
    "absolute_error",
    "accuracy",
    "accuracy_per_sample",
    "check_tags",
    "cider",
    "cider_per_sample",
    "cosine",
    "cosine_loss",
    "cross_entropy",
    "edge_f",
    "edge_f_per_sample",
    "entities",
    "entity_f1",
    "entity_f1_per_sample",
    "exact_match",
    "exact_match_per_sample",
    "f1",
    "f1_binary",
    "l1",
    "matthews",
    "mean_angle",
    "mean_iou",
    "mean_iou_per_sample",
    "pairwise_accuracy",
    "pearson",
    "perplexity",
    "predicted",
    "preference_loss",
    "rmse",
    "scores_of_rows",
    "spearman",
    "squared_error",
]
