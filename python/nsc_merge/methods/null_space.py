"""NSC merging as a method of the registry; the work is in :mod:`nsc_merge.methods.gradient.nsc`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from nsc_merge.methods.gradient.nsc import RECIPES, NSCOptions, merge_nsc, resolve_options
from nsc_merge.methods.gradient_free import Method, Problem
from nsc_merge.models.families import FAMILIES, family_of
from nsc_merge.results.result import MergeResult


def _run(problem: Problem, given: Mapping[str, Any]) -> MergeResult:
    return merge_nsc(problem.model, problem.adapters, problem.calibration, given)


def _resolve(model: nn.Module | None, tasks: Sequence[str], given: Mapping[str, Any]) -> NSCOptions:
    # The family only chooses defaults: to check what was given, any will do.
    return resolve_options(FAMILIES[0] if model is None else family_of(model), tasks, given)


METHODS = (
    Method(
        "nsc",
        "learns a coefficient per task and module by minimising the null-space ratio (no labels)",
        "NSC Merging, arXiv 2603.26317",
        NSCOptions,
        _run,
        needs=frozenset({"data", "gradients"}),
        gives="coefficients",
        about="The coefficients were found by null-space compression ([arXiv 2603.26317]"
        "(https://arxiv.org/abs/2603.26317)) on unlabelled inputs: no labels and no task metric were used. "
        "All settings, versions and hashes of the inputs are in `recipe.yaml`.",
        recipes=RECIPES,
        resolve=_resolve,
        weighted="init",
    ),
)
