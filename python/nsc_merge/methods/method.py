"""What a merge method is: what it is given, needs, gives, and says of itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from torch import nn

from nsc_merge.adapters import Adapter, Factor
from nsc_merge.calibration.batches import Calibration
from nsc_merge.results.result import MergeResult
from nsc_merge.utils.option_checks import did_you_mean


@dataclass(frozen=True)
class Problem:
    """What a method is given.

    Attributes:
        model: the base model.
        adapters: task -> adapter, as fitted to the model by :func:`nsc_merge.models.fitting.fit`.
        calibration: task -> batches of model inputs, for methods that need data.
    """

    model: nn.Module
    adapters: dict[str, Adapter]
    calibration: Calibration | None = None

    @property
    def tasks(self) -> list[str]:
        return list(self.adapters)


Resolve = Callable[[nn.Module | None, Sequence[str], Mapping[str, Any]], Any]
Run = Callable[[Problem, Mapping[str, Any]], MergeResult]
Check = Callable[[Problem, Mapping[str, Any]], Any]
Updates = Callable[[Mapping[str, Adapter], Sequence[str], Any], Iterator[tuple[str, Factor]]]
# What a result holds for each module: a coefficient per adapter; an update as two factors, or as a matrix, which an
# adapter holds only after truncation; or no update.
Gives = Literal["coefficients", "low rank", "full rank", "nothing"]
# Whether a sum over tasks is divided by how many there are in it, by the sum of their weights, or by how many are
# merged, also those that have nothing to add.
Averages = bool | Literal["weight", "tasks"]


@dataclass(frozen=True)
class Method:
    """One way of merging adapters.

    Attributes:
        name: as in :func:`nsc_merge.merge`.
        summary: one line.
        paper: where it comes from.
        options: a frozen dataclass; its docstring explains each option, and it checks itself.
        run: does it, given the options by name.
        needs: of ``"data"`` (unlabelled inputs), ``"gradients"``, ``"outputs"`` (what the tasks' heads make of
            them) and ``"labels"``.
        gives: what the result holds for each module.
        tuned: the option that papers choose on validation data, if any; see :mod:`nsc_merge.methods.scale_tuning`.
        updates: of methods that look at the adapters alone, what computes one module's update after another, for
            whoever does not want to hold them all.
        averages: whether equal updates of all tasks merge to that update, and not to their sum: True, or ``"weight"``
            where the sum is divided by the weights; or a function of the options that says so. Of a method that makes
            other updates of equal ones, whether equal biases merge to that bias.
        of_entries: whether ``updates`` takes updates that are matrices and no products as well, where its own are of
            full rank.
        of_factors: whether the result depends on which factors a product is given by, and not on the product alone:
            True, or a function of the options that says so. It does with ``low_rank_with``, too.
        about: how the update was found, in a paragraph for the model card; made of name and paper if empty.
        recipes: name -> defaults that take the place of those of ``options``, for methods with an option ``recipe``.
        resolve: makes the options of those given by name, where that takes the tasks and the model (None for any).
        weighted: the option that takes one number for each task, if the method has it.
        low_rank_with: options by which an update of full rank becomes one of low rank, as it is merged in its factors.
        factors_with: the option with which, given anything but False, a method of coefficients gives factors.
        per_task: every task has an update of its own.
        averages_outputs: the models of all tasks serve together, by the mean of their outputs.
        check: of methods that take no steps, refuses adapters, model and options that ``run`` would refuse, without
            merging: a few steps of others tell.
    """

    name: str
    summary: str
    paper: str
    options: type
    run: Run
    needs: frozenset[str] = frozenset()
    gives: Gives = "low rank"
    tuned: str | None = None
    updates: Updates | None = None
    averages: Averages | Callable[[Any], Averages] = False
    of_entries: bool = False
    of_factors: bool | Callable[[Any], bool] = False
    about: str = ""
    recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    resolve: Resolve | None = None
    weighted: str = "weights"
    low_rank_with: Mapping[str, Any] = field(default_factory=dict)
    factors_with: str = ""
    per_task: bool = False
    averages_outputs: bool = False
    check: Check | None = None

    @property
    def option_names(self) -> list[str]:
        return [option.name for option in fields(self.options)]

    @property
    def resumable(self) -> bool:
        """Whether the method keeps a state to go on from."""
        return "state_to" in self.option_names

    @property
    def paragraph(self) -> str:
        """:attr:`about`, whether it was given or not."""
        return self.about or f"Method: `{self.name}` ({self.paper}). All settings are in `recipe.yaml`."

    def resolved(self, given: Mapping[str, Any], tasks: Sequence[str], model: nn.Module | None = None) -> Any:
        """The options, with all that were not given.

        Args:
            given: options by name.
            tasks: that are merged.
            model: on whose family defaults may depend; None checks for any.

        Raises:
            TypeError, ValueError: naming the option, what was found and what was expected.
        """
        self.check_names(given)
        return self.options(**given) if self.resolve is None else self.resolve(model, tasks, given)

    def gives_with(self, given: Mapping[str, Any]) -> Gives:
        """What the result holds for each module, with these options."""
        if any(given.get(name) == value for name, value in self.low_rank_with.items()):
            return "low rank"
        if given.get(self.factors_with, False) is not False:
            return "low rank"
        return self.gives

    def averages_with(self, options: Any) -> Averages:
        """:attr:`averages`, with these options."""
        return self.averages(options) if callable(self.averages) else self.averages

    def of_factors_with(self, options: Any) -> bool:
        """:attr:`of_factors`, with these options."""
        if any(getattr(options, name) == value for name, value in self.low_rank_with.items()):
            return True
        return self.of_factors(options) if callable(self.of_factors) else self.of_factors

    def factors_option(self, options: Any) -> str | None:
        """The option with another value of which the result would not depend on the factors, if there is one."""
        return next((name for name in self.option_names if getattr(options, name) == "factors"), None)

    def check_names(self, given: Collection[str]) -> None:
        """Refuse options that the method does not have.

        Raises:
            ValueError: naming the option, those that there are, and the nearest.
        """
        known = self.option_names
        for name in given:
            if name not in known:
                listed = ", ".join(known) or "none"
                raise ValueError(
                    f"{name}: not an option of method {self.name!r} (options: {listed}){did_you_mean(name, known)}"
                )


@dataclass(frozen=True)
class NoOptions:
    """There are none."""
