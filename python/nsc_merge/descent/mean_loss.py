"""The mean over tasks of a loss of the merged model, as an objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nsc_merge.calibration.batches import Batch
from nsc_merge.calibration.forward_passes import Pass, Places, one_by_one, split
from nsc_merge.descent.checkpoint import Shapes
from nsc_merge.descent.coefficients import BoundedCoefficients
from nsc_merge.processes.group import current
from nsc_merge.utils.errors import FoundByAll

# Steps between two looks at the data held out.
HELD_OUT_EVERY = 10
# Runs one pass for the tasks that drew its batch, adds the gradients of the sum of their losses divided by the number
# of all tasks, unless gradients are off, and returns the losses, one per task of the pass and detached. Of a pass that
# is a process's part of one, both are weighted so that they add up over the processes to those of the whole.
Backward = Callable[[Pass], Tensor]


class Loss(NamedTuple):
    """What is descended on.

    Attributes:
        backward: runs a pass.
        meet: keeps of a pass what ``backward`` would, for later passes, and nothing else; None if that is nothing.
    """

    backward: Backward
    meet: Callable[[Pass], None] | None = None


def parts_of(passes: Sequence[Pass], *, alike: bool = True, places: Places | None = None) -> list[Pass]:
    """What this process runs of the passes of a loss, which runs the models of a pass's tasks, too; ``alike`` is False
    where it runs nothing for some tasks, ``places`` as :func:`nsc_merge.calibration.forward_passes.split` has it.
    """
    alike = alike and len({len(one.tasks[0]) for one in passes}) == 1
    return split(passes, current(), alike=alike, places=places)


@dataclass
class Losses:
    """The mean over tasks of a loss of the merged model, as :class:`nsc_merge.descent.optimisation.Optimisation`
    minimises it.

    Attributes:
        coefficients: of the attached model.
        loss: of one pass.
        present: ``[modules, K]``, where an adapter touches a module.
        warm_up: steps in which coefficients are shared per task, as in :class:`DescentOptions`.
        held_out: the loss on data that is not descended on, if there is any, measured every :data:`HELD_OUT_EVERY`
            steps; the coefficients with the lowest are kept.
        batch_tasks: tasks that draw the same batch share its forward; others never do.
        alike: whether the loss runs something for every task.
        places: of images and audio in the model's texts.
    """

    coefficients: BoundedCoefficients
    loss: Loss
    present: Tensor
    warm_up: float
    held_out: Callable[[], float] | None = None
    batch_tasks: bool | None = False
    alike: bool = True
    places: Places | None = None
    _steps: int = 0
    _met: Tensor | bool = False
    _best: tuple[float, Tensor] | None = None

    def accumulate(self, drawn: Sequence[Batch]) -> Tensor:
        """See :class:`nsc_merge.descent.objective.Objective`."""
        flat = self.coefficients.flat
        if self._steps % HELD_OUT_EVERY == 0:
            self.look()
        total = self.coefficients.add_up(self._run(drawn))
        if self._steps < self.warm_up:
            assert flat.grad is not None
            shared = self.present
            if math.isfinite(self.warm_up):
                # Coefficients of their own, later on: those that nothing has depended on stay where they are.
                self._met = self._met | (flat.grad != 0)
                shared = shared & self._met
            # Equal gradients keep the modules' coefficients equal under Adam, which takes each by itself.
            flat.grad.copy_(flat.grad.sum(0, keepdim=True) * shared)
        self._steps += 1
        return total

    @torch.no_grad()
    def measure(self, drawn: Sequence[Batch]) -> Tensor:
        """What :meth:`accumulate` returns, and no gradient."""
        total = self._run(drawn)
        current().add([total])
        return total

    def _run(self, drawn: Sequence[Batch]) -> Tensor:
        flat = self.coefficients.flat
        total = flat.new_zeros(len(drawn))
        for one in self._parts(drawn):
            self.coefficients.spread()
            total[list(one.tasks[0])] = self.loss.backward(one).to(total)
        return total

    def _parts(self, drawn: Sequence[Batch]) -> list[Pass]:
        passes = one_by_one(drawn, self.coefficients.flat.device)
        return parts_of(passes, alike=self.alike, places=self.places)

    @torch.no_grad()
    def look(self) -> None:
        """Measure on the data held out, and remember the coefficients if they are the best so far."""
        if self.held_out is None:
            return
        self.coefficients.spread()
        found = self.held_out()
        if not math.isfinite(found):
            raise FoundByAll(
                f"calibration: at step {self._steps}, the loss on the batches held out is {found}; expected a finite "
                "number: look for NaN or infinite values in them and in the model, or take another dtype"
            )
        if self._best is None or found < self._best[0]:
            self._best = (found, self.coefficients.flat.detach().clone())

    def keep_best(self) -> None:
        """Go back to the best coefficients, if any were measured."""
        self.look()
        if self._best is not None:
            with torch.no_grad():
                self.coefficients.flat.copy_(self._best[1])

    def remembered(self) -> dict[str, Tensor]:
        """See :class:`nsc_merge.descent.objective.Objective`; of the shapes of :meth:`shapes`."""
        if self._best is None:
            return {}
        least, best = self._best
        return {"best": best, "best_loss": torch.tensor(least, dtype=torch.float64, device="cpu")}

    @staticmethod
    def shapes(present: Tensor, *, held_out: bool) -> Shapes:
        """Of what is remembered after a step, of coefficients where ``present``; with data that is held out or not."""
        return {"best": (list(present.shape), None), "best_loss": ([], torch.float64)} if held_out else {}

    def replay(self, drawn: Sequence[Batch]) -> None:
        """See :class:`nsc_merge.descent.objective.Objective`."""
        self._steps += 1
        if self.loss.meet is not None:
            for one in self._parts(drawn):
                self.loss.meet(one)

    def recall(self, tensors: Mapping[str, Tensor], dead: Tensor) -> None:
        """See :class:`nsc_merge.descent.objective.Objective`."""
        self._met = ~dead
        if "best" in tensors:
            self._best = (float(tensors["best_loss"]), tensors["best"])


def backward_of(loss: Tensor) -> None:
    """``loss.backward()``, of what depends on a coefficient.

    Raises:
        FoundByAll: if nothing in it does, so that nothing could be learned.
    """
    if not loss.requires_grad:
        raise FoundByAll(
            "calibration: what is compared depends on no coefficient; expected something that comes after an adapted "
            "module, as option features or outputs may say, in a model that autograd follows, unlike the reversible "
            "layers of Reformer"
        )
    loss.backward()
