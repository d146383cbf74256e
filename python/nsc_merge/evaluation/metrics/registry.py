"""Every metric by its name."""

from __future__ import annotations

import functools
import math

from torch import Tensor

from nsc_merge.evaluation.metrics.classification import (
    AVERAGES,
    accuracy,
    accuracy_per_sample,
    binary_cross_entropy,
    cross_entropy,
    f1,
    f1_binary,
    matthews,
    mean_iou,
    mean_iou_per_sample,
    multilabel_f1,
    multilabel_f1_per_sample,
    negative_entropy_per_sample,
    pairwise_accuracy,
    pairwise_accuracy_per_sample,
    perplexity,
    preference_loss,
)
from nsc_merge.evaluation.metrics.edges import edge_f, edge_f_per_sample, edge_loss
from nsc_merge.evaluation.metrics.entities import entity_f1, entity_f1_per_sample
from nsc_merge.evaluation.metrics.generation import (
    PROGRAMS,
    cider,
    cider_per_sample,
    exact_match,
    exact_match_per_sample,
)
from nsc_merge.evaluation.metrics.metric import Metric
from nsc_merge.evaluation.metrics.regression import (
    absolute_error,
    cosine_loss,
    l1,
    mean_angle,
    negative_angle_per_sample,
    negative_error_per_sample,
    pearson,
    rmse,
    spearman,
    squared_error,
)
from nsc_merge.evaluation.metrics.retrieval import (
    AT,
    mrr,
    mrr_per_sample,
    ndcg,
    ndcg_per_sample,
    recall,
    recall_per_sample,
)
from nsc_merge.evaluation.metrics.texts import (
    anls,
    anls_per_sample,
    bleu,
    bleu_per_sample,
    error_rate,
    error_rate_per_sample,
    relaxed_accuracy,
    relaxed_accuracy_per_sample,
    rouge,
    rouge_per_sample,
    vqa,
    vqa_per_sample,
)


def _mean_of_samples(quality: Tensor, counts: Tensor) -> float:
    return quality.nanmean().item()


def _mean_of_labels(quality: Tensor, counts: Tensor) -> float:
    return ((quality * counts).nansum() / counts.sum()).item()


_CLASSES = "outputs: logits [N, ..., C]; labels: integers [N, ...], -100 where unknown"
_TAGS = "outputs: logits [N, T, C]; labels: tags [N, T], -100 at all tokens of a word but its first"
_VALUES = "outputs: [N, ...] or [N, ..., 1]; labels: [N, ...], NaN where unknown"
_EMBEDDINGS = "outputs: embeddings [N, S, d]; labels: numbers [N, S] of the same questions, and documents"
_SCORES = "outputs: scores [N, S] of the texts of a row; labels: places [N] of the preferred"
_TEXTS = "outputs: tokens [N, T]; labels: tokens [N, T'] or [N, R, T'], filled up by -100"

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "accuracy",
            "acc",
            _CLASSES,
            accuracy,
            accuracy_per_sample,
            cross_entropy,
            of_samples=_mean_of_labels,
        ),
        Metric("miou", "mIoU", _CLASSES, mean_iou, mean_iou_per_sample, cross_entropy),
        Metric("f1", "F1", _CLASSES, f1, accuracy_per_sample, cross_entropy, per_sample="acc"),
        Metric("f1_binary", "F1", _CLASSES, f1_binary, accuracy_per_sample, cross_entropy, per_sample="acc"),
        Metric("matthews", "MCC", _CLASSES, matthews, accuracy_per_sample, cross_entropy, per_sample="acc"),
        Metric(
            "multilabel_f1",
            "F1",
            "outputs: logits [N, C]; labels: [N, C], 1 where a class is true, 0 where not, NaN where unknown",
            multilabel_f1,
            multilabel_f1_per_sample,
            binary_cross_entropy,
            options=("average",),
            choices={"average": AVERAGES},
            per_sample="F1 of a sample",
            package="torchmetrics",
        ),
        Metric(
            "pairwise_accuracy",
            "pair acc",
            _SCORES,
            pairwise_accuracy,
            pairwise_accuracy_per_sample,
            preference_loss,
            of_samples=_mean_of_samples,
        ),
        Metric("entity_f1", "entity F1", _TAGS, entity_f1, entity_f1_per_sample, cross_entropy, named=True),
        Metric(
            "perplexity",
            "ppl",
            _CLASSES,
            perplexity,
            negative_entropy_per_sample,
            cross_entropy,
            lower_is_better=True,
            of_samples=lambda quality, counts: math.exp(-_mean_of_labels(quality, counts)),
            per_sample="-log ppl",
        ),
        *(
            Metric(
                name,
                label,
                _VALUES,
                measure,
                functools.partial(negative_error_per_sample, 1),
                squared_error,
                per_sample="-L1",
            )
            for name, label, measure in (("pearson", "r", pearson), ("spearman", "rho", spearman))
        ),
        Metric(
            "rmse",
            "RMSE",
            _VALUES,
            rmse,
            functools.partial(negative_error_per_sample, 2),
            squared_error,
            lower_is_better=True,
        ),
        Metric(
            "l1",
            "L1",
            _VALUES,
            l1,
            functools.partial(negative_error_per_sample, 1),
            absolute_error,
            lower_is_better=True,
        ),
        Metric(
            "mean_angle",
            "deg",
            "outputs: vectors [N, ..., D]; labels: vectors [N, ..., D], NaN where unknown",
            mean_angle,
            negative_angle_per_sample,
            cosine_loss,
            unit="degrees",
            lower_is_better=True,
        ),
        Metric(
            "edge_f",
            "edge F",
            "outputs: [N, H, W] or [N, H, W, 1]; labels: [N, H, W], an edge above 0.5",
            edge_f,
            edge_f_per_sample,
            edge_loss,
            options=("tolerance", "thresholds", "logits"),
            choices={"logits": (True, False)},
            least={"tolerance": 0, "thresholds": 1},
        ),
        Metric(
            "exact_match",
            "EM",
            "outputs: logits [N, T, C] or tokens [N, T]; labels: tokens [N, T], -100 where nothing is asked",
            exact_match,
            exact_match_per_sample,
            cross_entropy,
            of_samples=_mean_of_samples,
        ),
        *(
            Metric(
                name,
                f"{label}@{AT}",
                _EMBEDDINGS,
                measure,
                quality,
                options=("k",),
                least={"k": 1},
                embeds=True,
                of_samples=_mean_of_samples,
            )
            for name, label, measure, quality in (
                ("ndcg", "nDCG", ndcg, ndcg_per_sample),
                ("mrr", "MRR", mrr, mrr_per_sample),
                ("recall", "recall", recall, recall_per_sample),
            )
        ),
        Metric(
            "cider",
            "CIDEr",
            _TEXTS,
            cider,
            cider_per_sample,
            options=("program",),
            choices={"program": PROGRAMS},
            writes=True,
        ),
        *(
            Metric(
                kind,
                f"ROUGE-{kind[-1]}",
                _TEXTS,
                functools.partial(rouge, kind),
                functools.partial(rouge_per_sample, kind),
                writes=True,
                decodes=True,
                of_samples=_mean_of_samples,
                package="torchmetrics",
            )
            for kind in ("rouge1", "rouge2", "rougeL")
        ),
        Metric(
            "bleu",
            "BLEU",
            _TEXTS,
            bleu,
            bleu_per_sample,
            per_sample="sentence BLEU",
            writes=True,
            decodes=True,
            package="torchmetrics",
        ),
        *(
            Metric(
                name,
                name.upper(),
                _TEXTS,
                functools.partial(error_rate, unit),
                functools.partial(error_rate_per_sample, unit),
                lower_is_better=True,
                writes=True,
                decodes=True,
                package="torchmetrics",
            )
            for name, unit in (("wer", "word"), ("cer", "char"))
        ),
        *(
            Metric(
                name,
                label,
                _TEXTS,
                measure,
                quality,
                writes=True,
                decodes=True,
                of_samples=_mean_of_samples,
                package=package,
            )
            for name, label, measure, quality, package in (
                ("vqa", "VQA acc", vqa, vqa_per_sample, ""),
                ("relaxed_accuracy", "relaxed acc", relaxed_accuracy, relaxed_accuracy_per_sample, ""),
                ("anls", "ANLS", anls, anls_per_sample, "torchmetrics"),
            )
        ),
    )
}
