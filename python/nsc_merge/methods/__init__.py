"""Every merge method, under one interface: one file per method or few that belong together, and a registry.

>>> from nsc_merge.methods import METHODS
>>> METHODS["ties"].paper
"""

from __future__ import annotations

from nsc_merge.methods.method import Method, Problem
from nsc_merge.methods.registry import METHODS, describe_methods, method_of

__all__ = ["METHODS", "Method", "Problem", "describe_methods", "method_of"]
