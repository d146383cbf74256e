"""Every merge method by its name. A new method is a file beside the others and a line in the table below."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from nsc_merge.methods.closed_form import fisher, regmean
from nsc_merge.methods.gradient import adamerging, distillation, feature_matching, nsc
from nsc_merge.methods.low_rank import (
    core_space,
    knots,
    lora_lego,
    robustmerge,
    spectral,
    svd_and_linear,
    svd_cur,
    wudi,
)
from nsc_merge.methods.method import Method
from nsc_merge.methods.task_vectors import dare, emr, fr_merging, masks, pruning, task_arithmetic, ties
from nsc_merge.models.families import FAMILIES
from nsc_merge.utils.option_checks import did_you_mean

_FILES = (
    nsc,
    task_arithmetic,
    ties,
    dare,
    pruning,
    masks,
    svd_and_linear,
    knots,
    core_space,
    svd_cur,
    lora_lego,
    spectral,
    wudi,
    emr,
    fr_merging,
    robustmerge,
    adamerging,
    regmean,
    fisher,
    feature_matching,
    distillation,
)

METHODS: dict[str, Method] = {method.name: method for file in _FILES for method in file.METHODS}


def method_of(name: str) -> Method:
    """The method of a name.

    Raises:
        ValueError: naming what was found, and the nearest that there is.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"method: expected one of {sorted(METHODS)}, found {name!r}{did_you_mean(name, METHODS)}")
    return METHODS[name]


def describe_methods() -> dict[str, dict[str, Any]]:
    """Method -> its ``summary`` and ``paper`` in a line each, what it ``needs`` and ``gives`` (see
    :class:`nsc_merge.methods.Method`), the option that is ``tuned`` on validation data if any, its ``options`` with
    defaults, and its ``recipes``: name -> the ``families`` of models that it is for, and the ``options`` whose defaults
    it replaces there.
    """
    return {
        method.name: {
            "summary": method.summary,
            "paper": method.paper,
            "needs": sorted(method.needs),
            "gives": method.gives,
            "tuned": method.tuned,
            "options": {
                option.name: None if option.default is MISSING else option.default
                for option in fields(method.options)
            },
            "recipes": {name: _described(name, settings) for name, settings in method.recipes.items()},
        }
        for method in METHODS.values()
    }


def _described(recipe: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"families": [family.name for family in FAMILIES if family.recipe == recipe], "options": settings}
