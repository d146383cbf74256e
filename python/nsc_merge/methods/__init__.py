"""Every merge method, under one interface: one file per family, and this registry.

>>> from nsc_merge.methods import METHODS
>>> METHODS["ties"].paper
"""

from __future__ import annotations

from nsc_merge.methods import (
    adamerging,
    arithmetic,
    core_space,
    cur,
    dare,
    distilling,
    emr,
    fisher,
    fr,
    knots,
    lego,
    matching,
    null_space,
    regression_mean,
    robust,
    svd,
    ties,
)
from nsc_merge.methods.base import Method, Problem

_FAMILIES = (
    null_space,
    arithmetic,
    ties,
    dare,
    svd,
    knots,
    core_space,
    cur,
    lego,
    emr,
    fr,
    robust,
    adamerging,
    regression_mean,
    fisher,
    matching,
    distilling,
)

METHODS: dict[str, Method] = {method.name: method for family in _FAMILIES for method in family.METHODS}

__all__ = ["METHODS", "Method", "Problem"]
