"""RegMean's terms beside the adapters' own updates, with coefficients of both.

RegMean (arXiv 2212.09849) merges to ``sum_k s_k B_k A_k G_k (sum_j G_j)^-1``, where ``G_k = X_k^T X_k / N_k`` is of the
inputs that a linear has in task k's own model. A term is task k's update behind a filter, which lets pass what its own
inputs have and those of other tasks have not. With coefficients of both kinds,

    dW = sum_k s_k B_k A_k (lam_k I + mu_k G_k (sum_j G_j)^-1),

a merge can be task arithmetic (mu = 0), RegMean (lam = 0, mu = 1), or anything between and beyond. The sum is again of
one adapter for each task, with other rows in the place of A_k's. The two kinds together are this project's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nsc_merge.adapters import Adapter, Factor
from nsc_merge.calibration.batches import restartable
from nsc_merge.methods.closed_form.regmean import RegMeanOptions, filtered_rows
from nsc_merge.methods.closed_form.single_task import changed
from nsc_merge.methods.gradient_free import empty, low_rank_part, present, with_the_rest
from nsc_merge.methods.method import Problem
from nsc_merge.models.attachment import adapted_linears, merged_linears
from nsc_merge.models.merged.whole import Site
from nsc_merge.results.result import MergeResult
from nsc_merge.utils.errors import naming


def term_of(task: str) -> str:
    """What a task's term is called among adapters. No task is called so."""
    return f"{task}\0"


def check_regmean(given: Any) -> RegMeanOptions | None:
    """The options of the Gram matrices; None without terms.

    Raises:
        TypeError, ValueError: naming the option, what was found and what was expected.
    """
    if given is False:
        return None
    if given is True:
        return RegMeanOptions()
    if not isinstance(given, Mapping):
        raise ValueError(f"regmean: expected True, False or options of method 'regmean' by name, found {given!r}")
    known = [name for name in RegMeanOptions.__dataclass_fields__ if name != "scale"]
    unknown = next((name for name in given if name not in known), None)
    if unknown is not None:
        raise ValueError(f"regmean: expected some of {', '.join(known)}, found {unknown!r}")
    try:
        return RegMeanOptions(**given)
    except (ValueError, TypeError) as error:
        raise type(error)(f"regmean: {error}") from None


def with_terms(
    problem: Problem, options: RegMeanOptions, init: float | Mapping[str, float]
) -> tuple[Problem, dict[str, float]]:
    """A problem with the tasks' terms as further adapters, and the coefficients of all with which the merge is the mean
    of task arithmetic's at ``init`` and RegMean's.
    """
    start = {task: init[task] if isinstance(init, Mapping) else init for task in problem.tasks}
    halves = {**{task: value / 2 for task, value in start.items()}, **{term_of(task): 0.5 for task in start}}
    # Batches that are drawn here must not be lost to the steps.
    problem = replace(problem, calibration=restartable(problem.calibration, problem.tasks))
    return replace(problem, adapters={**problem.adapters, **_terms(problem, options)}), halves


def _terms(problem: Problem, options: RegMeanOptions) -> dict[str, Adapter]:
    """Updates with ``A_k G_k (sum_j G_j)^-1`` in the place of A_k. What has no such rows, as embeddings and what is not
    of low rank, is divided by how many tasks there are, as RegMean divides it.
    """
    linears, low_rank, paths = low_rank_part(problem)
    measured = changed(low_rank, [path for path in paths if not isinstance(linears[path], Site)])
    with naming("regmean"):
        filtered = dict(filtered_rows(problem, low_rank, measured, options))
    found: dict[str, dict[str, Factor]] = {task: {} for task in problem.tasks}
    for path in adapted_linears(problem.model, problem.adapters):
        for task, factor in present(problem.adapters, path).items():
            rows = filtered[path][task].float() if factor.rank and path in filtered else _share(factor.A, len(found))
            bias, dense, gain = (
                None if part is None else _share(part, len(found)) for part in (factor.bias, factor.dense, factor.gain)
            )
            found[task][path] = replace(factor, A=rows, bias=bias, dense=dense, gain=gain)
    return {term_of(task): Adapter(term_of(task), factors, None) for task, factors in found.items()}


def _share(part: Tensor, count: int) -> Tensor:
    """One in ``count`` parts, not rounded to half precision."""
    return part.to(torch.promote_types(part.dtype, torch.float32)) / count


def folded(result: MergeResult, problem: Problem) -> MergeResult:
    """A result with coefficients of adapters and terms, as one with a merged update for each module."""
    factors = {}
    for path, linear in merged_linears(problem.model, problem.adapters).items():
        lam = {**dict.fromkeys(result.adapters, 1.0), **result.coefficients.get(path, {})}
        ranked = {task: factor for task, factor in present(problem.adapters, path).items() if factor.rank}
        merged = empty(linear)
        if ranked:
            rows = []
            for task, factor in ranked.items():
                row = (lam[task] if factor.fixed is None else factor.fixed) * factor.A.double()
                term = result.adapters[term_of(task)].factors.get(path)
                rows.append(row if term is None else row + lam[term_of(task)] * term.A.double())
            B = torch.cat([factor.scaling * factor.B.double() for factor in ranked.values()], 1)
            merged = Factor(torch.cat(rows).float(), B.float(), 1.0)
        factors[path] = with_the_rest(path, merged, result.adapters, 1.0, averages=False, weights=lam)
    return replace(result, coefficients={}, dead={}, factors=factors, adapters=problem.adapters)
