"""The optimisation of Algorithm 1: steps, schedule, history, and what it takes to go on after an interruption."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nsc_merge.calibration.batches import Batch, naming_tasks
from nsc_merge.descent.checkpoint import OF_THE_OBJECTIVE, State, random_states, restore_random_states
from nsc_merge.descent.objective import Objective
from nsc_merge.descent.options import SCHEDULES, DescentOptions
from nsc_merge.processes.group import current
from nsc_merge.processes.launch import undisturbed
from nsc_merge.utils.errors import FoundByAll
from nsc_merge.utils.progress import Progress

# Steps between two readings of what happened on the device. A step itself never waits for it.
READ_EVERY = 10
# Batches of every task, at most, that the objective is compared on at the end.
COMPARED = 4


class Optimisation:
    """Minimises an objective over its coefficients.

    Attributes:
        history: one entry per step done, each on the batches of its own step.
        dead: ``[modules, K]`` bool: coefficients with a gradient of exactly zero on all batches so far. Nothing
            measured there depends on them, and they keep their initial value, which weight decay would change. Later
            batches may: those that send tokens to another expert, or have images.

    Args:
        objective: to be minimised.
        tasks: names for the history.
        present: ``[modules, K]`` bool, where an adapter touches a module; the history's range of coefficients
            is taken there.
        streams: one endless iterator of batches per task.
        options: of the method.
        problem: what a saved state is tied to.
        resumed: the state to go on from.
        label: what the progress bar says.
        quantity: what the objective per task is called in the history, and
        shown: what their mean over as many steps as :meth:`comparison` has batches is called beside the progress bar.
        counted: the tasks that have an objective; all when None.
    """

    def __init__(
        self,
        objective: Objective,
        tasks: Sequence[str],
        present: Tensor,
        streams: Sequence[Iterator[Batch]],
        options: DescentOptions,
        problem: dict[str, Any],
        resumed: State | None = None,
        *,
        label: str = "NSC merging",
        quantity: str = "omega",
        shown: str = "ratio",
        counted: Collection[str] | None = None,
    ) -> None:
        self._label, self._quantity, self._shown = label, quantity, shown
        self._objective, self._tasks, self._streams = objective, list(tasks), list(streams)
        self._counted = self._tasks if counted is None else counted
        self._options, self._problem = options, problem
        self._lam = objective.coefficients.flat
        self._present = present.flatten().nonzero().flatten().to(self._lam.device)
        kind = torch.optim.AdamW if options.optimizer == "adamw" else torch.optim.Adam
        # A tensor, so that a captured graph would see the schedule; fused, because only that takes one.
        self._lr = torch.tensor(options.lr, dtype=torch.float32, device=self._lam.device)
        self._optimiser = kind([self._lam], lr=self._lr, weight_decay=options.weight_decay, fused=True)
        self._lam.grad = torch.zeros_like(self._lam)
        self._start = self._lam.detach().clone()
        self.dead = torch.zeros_like(self._lam, dtype=torch.bool)
        self.history: list[dict[str, Any]] = []
        self._records = self._lam.new_zeros(READ_EVERY, len(self._tasks) + 4)
        self._pending = 0
        self._read_at = time.perf_counter()
        self._begin = 0
        self._kept: tuple[int, dict[str, Tensor]] | None = None
        self._compared: list[list[Batch]] = []
        if resumed is not None:
            self._resume(resumed)

    def run(self, on_first: Callable[[], None]) -> None:
        """Do all steps that are left. ``on_first`` is called before the first update, when ``dead`` is known.

        Raises:
            RuntimeError: if something is not finite, if it depends on no coefficient, or if another process was lost.
            KeyboardInterrupt: passed on. Then and of lost processes, the state before the step was saved.
        """
        options, group, begin = self._options, current(), self._begin
        if self._stalled(begin):
            return
        try:
            with Progress(self._label, options.steps - begin, options.progress if group.is_main else False) as bar:
                for done in range(begin, options.steps):
                    if options.state_to is not None:
                        self._kept = (done, self._tensors())
                    self._step(done, on_first)
                    last = done + 1 == options.steps
                    due = options.state_to is not None and (done + 1) % options.state_every == 0
                    if done == begin or last or due or (done + 1) % READ_EVERY == 0:
                        self._read(bar)
                    stalled = self._stalled(done + 1)
                    if last or due or stalled:
                        self._save(done + 1, self._tensors())
                    if stalled:
                        break
        except (KeyboardInterrupt, RuntimeError) as error:
            lost = isinstance(error, RuntimeError)
            if isinstance(error, FoundByAll) or (lost and group.size == 1):
                raise
            if self._kept is not None:
                with undisturbed():
                    self._read(None)
                    self._save(*self._kept)
            if lost:
                raise RuntimeError(f"in process {group.rank} of {group.size}: {error}") from error
            raise

    def _step(self, step: int, on_first: Callable[[], None]) -> None:
        lam, options = self._lam, self._options
        assert lam.grad is not None
        lam.grad.zero_()
        drawn = self._draw()
        with naming_tasks(dict(zip(self._tasks, drawn, strict=False))):
            omega = self._objective.accumulate(drawn)
        still = lam.grad == 0
        self.dead = self.dead & still if step else still
        if step == 0:
            on_first()
        with torch.no_grad():
            live = lam.detach().flatten()[self._present]
            finite = lam.grad.isfinite().all().to(lam.dtype)
            row = [*omega.unbind(), live.min(), live.mean(), live.max(), finite]
            torch.stack(row, out=self._records[self._pending])
        self._pending += 1
        self._lr.fill_(options.lr * SCHEDULES[options.schedule](step / options.steps))
        self._optimiser.step()
        with torch.no_grad():
            lam.copy_(torch.where(self.dead, self._start, lam))

    def _draw(self) -> list[Batch]:
        """One batch per task. Those of the first steps are kept, until they repeat, to compare the objective on."""
        drawn = [next(stream) for stream in self._streams]
        seen = {tuple(map(id, known)) for known in self._compared}
        if len(seen) < COMPARED and tuple(map(id, drawn)) not in seen:
            self._compared.append(drawn)
        return drawn

    def comparison(self) -> dict[str, Any]:
        """The objective at the initial and at the present coefficients, both on the same batches: those of the first
        steps, each once, :data:`COMPARED` of every task at most.

        What the history holds cannot be compared so: each of its entries is on the batches of its own step.

        Returns:
            ``before`` and ``after``, the means over tasks; ``tasks``, task -> both; and ``batches``, how many of every
            task.

        Raises:
            RuntimeError: if what was found, or the objective there, is not finite.
        """
        found = self._lam.detach().clone()
        if not found.isfinite().all():
            raise _not_finite("the last step", "a coefficient is not finite")
        after = self._measured("the coefficients found")
        try:
            self._put(self._start)
            before = self._measured("the initial coefficients")
        finally:
            self._put(found)
        return {
            "before": _mean(before),
            "after": _mean(after),
            "tasks": {task: {"before": before[task], "after": after[task]} for task in before},
            "batches": len(self._compared),
        }

    def _depends(self) -> bool:
        """Whether the objective of some task is another on the first batches where the coefficients are others. Of zero
        gradients that may be: total variation is flat between what two tasks predict.
        """
        here = self._lam.detach().clone()
        found = self._objective.measure(self._compared[0])
        try:
            self._put(torch.where(here.abs() > 0.5, 0.0, 1.0).to(here))
            elsewhere = self._objective.measure(self._compared[0])
        finally:
            self._put(here)
        return not torch.allclose(found, elsewhere, rtol=0, atol=0, equal_nan=True)

    @torch.no_grad()
    def _put(self, values: Tensor) -> None:
        self._lam.copy_(values)

    def _measured(self, where: str) -> dict[str, float]:
        """The objective of every task that has one, at the coefficients as they are now."""
        total = torch.stack([self._objective.measure(drawn) for drawn in self._compared]).mean(0)
        return self._known(total.tolist(), where)

    def _known(self, values: Sequence[float], where: str) -> dict[str, float]:
        """Task -> objective, of the tasks that have one; others may be not a number."""
        known = {task: value for task, value in zip(self._tasks, values, strict=True) if task in self._counted}
        for task, value in known.items():
            if not math.isfinite(value):
                raise _not_finite(where, f"the objective of task {task!r} is {value}")
        return known

    def _read(self, bar: Progress | None) -> None:
        """Turn what the device recorded since the last reading into history."""
        rows = self._records[: self._pending].tolist()
        now = time.perf_counter()
        seconds = (now - self._read_at) / max(len(rows), 1)
        entries = []
        for step, (*omega, least, mean, most, finite) in enumerate(rows, len(self.history)):
            known = self._known(omega, f"step {step}")
            if not finite:
                raise _not_finite(f"step {step}", "the gradient is not finite")
            objective = _mean(known)
            still = step == 0 and bool(objective) and bool(self.dead.flatten()[self._present].all())
            depends = still and self._depends()
            if depends and self._quantity == "omega":
                raise FoundByAll(
                    "model: the objective depends on the coefficients, and its gradient is zero for all of them; "
                    "expected a model that autograd follows, unlike the reversible layers of Reformer, or a method "
                    "without gradients"
                )
            if still and not depends:
                raise FoundByAll(
                    "calibration: at step 0, the objective depends on no coefficient; expected something measured that "
                    "comes after an adapted module, and inputs that are not all zero there; of a block that runs "
                    "several times, as ALBERT's, nsc measures the first run: score_modules behind an adapted one in "
                    "it, or method 'match' or 'distill'"
                )
            entries.append(
                {
                    "step": step,
                    "objective": objective,
                    self._quantity: known,
                    "lambda_min": least,
                    "lambda_mean": mean,
                    "lambda_max": most,
                    "seconds": seconds,
                }
            )
        self.history += entries
        self._read_at, self._pending = now, 0
        if bar is None:
            return
        # Steps differ in their batches, by more than the coefficients change from one to the next.
        last = self.history[-len(self._compared) :]
        bar.update(
            count=len(entries),
            **{self._shown: f"{sum(entry['objective'] for entry in last) / len(last):.4f}"},
            lam=f"{entries[-1]['lambda_min']:.2f}..{entries[-1]['lambda_max']:.2f}",
        )

    def _stalled(self, done: int) -> bool:
        """Whether the mean objective of the last readings is no longer below that of the ones before."""
        least = self._options.early_stop
        if least is None or done % READ_EVERY or done < 2 * READ_EVERY:
            return False
        objectives = [entry["objective"] for entry in self.history[done - 2 * READ_EVERY : done]]
        before, after = sum(objectives[:READ_EVERY]), sum(objectives[READ_EVERY:])
        return before - after < least * before

    def _tensors(self) -> dict[str, Tensor]:
        """A copy of everything that the next step depends on."""
        moments = self._optimiser.state[self._lam]
        tensors = {
            "lam": self._lam.detach(),
            "start": self._start,
            "dead": self.dead,
            **{f"optimizer.{name}": value for name, value in moments.items()},
            **{f"{OF_THE_OBJECTIVE}{name}": value for name, value in self._objective.remembered().items()},
        }
        copies = {name: value.detach().clone() for name, value in tensors.items()}
        return {**copies, **random_states(self._lam.device)}

    def _save(self, step: int, tensors: dict[str, Tensor]) -> None:
        if self._options.state_to is None or not current().is_main:
            return
        batched = bool(self._objective.batch_tasks)
        on_host = {name: value.cpu() for name, value in tensors.items()}
        State(step, on_host, self.history[:step], self._problem, batched).save(self._options.state_to)

    def _resume(self, state: State) -> None:
        if state.tensors["lam"].dtype is not self._lam.dtype:
            raise ValueError(
                f"resume_from: the state is of coefficients in {state.tensors['lam'].dtype}, and this model's are in "
                f"{self._lam.dtype}; expected the model in the dtype that the run began with"
            )
        # Drawing anew brings the iterables to where they were, whatever they are; the generators come last,
        # since iterables may draw from them.
        for _ in range(state.step):
            self._objective.replay(self._draw())
        device = self._lam.device
        tensors = {name: value.to(device) for name, value in state.tensors.items()}
        with torch.no_grad():
            self._lam.copy_(tensors["lam"])
        self._start, self.dead = tensors["start"], tensors["dead"]
        # The count of steps lies where the fused optimizer keeps it: beside the moments.
        self._optimiser.state[self._lam] = _named(tensors, "optimizer.")
        self._objective.recall(_named(tensors, OF_THE_OBJECTIVE), self.dead)
        self.history = list(state.history)
        self._begin = state.step
        if state.step:
            self._objective.batch_tasks = state.batch_tasks
        restore_random_states(state.tensors, device)


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those with a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / max(len(values), 1)


def _not_finite(where: str, what: str) -> FoundByAll:
    return FoundByAll(
        f"calibration: at {where}, {what}; expected finite numbers: look for NaN or infinite values in the batches and "
        "the model, take dtype float32 or bfloat16 in place of float16, or a smaller lr"
    )
