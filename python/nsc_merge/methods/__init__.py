"""Every merge method, under one interface: one file per family, and this registry.

>>> from nsc_merge.methods import METHODS
>>> METHODS["ties"].paper
"""

from __future__ import annotations

from nsc_merge.methods import (
    arithmetic,
    core_space,
    cur,
    dare,
    emr,
    fr,
    knots,
    lego,
    null_space,
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
)

METHODS: dict[str, Method] = {method.name: method for family in _FAMILIES for method in family.METHODS}

__all__ = ["METHODS", "Method", "Problem"]
