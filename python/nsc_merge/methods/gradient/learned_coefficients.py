"""What methods share that learn merge coefficients by descending some loss of the merged model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from nsc_merge.calibration.forward_passes import Batch, Pass, one_by_one, streams
from nsc_merge.descent.null_space_objective import Coefficients
from nsc_merge.descent.optimisation import Optimisation, Settings, by_path, tasks_where
from nsc_merge.descent.options import SharedDescentOptions
from nsc_merge.methods.gradient_free import Problem
from nsc_merge.models import attachment
from nsc_merge.models.attachment import MeasuredLoRALinear, adapted_linears, attach
from nsc_merge.models.forward_contexts import evaluating
from nsc_merge.results.result import MergeResult
from nsc_merge.utils.option_checks import check_choice

LIKELIHOODS = ("categorical", "gaussian")
Outputs = Mapping[str, Callable[[nn.Module, Batch], Tensor]]


class BoundedCoefficients(Coefficients):
    """Coefficients that the model sees within bounds; outside of them no gradient reaches them."""

    def __init__(self, merged: Mapping[str, MeasuredLoRALinear], clamp: Sequence[float] | None) -> None:
        super().__init__(merged)
        self._clamp = clamp

    @property
    def seen(self) -> Tensor:
        """``[modules, K]``, as the model sees them."""
        return self.flat if self._clamp is None else self.flat.clamp(*self._clamp)

    def spread(self) -> None:
        self.give(self.seen)

    def has(self, module: MeasuredLoRALinear) -> bool:
        """Whether they are those of ``module``, among others."""
        return module in self._modules

    def give(self, values: Tensor) -> None:
        """Give every module its row of ``values [modules, K]``."""
        for module, row in zip(self._modules, values.unbind(0), strict=True):
            module.lam = row.to(module.bank.device)


# Steps between two looks at the data held out.
HELD_OUT_EVERY = 10

# Runs one pass for the tasks that drew its batch, adds the gradients of the sum of their losses divided by the number
# of all tasks, and returns the losses, one per task of the pass and detached.
Backward = Callable[[Pass], Tensor]


@dataclass
class Losses:
    """The mean over tasks of a loss of the merged model, as :class:`nsc_merge.descent.optimisation.Optimisation`
    minimises it.

    Attributes:
        coefficients: of the attached model.
        backward: of one pass.
        present: ``[modules, K]``, where an adapter touches a module.
        warm_up: steps in which coefficients are shared per task, as in :class:`DescentOptions`.
        held_out: the loss on data that is not descended on, if there is any, measured every :data:`HELD_OUT_EVERY`
            steps; the coefficients with the lowest are kept.
        batch_tasks: tasks that draw the same batch share its forward; others never do.
    """

    coefficients: BoundedCoefficients
    backward: Backward
    present: Tensor
    warm_up: float
    held_out: Callable[[], float] | None = None
    batch_tasks: bool | None = False
    _steps: int = 0
    _best: tuple[float, Tensor] | None = None

    def accumulate(self, drawn: Sequence[Batch]) -> Tensor:
        """See :class:`nsc_merge.descent.optimisation.Objective`."""
        flat = self.coefficients.flat
        if self._steps % HELD_OUT_EVERY == 0:
            self.look()
        total = flat.new_zeros(flat.shape[1])
        for one in one_by_one(drawn, flat.device):
            self.coefficients.spread()
            total[list(one.tasks[0])] = self.backward(one).to(total)
        if self._steps < self.warm_up:
            assert flat.grad is not None
            if self._steps == 0 and math.isfinite(self.warm_up):
                # Coefficients of their own, later on: those that nothing depends on stay where they are.
                self.present = self.present & (flat.grad != 0)
            # Equal gradients keep the modules' coefficients equal under Adam, which takes each by itself.
            flat.grad.copy_(flat.grad.sum(0, keepdim=True) * self.present)
        self._steps += 1
        return total

    @torch.no_grad()
    def look(self) -> None:
        """Measure on the data held out, and remember the coefficients if they are the best so far."""
        if self.held_out is None:
            return
        self.coefficients.spread()
        found = self.held_out()
        if self._best is None or found < self._best[0]:
            self._best = (found, self.coefficients.flat.detach().clone())

    def keep_best(self) -> None:
        """Go back to the best coefficients, if any were measured."""
        self.look()
        if self._best is not None:
            with torch.no_grad():
                self.coefficients.flat.copy_(self._best[1])


@contextmanager
def attached(problem: Problem, options: SharedDescentOptions) -> Iterator[BoundedCoefficients]:
    """The coefficients of the attached model, in evaluation mode, for the duration of a ``with`` block.

    Raises:
        ValueError: if ``init`` does not have one value for each task.
    """
    options.check_tasks(problem.tasks)
    with evaluating(problem.model), attach(problem.model, problem.adapters, options.init) as merged:
        yield BoundedCoefficients(merged, options.clamp)


def presence(problem: Problem) -> Tensor:
    """``[modules, K]`` bool: where a task's adapter touches a module that has coefficients."""
    return attachment.presence(adapted_linears(problem.model, problem.adapters), problem.adapters)


def descend(
    method: str,
    problem: Problem,
    options: SharedDescentOptions,
    losses: Callable[[BoundedCoefficients], Backward],
    *,
    label: str,
    held_out: Callable[[BoundedCoefficients], Callable[[], float]] | None = None,
) -> MergeResult:
    """Learn coefficients.

    Args:
        method: for the result.
        problem: with calibration batches for every task.
        options: of the descent.
        losses: given the coefficients of the attached model, makes what runs a pass.
        label: of the progress bar.
        held_out: given the same, makes what measures data that is held out, at the coefficients that the modules have.
    """
    tasks = problem.tasks
    drawn = list(streams(problem.calibration, tasks).values())
    present = presence(problem)
    paths = list(adapted_linears(problem.model, problem.adapters))
    device = next(problem.model.parameters()).device
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        attached(problem, options) as coefficients,
    ):
        torch.manual_seed(options.seed)
        objective = Losses(
            coefficients,
            losses(coefficients),
            present.to(coefficients.flat.device),
            math.inf if options.share == "task" else options.warm_up,
            None if held_out is None else held_out(coefficients),
        )
        names = {one.name for one in fields(options)}
        known = {one.name: getattr(options, one.name) for one in fields(Settings) if one.name in names}
        settings = Settings(**{"state_to": None, "state_every": 1, **known})
        loop = Optimisation(
            objective, tasks, present, drawn, settings, {}, label=label, quantity="loss", shown="loss"
        )
        loop.run(lambda: None)
        objective.keep_best()
        lam = coefficients.seen.detach().cpu()
        dead = loop.dead.cpu() & present
    return MergeResult(
        method=method,
        coefficients=by_path(lam, paths, tasks),
        history=loop.history,
        adapters=problem.adapters,
        options=plain_options(options),
        dead=tasks_where(dead, paths, tasks),
        model=problem.model,
    )


def plain_options(options: Any) -> dict[str, Any]:
    """Options as a recipe can hold them: functions are named by the tasks that they serve."""
    return {
        one.name: sorted(value) if _holds_functions(value) else value
        for one in fields(options)
        for value in [getattr(options, one.name)]
    }


def _holds_functions(value: Any) -> bool:
    return isinstance(value, Mapping) and any(callable(item) for item in value.values())


def check_outputs(outputs: Outputs | None, tasks: Sequence[str]) -> None:
    """Refuse functions for tasks that there are not.

    Raises:
        ValueError, TypeError: naming the task.
    """
    for task, function in (outputs or {}).items():
        if task not in tasks:
            raise ValueError(f"outputs: expected functions for some of {list(tasks)}, found one for {task!r}")
        if not callable(function):
            raise TypeError(f"outputs[{task!r}]: expected a function of model and batch, found {function!r}")


def output_of(outputs: Outputs | None, task: str, model: nn.Module, batch: Batch) -> Tensor:
    """A task's output: of its own function, or the model's logits.

    Raises:
        ValueError: if there is neither.
    """
    if outputs is not None and task in outputs:
        return outputs[task](model, batch)
    found = getattr(model(**batch), "logits", None)
    if found is None:
        raise ValueError(
            f"outputs: {type(model).__name__} has no logits; expected a function of model and batch for {task!r}"
        )
    return found


def check_likelihood(likelihood: str | Mapping[str, str]) -> None:
    """Refuse what is none of :data:`LIKELIHOODS`, nor a mapping to them.

    Raises:
        ValueError: naming what was found.
    """
    for value in likelihood.values() if isinstance(likelihood, Mapping) else [likelihood]:
        check_choice("likelihood", value, LIKELIHOODS)


def likelihoods_of(likelihood: str | Mapping[str, str], tasks: Sequence[str]) -> list[str]:
    """What each task's output parametrises.

    Raises:
        ValueError: if a mapping has not exactly these tasks.
    """
    if isinstance(likelihood, str):
        return [likelihood] * len(tasks)
    if set(likelihood) != set(tasks):
        raise ValueError(f"likelihood: expected one for each of {list(tasks)}, found {sorted(likelihood)}")
    return [likelihood[task] for task in tasks]


def last_token(output: Tensor, mask: Tensor | None) -> Tensor:
    """Of ``output [N, T, ...]``, what is at the last real token of every row, ``[N, ...]``."""
    if mask is None:
        # A copy, so that whoever keeps it does not keep all positions.
        return output[:, -1].clone()
    positions = torch.arange(output.shape[1], device=output.device)
    last = torch.where(mask.bool(), positions, -1).amax(1)
    return output[torch.arange(len(output), device=output.device), last]
