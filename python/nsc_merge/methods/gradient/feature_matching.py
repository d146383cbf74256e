"""Feature matching: coefficients for which the merged model's features are those of each task's own model.

Free of labels and of the tasks' outputs, like NSC: task k's batches run through the merged model and, once, through
the base with adapter k alone; minimised is ``sum_k ||h_merged(x) - h_k(x)||^2``. Not from the NSC paper; offered
as an alternative whose gradient is about the tasks; docs/results.md has the figures of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nsc_kernels.devices import with_float64
from nsc_merge.calibration.batches import Batch, held_out, naming_tasks, restartable, streams
from nsc_merge.calibration.forward_passes import Pass, of_the_whole, one_by_one
from nsc_merge.descent.coefficients import BoundedCoefficients
from nsc_merge.descent.mean_loss import Loss, backward_of, parts_of
from nsc_merge.descent.options import SharedDescentOptions
from nsc_merge.methods.gradient.feature_watcher import Seen, Watcher
from nsc_merge.methods.gradient.learned_coefficients import attached, descend, presence
from nsc_merge.methods.gradient.task_models import Kept, OwnModels
from nsc_merge.methods.method import Method, Problem
from nsc_merge.methods.task_outputs import POSITIONS
from nsc_merge.models.bases.stored_weights import input_device
from nsc_merge.models.families import Family, check_family
from nsc_merge.models.traits import places_of
from nsc_merge.processes.group import current
from nsc_merge.results.result import MergeResult
from nsc_merge.utils.errors import FoundByAll
from nsc_merge.utils.option_checks import check_choice, check_count, check_names, check_number

NORMALISATIONS = ("none", "scale", "task")
RATIO_TARGETS = ("zero", "own")
SCALES = tuple(round(0.05 * step, 2) for step in range(1, 21))


@dataclass(frozen=True)
class MatchOptions(SharedDescentOptions):
    """Options of ``method="match"``.

    Attributes:
        optimizer: as all that follow up to ``resume_from``, in :class:`nsc_merge.descent.options.SharedDescentOptions`.
        lr: see there.
        weight_decay: see there.
        steps: see there.
        schedule: see there.
        early_stop: see there.
        init: see there, or ``"match"``: the one coefficient for everything, of 0.05, 0.1, ... 1, whose features match
            best on the first batch of every task.
        share: see there.
        warm_up: see there.
        clamp: see there.
        seed: see there.
        progress: see there.
        state_to: see there.
        state_every: see there.
        state_of: see there.
        resume_from: see there.
        features: ``"final"``, the last hidden state, after the final norm; or paths of modules whose outputs are
            matched, with equal weight.
        positions: ``"all"``, every real token; or ``"last"``, the last one, from which a decoder answers, where an
            output has as many positions as the inputs have tokens. None takes ``"last"`` for models of tokens whose
            final features are matched, unless they label every token (``ForTokenClassification``,
            ``ForQuestionAnswering``), and ``"all"`` otherwise; docs/results.md has both.
        normalise: divide a task's squared distance by nothing (``"none"``), by the mean square of its own features
            (``"scale"``), or by their distance from the base model's (``"task"``, which protects tasks that changed
            little).
        pull: weight of the mean squared distance of the coefficients from where they started.
        ratio_weight: weight of the null-space ratios (Eq. 5 of the NSC paper), measured in the same forward.
        ratio_target: what the ratios are drawn to: ``"zero"``, as NSC does, or each adapter's ``"own"`` ratio in its
            own model, by the absolute distance.
        family: what is known of the model, a :class:`nsc_merge.Family` or some of its fields by name; the rest, and all
            when None, is found from the model.
        hold_out: how many batches of every task, the first that its iterable gives, are never descended on, if it
            gives the same in the same order each time; the coefficients that match best on them, measured every ten
            steps, are the result.
    """

    lr: float = 1e-2
    init: float | str | Mapping[str, float] = 0.4  # type: ignore[assignment]
    features: str | Sequence[str] = "final"
    positions: str | None = None
    normalise: str = "none"
    pull: float = 0.0
    ratio_weight: float = 0.0
    ratio_target: str = "zero"
    hold_out: int = 0
    family: Family | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.features, str):
            check_choice("features", self.features, ("final",))
        else:
            check_names("features", self.features)
            if not self.features:
                raise ValueError("features: expected 'final' or paths of modules, found none")
        if self.positions is not None:
            check_choice("positions", self.positions, POSITIONS)
        check_choice("normalise", self.normalise, NORMALISATIONS)
        check_number("pull", self.pull, 0)
        check_number("ratio_weight", self.ratio_weight, 0)
        check_choice("ratio_target", self.ratio_target, RATIO_TARGETS)
        check_count("hold_out", self.hold_out, 0)
        check_family(self.family)

    def check_init(self) -> None:
        if isinstance(self.init, str):
            check_choice("init", self.init, ("match",))
        else:
            super().check_init()


def distance(
    found: Sequence[Tensor], wanted: Sequence[Tensor], one: Pass, masks: Sequence[Tensor | None]
) -> Tensor:
    """Mean over places of the mean squared difference per feature and real position; on a process's part of a pass,
    what adds up to that over the processes.

    Args:
        found: per place, the features of the pass's inputs.
        wanted: what they should be.
        one: the pass.
        masks: per place, ``[rows, positions]`` bool, where positions are real, of the whole pass.
    """
    values = []
    for ours, theirs, mask in zip(found, wanted, masks, strict=True):
        square = (ours.float() - theirs.float()).square().mean(-1)
        real = None if mask is None else one.mine(mask)
        if mask is not None and real is not None and real.shape == square.shape:
            values.append((square * real).sum() / mask.sum().clamp(min=1))
        else:
            values.append(square.mean() * one.share)
    return torch.stack(values).mean()


@dataclass(frozen=True)
class Target:
    """What a task's own model shows on a batch.

    Attributes:
        seen: in it.
        size: what distances from it are divided by.
    """

    seen: Seen
    size: Tensor


class Targets:
    """What each task's own model shows on a batch, and how far the base is from it.

    Args:
        watcher: sees the models.
        own: turns the attached model into each of them.
        normalise: as in :class:`MatchOptions`.
    """

    def __init__(self, watcher: Watcher, own: OwnModels, normalise: str) -> None:
        self._watcher, self._own, self._normalise = watcher, own, normalise
        self._kept: Kept[Target] = Kept(lambda target: _size(target.seen))

    def distance(self, target: Target, one: Pass, features: Sequence[Tensor]) -> Tensor:
        """From ``features`` to a target on a pass's batch, normalised; as :func:`distance`."""
        masks = self._watcher.masks(one.whole, features)
        return distance(features, target.seen.features, one, masks) / target.size

    def of(self, one: Pass) -> dict[int | None, Target]:
        """The targets of a pass's tasks by number. Running their models, which happens once, changes the coefficients
        that the modules have.
        """
        return self._kept(one.sources[0], one.tasks[0], lambda number: self._target(number, one))

    def _target(self, number: int | None, one: Pass) -> Target:
        with self._own.of(number):
            seen = self._watcher.see(one)
        if self._normalise == "none":
            return Target(seen, torch.ones((), dtype=torch.float32, device="cpu"))
        base = [feature * 0 for feature in seen.features]
        if self._normalise == "task":
            with self._own.of(None):
                base = self._watcher.see(one).features
        size = distance(seen.features, base, one, self._watcher.masks(one.whole, seen.features))
        return Target(seen, of_the_whole(one, size).clamp(min=1e-12))


def _size(seen: Seen) -> int:
    return sum(feature.untyped_storage().nbytes() for feature in seen.features)


def best_scale(problem: Problem, options: MatchOptions) -> float:
    """The one coefficient for everything, of :data:`SCALES`, whose features match best on a batch of every task."""
    drawn = [next(stream) for stream in streams(problem.calibration, problem.tasks).values()]
    watcher = Watcher(problem, options.features, options.positions, given=options.family)
    present = presence(problem)
    of_tasks = naming_tasks(dict(zip(problem.tasks, drawn, strict=True)))
    with attached(problem, replace(options, init=1.0)) as coefficients, torch.no_grad(), of_tasks:
        targets = Targets(watcher, OwnModels(problem, coefficients, present), options.normalise)
        present = present.to(coefficients.flat)
        sums = torch.zeros(len(SCALES), dtype=torch.float64, device=with_float64(coefficients.flat.device))
        places = places_of(problem.model)
        for one in parts_of(one_by_one(drawn, coefficients.flat.device), places=places):
            wanted = targets.of(one)
            for place, scale in enumerate(SCALES):
                coefficients.give(scale * present)
                found = watcher.see(one).features
                for number in one.tasks[0]:
                    sums[place] += targets.distance(wanted[number], one, found).to(sums.device)
        current().add([sums])
    totals = dict(zip(SCALES, sums.tolist(), strict=True))
    for scale, total in totals.items():
        if not math.isfinite(total):
            raise FoundByAll(
                f"calibration: init='match': with coefficients {scale:g} the features are {total} apart on the first "
                "batches, expected a finite number; look for NaN or infinite values, or take another dtype"
            )
    return min(totals, key=lambda scale: totals[scale])


def _run(problem: Problem, given: Mapping[str, Any]) -> MergeResult:
    options = MatchOptions(**given)
    watcher = Watcher(
        problem, options.features, options.positions, ratios=options.ratio_weight > 0, given=options.family
    )
    # What the start is chosen by must not be lost to the steps.
    batches = restartable(problem.calibration, problem.tasks)
    problem = replace(problem, calibration=batches)
    if isinstance(options.init, str):
        options = replace(options, init=best_scale(problem, options))
    count, present = len(problem.tasks), presence(problem)
    device = input_device(problem.model)
    held: list[list[Batch]] = []
    if options.hold_out:
        first, rest = held_out(batches, problem.tasks, options.hold_out)
        held = [[first[task][number] for task in problem.tasks] for number in range(options.hold_out)]
        problem = replace(problem, calibration=rest)

    def losses(coefficients: BoundedCoefficients) -> Loss:
        targets = Targets(watcher, OwnModels(problem, coefficients, present), options.normalise)
        start = coefficients.flat.detach().clone()

        def backward(one: Pass) -> Tensor:
            numbers = one.tasks[0]
            # The single models run first: the merged one's graph must not see their coefficients.
            wanted = targets.of(one)
            coefficients.spread()
            found = watcher.see(one)
            values = []
            for number in numbers:
                value = targets.distance(wanted[number], one, found.features)
                if found.ratios is not None:
                    ratio = found.ratios[number]
                    if options.ratio_target == "own":
                        own = wanted[number].seen.ratios
                        assert own is not None, "ratios were not measured"
                        apart = ratio - own[number]
                        # Of the sum over all processes.
                        ratio = apart * of_the_whole(one, apart).sign()
                    value = value + options.ratio_weight * ratio
                if options.pull:
                    value = value + options.pull * one.share * (coefficients.flat - start).square().mean()
                values.append(value)
            total = torch.stack(values)
            if torch.is_grad_enabled():
                backward_of(total.sum() / count)
            return total.detach()

        return Loss(backward)

    def unseen(coefficients: BoundedCoefficients) -> Callable[[], float]:
        targets = Targets(watcher, OwnModels(problem, coefficients, present), options.normalise)

        def measure() -> float:
            total = torch.zeros((), dtype=torch.float64, device=with_float64(coefficients.flat.device))
            passes = [one for batches in held for one in one_by_one(batches, device)]
            for one in parts_of(passes, places=places_of(problem.model)):
                # Of their own: this may be called within a step on others.
                with naming_tasks({problem.tasks[number]: one.sources[0] for number in one.tasks[0]}):
                    wanted = targets.of(one)
                    coefficients.spread()
                    found = watcher.see(one).features
                for number in one.tasks[0]:
                    total += targets.distance(wanted[number], one, found).to(total.device)
            current().add([total])
            return float(total)

        return measure

    return descend("match", problem, options, losses, label="feature matching", held_out=unseen if held else None)


METHODS = (
    Method(
        "match",
        "learns coefficients by matching each task's own late features (no labels)",
        "this project; the NSC setting of arXiv 2603.26317 with another objective",
        MatchOptions,
        _run,
        needs=frozenset({"data", "gradients"}),
        gives="coefficients",
    ),
)
