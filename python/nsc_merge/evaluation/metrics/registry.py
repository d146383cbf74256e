"""Every metric by its name."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from nsc_merge.evaluation.metrics.classification import (
    accuracy,
    accuracy_per_sample,
    cross_entropy,
    f1,
    f1_binary,
    matthews,
    mean_iou,
    mean_iou_per_sample,
    negative_entropy_per_sample,
    perplexity,
)
from nsc_merge.evaluation.metrics.edges import edge_f, edge_f_per_sample, edge_loss
from nsc_merge.evaluation.metrics.entities import entity_f1, entity_f1_per_sample
from nsc_merge.evaluation.metrics.generation import (
    OWN,
    PROGRAMS,
    cider,
    cider_per_sample,
    exact_match,
    exact_match_per_sample,
)
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
    bleu,
    bleu_per_sample,
    error_rate,
    error_rate_per_sample,
    rouge,
    rouge_per_sample,
    vqa,
    vqa_per_sample,
)
from nsc_merge.utils.option_checks import check_choice, check_count

Measure = Callable[..., float]
PerSample = Callable[..., Tensor]


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: key in :data:`METRICS`.
        label: for tables.
        shapes: what outputs and labels must be.
        measure: ``(outputs, labels) -> float`` over a whole set.
        quality: ``(outputs, labels) -> [N]``, per sample, higher is better.
        per_sample: label of ``quality`` where a single sample has no such figure; else it is the metric's, with a minus
            where that is lower for the better.
        loss: ``(outputs, labels) -> scalar``, the usual training loss of such a task; None where there is none.
        unit: of the value, empty for a share from 0 to 1 and for the unit of the labels.
        lower_is_better: direction.
        options: names of further arguments of measure, quality and loss.
        choices: option -> what it may be, where that is one of a few words.
        settings: those that :meth:`with_options` set.
        writes: whether measure and quality want ``ends``, the tokens that end a text and are no words of it.
        decodes: whether they want ``decode``, which makes text of a sequence of tokens.
        named: whether they want ``classes``, the names of the classes.
        embeds: whether they are of embeddings of texts, and want ``similarity``, by which these are compared.
        of_samples: ``(quality, counts) -> float``, both ``[N]``: what ``measure`` is, of the quality of every sample
            and of how many labels are known of it; None where it takes more.
        package: that alone says what the figure is, by its name; empty for none.
    """

    name: str
    label: str
    shapes: str
    measure: Measure
    quality: PerSample
    loss: Callable[..., Tensor] | None = None
    unit: str = ""
    lower_is_better: bool = False
    options: tuple[str, ...] = ()
    choices: Mapping[str, Sequence[str]] = field(default_factory=dict)
    per_sample: str = ""
    writes: bool = False
    decodes: bool = False
    named: bool = False
    embeds: bool = False
    of_samples: Callable[[Tensor, Tensor], float] | None = None
    package: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def compares(self) -> str | None:
        """What labels of texts whose embeddings are compared are for it, see
        :class:`nsc_merge.calibration.raw.labels.Labelling`; None of a metric that is of no embeddings.
        """
        if self.embeds:
            return "same"
        if self.name == "accuracy":
            return "nearest"
        return "value" if self.loss in (squared_error, absolute_error) else None

    @property
    def quality_label(self) -> str:
        """What ``quality`` is, for axes."""
        return self.per_sample or (f"-{self.label}" if self.lower_is_better else self.label)

    def with_options(self, **given: Any) -> Metric:
        """The same metric with its options set.

        Raises:
            ValueError: if it has no such option, or if it may not be this.
        """
        for name in given:
            if name not in self.options:
                listed = ", ".join(self.options) or "none"
                raise ValueError(f"{name}: not an option of metric {self.name!r} (options: {listed})")
            if name in self.choices:
                check_choice(name, given[name], self.choices[name])
        if not given:
            return self
        label = self.label
        if "k" in given:
            check_count("k", given["k"])
            label = f"{label.partition('@')[0]}@{given['k']}"
        program = str(given.get("program", OWN))
        named = program != OWN
        return replace(
            self,
            label=f"{label} ({program})" if named else label,
            decodes=named or self.decodes,
            package=program if named else self.package,
            measure=functools.partial(self.measure, **given),
            quality=functools.partial(self.quality, **given),
            loss=functools.partial(self.loss, **given) if self.loss is not None else None,
            settings=given,
        )


def _mean_of_samples(quality: Tensor, counts: Tensor) -> float:
    return quality.nanmean().item()


def _mean_of_labels(quality: Tensor, counts: Tensor) -> float:
    return ((quality * counts).nansum() / counts.sum()).item()


_CLASSES = "outputs: logits [N, ..., C]; labels: integers [N, ...], -100 where unknown"
_TAGS = "outputs: logits [N, T, C]; labels: tags [N, T], -100 at all tokens of a word but its first"
_VALUES = "outputs: [N, ...] or [N, ..., 1]; labels: [N, ...], NaN where unknown"
_EMBEDDINGS = "outputs: embeddings [N, S, d]; labels: numbers [N, S] of the same questions, and documents"
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
        Metric(
            "vqa",
            "VQA acc",
            _TEXTS,
            vqa,
            vqa_per_sample,
            writes=True,
            decodes=True,
            of_samples=_mean_of_samples,
        ),
    )
}
