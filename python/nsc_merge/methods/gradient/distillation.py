"""Distillation: coefficients for which each task's predictions are those of its own model.

Free of labels, but not of the tasks' outputs: task k's batches run through the merged model and, once, through the base
with adapter k alone, both with the task's head; minimised is ``sum_k D(f_k(x) || f_merged(x))``. Not from the NSC
paper; knowledge distillation (arXiv 1503.02531) into a model that has nothing but merge coefficients to learn.
docs/results.md has its figures next to those of the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nsc_merge.calibration.batches import Batch
from nsc_merge.calibration.forward_passes import Pass
from nsc_merge.descent.coefficients import BoundedCoefficients
from nsc_merge.descent.mean_loss import Backward
from nsc_merge.descent.options import SharedDescentOptions
from nsc_merge.methods.gradient.learned_coefficients import descend, presence
from nsc_merge.methods.gradient.task_models import Kept, OwnModels
from nsc_merge.methods.method import Method, Problem
from nsc_merge.methods.task_outputs import (
    POSITIONS,
    Outputs,
    check_likelihood,
    check_outputs,
    last_token,
    likelihoods_of,
    output_of,
    real_positions,
)
from nsc_merge.models.families import find_family
from nsc_merge.models.forward_contexts import shared_forward
from nsc_merge.results.result import MergeResult
from nsc_merge.utils.option_checks import check_choice

NORMALISATIONS = ("none", "task", "variance")


@dataclass(frozen=True)
class DistillOptions(SharedDescentOptions):
    """Options of ``method="distill"``.

    Attributes:
        optimizer: as all that follow up to ``progress``, in :class:`nsc_merge.descent.options.SharedDescentOptions`.
        lr: see there.
        weight_decay: see there.
        steps: see there.
        schedule: see there.
        early_stop: see there.
        init: see there.
        share: see there.
        warm_up: see there.
        clamp: see there.
        seed: see there.
        progress: see there.
        outputs: task -> function of model and batch that gives its output: logits with classes last, or values. Tasks
            without one have the model's own logits.
        likelihood: what an output parametrises, one for all tasks or one per task: ``"categorical"`` (classes, whose
            distance is the Kullback-Leibler divergence in nats) or ``"gaussian"`` (values, whose distance is the mean
            squared difference).
        positions: which of an output ``[N, T, C]`` count: ``"all"`` but those at padding; or ``"last"``, at the last
            real token. None takes ``"last"`` for the own logits of a model that predicts every token, and ``"all"``
            for ``outputs``.
        normalise: ``"variance"`` divides squared differences of values by the variance of what the task's own model
            predicts, over all batches so far, so that their unit does not matter; ``"none"`` does not, and tasks weigh
            as their losses do; ``"task"`` divides every distance by that of the base model, so that tasks weigh alike.
    """

    lr: float = 1e-2
    outputs: Outputs | None = None
    likelihood: str | Mapping[str, str] = "categorical"
    positions: str | None = None
    normalise: str = "variance"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_likelihood(self.likelihood)
        if self.positions is not None:
            check_choice("positions", self.positions, POSITIONS)
        check_choice("normalise", self.normalise, NORMALISATIONS)


@dataclass(frozen=True)
class Target:
    """What a task's own model predicts for a batch.

    Attributes:
        output: at the positions that count.
        base: distance of the base model's output; 1 where it is not asked for.
    """

    output: Tensor
    base: Tensor


class Predictions:
    """Runs an attached model with the tasks' heads.

    Args:
        problem: the adapters and the model.
        options: say what is compared, and how.
    """

    def __init__(self, problem: Problem, options: DistillOptions) -> None:
        family = find_family(problem.model)
        self._model, self._tasks, self._outputs = problem.model, problem.tasks, options.outputs
        self._likelihoods = likelihoods_of(options.likelihood, problem.tasks)
        self._mask = family.mask if family and family.tokens else None
        usual = ["last" if self._mask and task not in (options.outputs or {}) else "all" for task in problem.tasks]
        self._last = [(options.positions or one) == "last" for one in usual]

    def of(self, number: int, batch: Batch) -> Tensor:
        """The output of task ``number`` at the positions that count, float32 or wider."""
        output = output_of(self._outputs, self._tasks[number], self._model, batch)
        output = output if output.dtype == torch.float64 else output.float()
        if output.dim() < 3:
            return output
        mask = batch.get(self._mask) if self._mask else None
        real = real_positions(output, mask)
        if self._last[number]:
            return last_token(output, real)
        return output if real is None else output[real]

    def distance(self, number: int, output: Tensor, own: Tensor) -> Tensor:
        """Of ``output`` from ``own``, both as :meth:`of` returns them."""
        if self.predicts_values(number):
            return (output - own).square().mean()
        each = F.kl_div(output.log_softmax(-1), own.log_softmax(-1), reduction="none", log_target=True)
        return each.sum(-1).mean()

    def predicts_values(self, number: int) -> bool:
        """Whether a task's output is values, rather than classes."""
        return self._likelihoods[number] == "gaussian"


class Variance:
    """Of values ``[..., C]`` around the mean of their component, over all that were added."""

    def __init__(self) -> None:
        self._count = 0
        self._origin: Tensor | None = None
        self._sums: list[Tensor] = []

    def add(self, values: Tensor) -> None:
        rows = values.double().flatten(0, -2) if values.dim() > 1 else values.double()[:, None]
        if self._origin is None:
            # Sums of squares far from zero would cancel, and values that are all alike not give 0.
            self._origin = rows[0]
            self._sums = [torch.zeros_like(rows[0]), torch.zeros_like(rows[0])]
        rows = rows - self._origin
        self._count += len(rows)
        self._sums = [self._sums[0] + rows.sum(0), self._sums[1] + rows.square().sum(0)]

    def __call__(self) -> Tensor:
        """Mean over the components, a float64 scalar."""
        mean, square = (total / self._count for total in self._sums)
        return (square - mean.square()).mean()


def _run(problem: Problem, given: Mapping[str, Any]) -> MergeResult:
    options = DistillOptions(**given)
    check_outputs(options.outputs, problem.tasks)
    predictions, present = Predictions(problem, options), presence(problem)
    count = len(problem.tasks)

    def losses(coefficients: BoundedCoefficients) -> Backward:
        own = OwnModels(problem, coefficients, present)
        scaled = [n for n in range(count) if options.normalise == "variance" and predictions.predicts_values(n)]
        variances = {number: Variance() for number in scaled}
        kept: Kept[Target] = Kept(lambda target: target.output.untyped_storage().nbytes())

        def target(number: int, one: Pass) -> Target:
            with own.of(number):
                output = predictions.of(number, one.inputs)
            base = output.new_ones(())
            if options.normalise == "task":
                with own.of(None):
                    base = predictions.distance(number, predictions.of(number, one.inputs), output)
            # Not where the objective is only compared: both sides are divided by the same.
            if number in variances and torch.is_grad_enabled():
                variances[number].add(output)
                if not variances[number]() > 0:
                    raise ValueError(
                        "normalise: 'variance' needs outputs that differ from sample to sample, those of task "
                        f"{problem.tasks[number]!r} in its own model are all alike; 'none' takes them"
                    )
            return Target(output, base.clamp(min=1e-12))

        def backward(one: Pass) -> Tensor:
            numbers = one.tasks[0]
            # The single models run first: the merged one's graph must not see their coefficients.
            targets = [kept(one.sources[0], number, partial(target, number, one)) for number in numbers]
            coefficients.spread()
            with shared_forward(problem.model):
                found = [
                    predictions.distance(number, predictions.of(number, one.inputs), wanted.output)
                    / wanted.base
                    / (variances[number]() if number in variances else 1.0)
                    for number, wanted in zip(numbers, targets, strict=True)
                ]
            total = torch.stack(found)
            if torch.is_grad_enabled():
                (total.sum() / count).backward()
            return total.detach()

        return backward

    return descend("distill", problem, options, losses, label="distillation")


METHODS = (
    Method(
        "distill",
        "learns coefficients by matching the predictions of each task's own model (no labels)",
        "this project; knowledge distillation, Hinton et al. 2015, arXiv 1503.02531, into merge coefficients",
        DistillOptions,
        _run,
        needs=frozenset({"data", "gradients", "outputs"}),
        gives="coefficients",
    ),
)
