"""What a merge method is, and what all methods that need no data have in common."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nsc_merge.adapters import Adapter, Factor
from nsc_merge.calibration.forward_passes import Calibration
from nsc_merge.models.attachment import merged_linears
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
Updates = Callable[[Mapping[str, Adapter], Sequence[str], Any], Iterator[tuple[str, Factor]]]
# What a result holds for each module: a coefficient per adapter; an update as two factors, or as a matrix, which an
# adapter holds only after truncation; or no update.
Gives = Literal["coefficients", "low rank", "full rank", "nothing"]
# Whether a sum over tasks is divided by how many there are, or by the sum of their weights.
Averages = bool | Literal["weight"]


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
        updates: of methods made by :func:`gradient_free`, what computes one module's update after another, for whoever
            does not want to hold them all.
        about: how the update was found, in a paragraph for the model card; made of name and paper if empty.
        recipes: name -> defaults that take the place of those of ``options``, for methods with an option ``recipe``.
        resolve: makes the options of those given by name, where that takes the tasks and the model (None for any).
        weighted: the option that takes one number for each task, if the method has it.
        low_rank_with: options by which an update of full rank becomes one of low rank.
        averages_outputs: the models of all tasks serve together, by the mean of their outputs.
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
    about: str = ""
    recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    resolve: Resolve | None = None
    weighted: str = "weights"
    low_rank_with: Mapping[str, Any] = field(default_factory=dict)
    averages_outputs: bool = False

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
        return self.gives

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


def gradient_free(
    name: str,
    summary: str,
    paper: str,
    options: type,
    updates: Updates,
    *,
    averages: Averages | Callable[[Any], Averages] = False,
    gives: Gives = "low rank",
    low_rank_with: Mapping[str, Any] | None = None,
    tuned: str | None = "scale",
) -> Method:
    """A method that computes a merged update from the adapters alone, one module after another.

    What is no low-rank matrix, biases of LoRA layers (``lora_bias``) and shared modules trained in full, is
    merged by task arithmetic instead: with the options ``scale`` and ``weights`` (1 where there are none), divided as
    the method divides its updates.

    Args:
        updates: given task -> adapter, the paths to merge and the options, yields path and merged update. The
            adapters hold low-rank factors only; a path is touched by one task at least.
        gives, low_rank_with, tuned: see :class:`Method`.
        averages: whether equal updates of all tasks merge to that update, and not to their sum: True, or ``"weight"``
            where the sum is divided by the weights; or a function of the options that says so.
    """

    def run(problem: Problem, given: Mapping[str, Any]) -> MergeResult:
        chosen = options(**given)
        linears, low_rank, paths = low_rank_part(problem)
        merged = dict(updates(low_rank, paths, chosen))
        scale = float(getattr(chosen, "scale", 1.0))
        weights = getattr(chosen, "weights", None)
        divided = averages(chosen) if callable(averages) else averages
        factors = {
            path: with_the_rest(
                path, linear, merged.get(path), problem.adapters, scale, averages=divided, weights=weights
            )
            for path, linear in linears.items()
        }
        return MergeResult(
            method=name,
            coefficients={},
            history=[],
            adapters=problem.adapters,
            options={option.name: getattr(chosen, option.name) for option in fields(options)},
            dead={},
            model=problem.model,
            factors=factors,
        )

    return Method(
        name,
        summary,
        paper,
        options,
        run,
        gives=gives,
        tuned=tuned,
        updates=updates,
        low_rank_with=low_rank_with or {},
    )


def low_rank_part(problem: Problem) -> tuple[dict[str, nn.Linear], dict[str, Adapter], list[str]]:
    """All linears that some adapter touches, the adapters without modules that were trained in full, and the paths of
    the linears that are left in these.
    """
    linears = merged_linears(problem.model, problem.adapters)
    low_rank = {
        task: replace(adapter, factors={path: factor for path, factor in adapter.factors.items() if factor.rank})
        for task, adapter in problem.adapters.items()
    }
    return linears, low_rank, [path for path in linears if present(low_rank, path)]


def empty(linear: nn.Linear) -> Factor:
    """The update of a linear that changes nothing, of rank 0."""
    return Factor(torch.empty(0, linear.in_features), torch.empty(linear.out_features, 0), 1.0)


def present(adapters: Mapping[str, Adapter], path: str) -> dict[str, Factor]:
    """Task -> update, of the tasks whose adapter touches a module."""
    return {task: adapter.factors[path] for task, adapter in adapters.items() if path in adapter.factors}


def with_the_rest(
    path: str,
    linear: nn.Linear,
    merged: Factor | None,
    adapters: Mapping[str, Adapter],
    scale: float,
    *,
    averages: Averages,
    weights: Mapping[str, float] | None = None,
) -> Factor:
    """A method's update of one linear, none if there is none, with the biases of the adapters and their updates of the
    whole weight added as :func:`gradient_free` says.
    """
    merged = merged or empty(linear)
    factors = present(adapters, path)
    parts: dict[str, Tensor | None] = {}
    for part in ("bias", "dense"):
        held = {task: factor for task, factor in factors.items() if getattr(factor, part) is not None}
        shares = {task: 1.0 if weights is None else weights[task] for task in held}
        divisor = {False: 1, True: len(held), "weight": sum(shares.values())}[averages] or 1
        terms = [
            (scale * shares[task] / divisor if factor.fixed is None else factor.fixed)
            * factor.scaling
            * getattr(factor, part).double()
            for task, factor in held.items()
        ]
        parts[part] = torch.stack(terms).sum(0).float() if terms else None
    if parts["dense"] is not None and merged.dense is not None:
        parts["dense"] = parts["dense"] + merged.dense
    assert merged.scaling == 1.0, "methods fold scalings into the factors"
    return replace(merged, bias=parts["bias"], dense=merged.dense if parts["dense"] is None else parts["dense"])
