"""What methods share that learn merge coefficients by descending some loss of the merged model."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nsc_merge.calibration.batches import streams
from nsc_merge.descent.checkpoint import State, problem_of
from nsc_merge.descent.coefficients import BoundedCoefficients, by_path, tasks_where
from nsc_merge.descent.mean_loss import Loss, Losses
from nsc_merge.descent.optimisation import Optimisation
from nsc_merge.descent.options import BESIDE_THE_PROBLEM, OF_THE_STATE, SharedDescentOptions
from nsc_merge.methods.method import Problem
from nsc_merge.methods.task_outputs import plain_options
from nsc_merge.models import attachment
from nsc_merge.models.attachment import adapted_linears, attach
from nsc_merge.models.bases.quantised import check_gradients
from nsc_merge.models.bases.stored_weights import input_device
from nsc_merge.models.forward_contexts import evaluating, recomputed, without_key_value_cache
from nsc_merge.models.traits import places_of
from nsc_merge.results.result import MergeResult

# What the objective of a task is called in the history.
QUANTITY = "loss"


@contextmanager
def attached(
    problem: Problem, options: SharedDescentOptions, init: float | Mapping[str, float] | None = None
) -> Iterator[BoundedCoefficients]:
    """The coefficients of the attached model, in evaluation mode, for the duration of a ``with`` block.

    Args:
        problem: the model and the adapters.
        options: of the descent.
        init: initial coefficients; those of the options when None.

    Raises:
        ValueError: if the options' ``init`` does not have one value for each task.
    """
    if init is None:
        options.check_tasks(problem.tasks)
        init = options.init
    with (
        evaluating(problem.model),
        attach(problem.model, problem.adapters, init) as merged,
        recomputed(problem.model),
        without_key_value_cache(problem.model),
    ):
        check_gradients(problem.model)
        yield BoundedCoefficients(merged, options.clamp)


def presence(problem: Problem) -> Tensor:
    """``[modules, K]`` bool: where a task's adapter touches a module that has coefficients."""
    return attachment.presence(adapted_linears(problem.model, problem.adapters), problem.adapters)


def descend(
    method: str,
    problem: Problem,
    options: SharedDescentOptions,
    losses: Callable[[BoundedCoefficients], Loss],
    *,
    label: str,
    counted: Collection[str] | None = None,
    held_out: Callable[[BoundedCoefficients], Callable[[], float]] | None = None,
    tasks: Sequence[str] | None = None,
    init: Mapping[str, float] | None = None,
) -> MergeResult:
    """Learn coefficients.

    Args:
        method: for the result.
        problem: with calibration batches for every task.
        options: of the descent.
        losses: given the coefficients of the attached model, makes what is descended on.
        label: of the progress bar.
        counted: the tasks that have a loss; all when None. That of the others is not a number.
        held_out: given the same, makes what measures data that is held out, at the coefficients that the modules have.
        tasks: those that batches are drawn of, which come first among the adapters; all of these when None.
        init: initial coefficients of all adapters; those of the options when None.
    """
    tasks = problem.tasks if tasks is None else tasks
    counted = [task for task in tasks if counted is None or task in counted]
    drawn = list(streams(problem.calibration, tasks).values())
    present = presence(problem)
    paths = list(adapted_linears(problem.model, problem.adapters))
    device = input_device(problem.model)
    kept, resumed = {}, None
    if options.state_to is not None or options.resume_from is not None:
        kept = _kept_of(method, problem, options, paths, tasks, counted)
    if options.resume_from is not None:
        resumed = State.load(options.resume_from, kept, Losses.shapes(present, held_out=held_out is not None))
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        attached(problem, options, init) as coefficients,
    ):
        torch.manual_seed(options.seed)
        objective = Losses(
            coefficients,
            losses(coefficients),
            present.to(coefficients.flat.device),
            math.inf if options.share == "task" else options.warm_up,
            None if held_out is None else held_out(coefficients),
            alike=len(counted) == len(tasks),
            places=places_of(problem.model),
        )
        loop = Optimisation(
            objective,
            tasks,
            present,
            drawn,
            options,
            kept,
            resumed,
            label=label,
            quantity=QUANTITY,
            shown=QUANTITY,
            counted=counted,
        )
        loop.run(lambda: None)
        objective.keep_best()
        moved = loop.comparison()
        lam = coefficients.seen.detach().cpu()
        dead = loop.dead.cpu() & present
    return MergeResult(
        method=method,
        coefficients=by_path(lam, paths, problem.tasks),
        history=loop.history,
        adapters=problem.adapters,
        options={name: value for name, value in plain_options(options).items() if name not in OF_THE_STATE},
        dead=tasks_where(dead, paths, problem.tasks),
        model=problem.model,
        objective=moved,
    )


def _kept_of(
    method: str,
    problem: Problem,
    options: SharedDescentOptions,
    paths: list[str],
    tasks: Sequence[str],
    counted: Sequence[str],
) -> dict[str, Any]:
    """What a saved state of a method belongs to. Functions of tasks' outputs are taken on trust, and so is what
    follows from batches alone.
    """
    chosen = {name: value for name, value in plain_options(options).items() if name not in BESIDE_THE_PROBLEM}
    of_tasks = {task: problem.adapters[task] for task in tasks}
    return {
        "method": method,
        **problem_of(of_tasks, chosen, paths, [], options.state_of or {}),
        "tasks": problem.tasks,
        "quantity": QUANTITY,
        "counted": list(counted),
    }
