"""NSC merging as a method of the registry; the work is in :mod:`nsc_merge.nsc`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nsc_merge.methods.base import Method, Problem
from nsc_merge.nsc import NSCOptions, merge_nsc
from nsc_merge.result import MergeResult


def _run(problem: Problem, given: Mapping[str, Any]) -> MergeResult:
    return merge_nsc(problem.model, problem.adapters, problem.calibration, given)


METHODS = (
    Method(
        "nsc",
        "learns a coefficient per task and module by minimising the null-space ratio (no labels)",
        "NSC Merging, arXiv 2603.26317",
        NSCOptions,
        _run,
        needs=frozenset({"data", "gradients"}),
        gives="coefficients",
    ),
)
