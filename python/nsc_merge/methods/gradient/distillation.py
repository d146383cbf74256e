"""Distillation: coefficients for which each task's predictions are those of its own model.

Free of labels, but not of the tasks' outputs: task k's batches run through the merged model and, once, through the base
with adapter k alone, both with the task's head; minimised is ``sum_k D(f_k(x) || f_merged(x))``. Not from the NSC
paper; knowledge distillation (arXiv 1503.02531) into a model that has nothing but merge coefficients to learn.
docs/results.md has its figures next to those of the others.

``D`` is bounded, so that predictions that no merge can keep cost a fixed price, as in robust regression (Geman and
McClure, Statistical methods for tomographic image reconstruction, 1987), and do not outweigh those that one can; or a
divergence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsc_merge.calibration.forward_passes import Pass, of_the_whole
from nsc_merge.descent.coefficients import BoundedCoefficients
from nsc_merge.descent.mean_loss import Loss, backward_of
from nsc_merge.descent.options import SharedDescentOptions
from nsc_merge.methods.gradient.learned_coefficients import descend, presence
from nsc_merge.methods.gradient.own_answers import Answered, NewTokens, check_new_tokens, writing_of
from nsc_merge.methods.gradient.regmean_terms import check_regmean, folded, with_terms
from nsc_merge.methods.gradient.task_models import Kept, OwnModels
from nsc_merge.methods.gradient.variance import Variance, variance_of
from nsc_merge.methods.likelihoods import (
    OF_LOGITS_OR_VALUES,
    check_classes,
    check_likelihood,
    check_one_class,
    differences,
    likelihoods_of,
)
from nsc_merge.methods.method import Method, Problem
from nsc_merge.methods.task_outputs import (
    POSITIONS,
    Outputs,
    check_outputs,
    last_token,
    mask_of_outputs,
    output_of,
    predicts_next,
    real_positions,
    share_of,
    with_heads,
)
from nsc_merge.models.families import Family, check_family, family_of, find_family
from nsc_merge.models.forward_contexts import shared_forward
from nsc_merge.processes.group import current
from nsc_merge.results.result import MergeResult
from nsc_merge.utils.option_checks import check_choice

NORMALISATIONS = ("none", "task", "variance")
DISTANCES = ("bounded", "divergence")


@dataclass(frozen=True)
class DistillOptions(SharedDescentOptions):
    """Options of ``method="distill"``.

    Attributes:
        optimizer: as all that follow up to ``resume_from``, in :class:`nsc_merge.descent.options.SharedDescentOptions`.
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
        state_to: see there.
        state_every: see there.
        state_of: see there.
        resume_from: see there.
        outputs: task -> function of model and batch that gives its output: logits with classes last, or values. Tasks
            without one have the model's own logits, with the head that their adapter brought, or its values.
        likelihood: what an output parametrises, for all tasks or per task: ``"categorical"`` (classes, or where an
            answer in a text starts and ends), ``"bernoulli"`` (several may be true) or ``"gaussian"`` (values, or
            embeddings of sentence-transformers).
        distance: ``"bounded"``, between 0 and 1 at each position: the total variation ``1/2 sum |p - q|`` for classes,
            and ``d / (1 + d)`` of the squared difference ``d`` for values, which should be normalised by their
            variance; or ``"divergence"``, that of Kullback and Leibler in nats for classes, and the mean squared
            difference for values.
        positions: which of an output ``[N, T, C]`` count: ``"all"`` but those at padding; or ``"last"``, at the last
            real token. None takes ``"last"`` for the own logits of a model that predicts the next token, and ``"all"``
            for ``outputs``.
        new_tokens: how many tokens of an answer count, where the model writes one: the task's own model writes it once
            for every batch, greedily and to its end if that comes sooner, and predictions are compared at each of its
            tokens, given those before it. 1 is the first token alone. A number is for all tasks without ``outputs``; a
            mapping is for some of all tasks, whose functions give logits ``[N, T, V]`` of what follows every token.
        regmean: learn two coefficients for every task and module, that of its update and that of its term in RegMean's
            sum (:mod:`nsc_merge.methods.gradient.regmean_terms`), from the mean of task arithmetic at ``init`` and
            RegMean's merge on. The result holds one update for each module, of rank ``sum_k r_k``, and no coefficients.
            A mapping gives options of method ``"regmean"`` by name, all but ``scale``.
        family: what is known of the model, a :class:`nsc_merge.Family` or some of its fields by name; the rest, and all
            when None, is found from the model.
        normalise: ``"variance"`` divides squared differences of values by the variance of what the task's own model
            predicts, over all batches so far, so that their unit does not matter; ``"none"`` does not, and tasks weigh
            as their distances do; ``"task"`` divides every distance by that of the base model, so that tasks weigh
            alike, and is not for values with a bounded distance.
    """

    lr: float = 1e-2
    outputs: Outputs | None = None
    likelihood: str | Mapping[str, str] = "categorical"
    distance: str = "bounded"
    positions: str | None = None
    new_tokens: NewTokens = 1
    normalise: str = "variance"
    regmean: bool | Mapping[str, Any] = False
    family: Family | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_outputs(self.outputs)
        check_likelihood(self.likelihood, OF_LOGITS_OR_VALUES)
        if self.positions is not None:
            check_choice("positions", self.positions, POSITIONS)
        check_new_tokens(self.new_tokens)
        check_choice("distance", self.distance, DISTANCES)
        check_choice("normalise", self.normalise, NORMALISATIONS)
        check_regmean(self.regmean)
        check_family(self.family)


@dataclass(frozen=True)
class Target:
    """What a task's own model predicts for a batch.

    Attributes:
        output: at the positions that count.
        base: distance of the base model's output; 1 where it is not asked for.
        counts: False where a process runs the batch only because others run theirs meanwhile.
        answered: what it wrote, where predictions are compared along that.
    """

    output: Tensor
    base: Tensor
    counts: bool
    answered: Answered | None = None


class Predictions:
    """Runs an attached model with the tasks' heads.

    Args:
        problem: the adapters and the model.
        options: say what is compared, and how.
    """

    def __init__(self, problem: Problem, options: DistillOptions) -> None:
        given = options.family
        # Of the outputs, whatever is adapted: of an encoder-decoder that is the decoder.
        family = find_family(problem.model) if given is None else family_of(problem.model, None, given)
        self._model, self._tasks = problem.model, problem.tasks
        self._likelihoods = likelihoods_of(options.likelihood, problem.tasks)
        self._mask = mask_of_outputs(family)
        self._bounded = options.distance == "bounded"
        values = [task for number, task in enumerate(problem.tasks) if self.predicts_values(number)]
        one_of = dict(zip(problem.tasks, self._likelihoods, strict=True))
        own = [task for task, kind in one_of.items() if kind == "categorical" and task not in (options.outputs or {})]
        check_one_class(problem.model, own, "likelihood", "'bernoulli'")
        self._outputs = with_heads(options.outputs, problem.adapters, problem.model, values)
        if self._bounded and options.normalise == "task" and values:
            raise ValueError(
                f"normalise: 'task' comes after the bound, and differences of the values of {values} would reach it by "
                "their unit; expected 'variance', or distance='divergence'"
            )
        answers = predicts_next(problem.model, family)
        usual = ["last" if answers and task not in (options.outputs or {}) else "all" for task in problem.tasks]
        self._last = [(options.positions or one) == "last" for one in usual]
        self._writing = writing_of(problem.model, family, options.new_tokens)
        self._most = [self._answer_of(number, options) for number in range(len(problem.tasks))]
        if self._writing is not None and max(self._most) == 1:
            raise ValueError(
                f"new_tokens: {options.new_tokens} is for tasks that are compared by the model's own logits, and there "
                "are none; expected a mapping of tasks to numbers, or 1"
            )

    def _answer_of(self, number: int, options: DistillOptions) -> int:
        """How many tokens the answer of a task has at most."""
        task, given = self._tasks[number], options.new_tokens
        own = task not in (options.outputs or {}) and not self.predicts_values(number)
        most = given.get(task, 1) if isinstance(given, Mapping) else given if own else 1
        if most > 1 and self.predicts_values(number):
            raise ValueError(f"new_tokens: the output of task {task!r} is values; expected 1, found {most}")
        if most > 1 and options.positions == "all":
            raise ValueError(f"positions: along an answer expected None or 'last', found 'all' for task {task!r}")
        return most

    def written(self, number: int, one: Pass) -> Answered | None:
        """What the attached model answers to a pass of task ``number``; None where that does not matter."""
        if self._writing is None:
            return None

        def predict(inputs: Mapping[str, Any]) -> Tensor:
            return self._output(number, inputs)

        own = self._tasks[number] not in (self._outputs or {})
        return self._writing(predict, one, self._most[number], self._model if own else None)

    def of(self, number: int, one: Pass, answered: Answered | None = None) -> tuple[Tensor, float]:
        """The output of task ``number`` at the positions of a pass that count, float32 or wider, and what part of those
        of the whole pass they are. Of an ``answered`` one it is the part of its rows, whose weights it has.
        """
        inputs = {**one.inputs, **answered.inputs} if answered else one.inputs
        output = self._output(number, inputs)
        output = output if output.dtype == torch.float64 else output.float()
        if self._likelihoods[number] == "categorical":
            check_classes(output, self._tasks[number], "likelihood", "'gaussian' for values")
        if answered is not None:
            return output[answered.predicts], one.share
        if output.dim() < 3:
            return output, one.share
        real = real_positions(self._model, output, one.inputs.get(self._mask) if self._mask else None)
        if self._last[number]:
            return last_token(output, real), one.share
        return output if real is None else output[real], share_of(self._model, one, real, self._mask)

    def _output(self, number: int, inputs: Mapping[str, Any]) -> Tensor:
        values = self.predicts_values(number)
        return output_of(self._outputs, self._tasks[number], self._model, inputs, values=values)

    def distance(
        self,
        number: int,
        output: Tensor,
        own: Tensor,
        variance: Tensor | float = 1.0,
        answered: Answered | None = None,
    ) -> Tensor:
        """Of ``output`` from ``own``, both as :meth:`of` returns them; 0 where there is no position. Squared
        differences of values are divided by ``variance``.
        """
        each = differences(output, own, self._likelihoods[number], variance, bounded=self._bounded)
        if answered is not None:
            return (each * answered.weights).sum()
        return each.mean() if each.numel() else each.sum()

    def predicts_values(self, number: int) -> bool:
        """Whether a task's output is values, rather than classes."""
        return self._likelihoods[number] == "gaussian"


def _run(problem: Problem, given: Mapping[str, Any]) -> MergeResult:
    options = DistillOptions(**given)
    check_outputs(options.outputs, problem.tasks)
    check_new_tokens(options.new_tokens, problem.tasks)
    predictions = Predictions(problem, options)
    count = len(problem.tasks)
    filtered, every, init = check_regmean(options.regmean), problem, None
    if filtered is not None:
        options.check_tasks(problem.tasks)
        every, init = with_terms(problem, filtered, options.init)
    present = presence(every)

    def losses(coefficients: BoundedCoefficients) -> Loss:
        own = OwnModels(every, coefficients, present)
        scaled = [n for n in range(count) if options.normalise == "variance" and predictions.predicts_values(n)]
        variances = {number: Variance() for number in scaled}
        divisors: dict[int, Tensor] = {}

        def note(number: int | None, target: Target) -> None:
            # Not where the objective is only compared: both sides are divided by the same.
            if number in variances and target.counts and torch.is_grad_enabled():
                variances[number].add(target.output)

        kept: Kept[Target] = Kept(lambda target: target.output.untyped_storage().nbytes(), note)

        def target(number: int | None, one: Pass) -> Target:
            assert number is not None
            with own.of(number):
                answered = predictions.written(number, one)
                output, share = predictions.of(number, one, answered)
            base = output.new_ones(())
            if options.normalise == "task":
                with own.of(None):
                    of_base = predictions.of(number, one, answered)[0]
                base = predictions.distance(number, of_base, output, answered=answered)
                base = of_the_whole(one, base * (share or 1.0))
            return Target(output, base.clamp(min=1e-12), share > 0, answered)

        def settle() -> None:
            """Find what squared distances of values are divided by, over all that the processes have seen."""
            shared = current().share([{number: one.moments for number, one in variances.items()}])
            for number in variances:
                parts = [one[number] for one in shared if one[number][0]]
                if not parts:
                    continue
                divisors[number] = variance_of(parts)
                if not divisors[number] > 0:
                    raise ValueError(
                        "normalise: 'variance' needs outputs that differ from sample to sample, those of task "
                        f"{problem.tasks[number]!r} in its own model are all alike; 'none' takes them"
                    )

        def targets_of(one: Pass) -> dict[int | None, Target]:
            targets = kept(one.sources[0], one.tasks[0], lambda number: target(number, one))
            if kept.fresh and variances and torch.is_grad_enabled():
                settle()
            return targets

        def meet(one: Pass) -> None:
            targets_of(one)

        def backward(one: Pass) -> Tensor:
            numbers = one.tasks[0]
            # The single models run first: the merged one's graph must not see their coefficients.
            targets = targets_of(one)
            coefficients.spread()
            found = []
            with shared_forward(problem.model):
                for number in numbers:
                    wanted = targets[number]
                    output, share = predictions.of(number, one, wanted.answered)
                    divisor = divisors.get(number, 1.0)
                    value = predictions.distance(number, output, wanted.output, divisor, wanted.answered)
                    found.append(share * value / wanted.base)
            total = torch.stack(found)
            if torch.is_grad_enabled():
                backward_of(total.sum() / count)
            return total.detach()

        # Variances are of all batches so far.
        return Loss(backward, meet if variances else None)

    result = descend("distill", every, options, losses, label="distillation", tasks=problem.tasks, init=init)
    return result if filtered is None else folded(result, problem)


METHODS = (
    Method(
        "distill",
        "learns coefficients by matching the predictions of each task's own model (no labels)",
        "this project; knowledge distillation, Hinton et al. 2015, arXiv 1503.02531, into merge coefficients",
        DistillOptions,
        _run,
        needs=frozenset({"data", "gradients", "outputs"}),
        gives="coefficients",
        factors_with="regmean",
    ),
)
