"""Options of every method that learns coefficients."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nsc_merge.utils.option_checks import check_bounds, check_choice, check_count, check_number, check_plain

SHARES = ("module", "task")
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
}
# Options that say how a run is kept, and how it is watched, and nothing about its outcome.
OF_THE_STATE = ("state_to", "state_every", "state_of", "resume_from")
BESIDE_THE_PROBLEM = ("progress", *OF_THE_STATE)
# Coefficients are float32 at least.
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class DescentOptions:
    """Options of every method that learns coefficients by gradient descent.

    Attributes:
        optimizer: ``"adamw"`` or ``"adam"``.
        lr: learning rate. Adam moves a coefficient by at most about ``steps * lr``.
        weight_decay: of the optimizer.
        steps: optimisation steps; each takes one batch of every task.
        schedule: of the learning rate over the steps: ``"constant"``, or falling to 0 by ``"cosine"`` or ``"linear"``.
        early_stop: stop once the mean objective of ten steps, on their own batches, is less than this share below that
            of the ten before (0.001 is a tenth of a percent); None never stops early.
        init: initial coefficient, one for all tasks or one per task.
        seed: of torch's global generator while batches are drawn; restored afterwards.
        progress: True draws a bar and False shows nothing; None draws it on a terminal and prints lines elsewhere.
        state_to: file that the state of the optimisation is saved to, every ``state_every`` steps, at the end
            and on Ctrl-C.
        state_every: steps between two saved states.
        state_of: what a saved state belongs to besides the adapters and options, such as hashes of the base model and
            of the calibration data: names to values that JSON can hold. Resuming with others, or without, is refused.
        resume_from: file written through ``state_to``. The run goes on from there as if it had never stopped,
            to the bit, if the iterables of ``calibration`` give the same batches again.
    """

    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.01
    steps: int = 100
    schedule: str = "constant"
    early_stop: float | None = None
    init: float | Mapping[str, float] = 0.4
    seed: int = 0
    progress: bool | None = None
    state_to: str | os.PathLike[str] | None = None
    state_every: int = 50
    state_of: Mapping[str, Any] | None = None
    resume_from: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        check_choice("optimizer", self.optimizer, ("adamw", "adam"))
        check_number("lr", self.lr, 0, _LARGEST)
        check_number("weight_decay", self.weight_decay, 0, _LARGEST)
        check_count("steps", self.steps)
        check_choice("schedule", self.schedule, tuple(SCHEDULES))
        if self.early_stop is not None:
            check_number("early_stop", self.early_stop, 0)
        self.check_init()
        check_count("seed", self.seed, 0)
        check_choice("progress", self.progress, (True, False, None))
        check_count("state_every", self.state_every)
        if self.state_of is not None:
            check_plain("state_of", self.state_of)

    def check_init(self) -> None:
        """Refuse initial coefficients that are no finite numbers."""
        for value in self.init.values() if isinstance(self.init, Mapping) else [self.init]:
            check_number("init", value, -_LARGEST, _LARGEST)

    def check_tasks(self, tasks: Sequence[str]) -> None:
        """Refuse initial coefficients of other tasks than there are.

        Raises:
            ValueError: naming both.
        """
        if isinstance(self.init, Mapping) and set(self.init) != set(tasks):
            raise ValueError(f"init: expected one value for each of {list(tasks)}, found {sorted(self.init)}")


@dataclass(frozen=True)
class SharedDescentOptions(DescentOptions):
    """Options of the methods whose coefficients may be shared between modules, and bounded.

    Attributes:
        optimizer: as all that follow up to ``resume_from``, in :class:`DescentOptions`.
        lr: see there.
        weight_decay: see there.
        steps: see there.
        schedule: see there.
        early_stop: see there.
        init: see there.
        seed: see there.
        progress: see there.
        state_to: see there.
        state_every: see there.
        state_of: see there.
        resume_from: see there.
        share: one coefficient per task and ``"module"``, or one per ``"task"``.
        warm_up: steps at the start in which coefficients are shared per task, whatever ``share`` says.
        clamp: bounds that coefficients are held to in the forward, or None.
    """

    share: str = "module"
    warm_up: int = 0
    clamp: Sequence[float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("share", self.share, SHARES)
        check_count("warm_up", self.warm_up, 0)
        if self.clamp is not None:
            check_bounds("clamp", self.clamp)
