"""What a metric is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from nsc_merge.evaluation.metrics.generation import OWN
from nsc_merge.evaluation.metrics.regression import absolute_error, squared_error
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
        least: option -> the least that it may be, where that is a whole number.
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
    choices: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    least: Mapping[str, int] = field(default_factory=dict)
    per_sample: str = ""
    writes: bool = False
    decodes: bool = False
    named: bool = False
    embeds: bool = False
    of_samples: Callable[[Tensor, Tensor], float] | None = None
    package: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def several(self) -> bool:
        """Whether several classes of a sample may be true."""
        return self.name == "multilabel_f1"

    @property
    def scores(self) -> bool:
        """Whether it compares the scores that a model gives to each of several texts."""
        return self.name == "pairwise_accuracy"

    @property
    def compares(self) -> str | None:
        """What labels of texts whose embeddings or scores are compared are for it, see
        :class:`nsc_merge.calibration.raw.labels.Labelling`; None of a metric that is of no texts read alone.
        """
        if self.embeds:
            return "same"
        if self.scores:
            return "preferred"
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
            if name in self.least:
                check_count(name, given[name], self.least[name])
        if not given:
            return self
        label = self.label
        if "k" in given:
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
