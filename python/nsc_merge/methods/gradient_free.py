"""What all methods that need no data have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from nsc_merge.adapters import Adapter, Factor
from nsc_merge.methods.full_rank import kept
from nsc_merge.methods.method import Averages, Gives, Method, Problem, Updates
from nsc_merge.models.attachment import merged_linears
from nsc_merge.models.bases.quantised import Linear
from nsc_merge.results.result import MergeResult

# Of the sum of their magnitudes, below which weights add up to zero.
CANCELS = 1e-8


def gradient_free(
    name: str,
    summary: str,
    paper: str,
    options: type,
    updates: Updates,
    *,
    averages: Averages | Callable[[Any], Averages] = False,
    gives: Gives = "low rank",
    of_entries: bool = False,
    of_factors: bool | Callable[[Any], bool] = False,
    low_rank_with: Mapping[str, Any] | None = None,
    tuned: str | None = "scale",
) -> Method:
    """A method that computes a merged update from the adapters alone, one module after another.

    What is no low-rank matrix, biases of LoRA layers (``lora_bias``), gains of DoRA and shared modules trained in full,
    is merged by task arithmetic instead: with the options ``scale`` and ``weights`` (1 where there are none), divided
    as the method divides its updates.

    Args:
        updates: given task -> adapter, the paths to merge and the options, yields path and merged update. The
            adapters hold low-rank factors only; a path is touched by one task at least.
        gives, of_entries, of_factors, low_rank_with, tuned, averages: see :class:`Method`.
    """

    def run(problem: Problem, given: Mapping[str, Any]) -> MergeResult:
        chosen = options(**given)
        linears, low_rank, paths = low_rank_part(problem)
        merged = dict(kept(updates(low_rank, paths, chosen)))
        scale = float(getattr(chosen, "scale", 1.0))
        weights = getattr(chosen, "weights", None)
        divided = method.averages_with(chosen)
        factors = {
            path: with_the_rest(
                path, merged.get(path) or empty(linear), problem.adapters, scale, averages=divided, weights=weights
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

    def check(problem: Problem, given: Mapping[str, Any]) -> None:
        chosen = options(**given)
        _, low_rank, paths = low_rank_part(problem)
        # What is refused is refused before the first update.
        next(iter(updates(low_rank, paths, chosen)), None)

    method = Method(
        name,
        summary,
        paper,
        options,
        run,
        gives=gives,
        tuned=tuned,
        updates=updates,
        averages=averages,
        of_entries=of_entries,
        of_factors=of_factors,
        low_rank_with=low_rank_with or {},
        check=check,
    )
    return method


def low_rank_part(problem: Problem) -> tuple[dict[str, Linear], dict[str, Adapter], list[str]]:
    """All linears that some adapter touches, the adapters without modules that were trained in full and without gains,
    and the paths of the linears that are left in these.
    """
    linears = merged_linears(problem.model, problem.adapters)

    def updates(_: str, factor: Factor) -> Factor | None:
        return replace(factor, gain=None) if factor.rank else None

    low_rank = {task: adapter.with_factors(updates) for task, adapter in problem.adapters.items()}
    return linears, low_rank, [path for path in linears if present(low_rank, path)]


def empty(linear: Linear) -> Factor:
    """The update of a linear that changes nothing, of rank 0."""
    return Factor.empty(linear.out_features, linear.in_features)


def present(adapters: Mapping[str, Adapter], path: str) -> dict[str, Factor]:
    """Task -> update, of the tasks whose adapter touches a module."""
    return {task: adapter.factors[path] for task, adapter in adapters.items() if path in adapter.factors}


def divisor_of(averages: Averages, shares: Sequence[float], tasks: int) -> float:
    """What a sum over tasks is divided by.

    Args:
        averages: see :data:`nsc_merge.methods.method.Averages`.
        shares: the weights of the tasks that are added up.
        tasks: how many are merged.
    """
    if averages == "tasks":
        return tasks
    if averages != "weight":
        return len(shares) or 1 if averages else 1
    total = sum(shares)
    # Weights that cancel are divided by nothing, as in mergekit, also where rounding keeps them from being zero.
    return total if abs(total) > CANCELS * sum(map(abs, shares)) else 1


def with_the_rest(
    path: str,
    merged: Factor,
    adapters: Mapping[str, Adapter],
    scale: float,
    *,
    averages: Averages,
    weights: Mapping[str, float] | None = None,
) -> Factor:
    """A method's update of one linear with the biases and gains of the adapters and their
    updates of the whole weight added as :func:`gradient_free` says.

    Raises:
        ValueError: naming the module, if the update is not finite.
    """
    factors = present(adapters, path)
    parts: dict[str, Tensor | None] = {}
    for part in ("bias", "dense", "gain"):
        held = {task: factor for task, factor in factors.items() if getattr(factor, part) is not None}
        shares = {task: 1.0 if weights is None else weights[task] for task in held}
        divisor = divisor_of(averages, list(shares.values()), len(adapters))
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
    whole = replace(
        merged,
        bias=parts["bias"],
        dense=merged.dense if parts["dense"] is None else parts["dense"],
        gain=parts["gain"],
    )
    for value in (whole.A, whole.B, whole.bias, whole.dense, whole.gain):
        if value is not None and not torch.isfinite(value).all():
            raise ValueError(
                f"scale: the merged update of {path} is not finite with scale={scale:g}; "
                "expected a scale, and adapters, whose products float32 holds"
            )
    return whole


def check_equal_ranks(what: str, adapters: Mapping[str, Adapter], paths: Sequence[str]) -> None:
    """Refuse adapters whose factors cannot be added, before any module is merged.

    Args:
        what: adds them, for the message.
        adapters, paths: that are merged.

    Raises:
        ValueError: naming the module and the ranks.
    """
    for path in paths:
        ranks = {task: factor.rank for task, factor in present(adapters, path).items()}
        if len(set(ranks.values())) > 1:
            raise ValueError(
                f"adapters: {what} adds factors and needs equal ranks in a module, found {ranks} at {path}; "
                "task_arithmetic, svd, robustmerge_alg1 and other scopes merge updates, of any ranks"
            )
