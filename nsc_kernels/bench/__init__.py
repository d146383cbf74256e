"""Measures the operator, whole layers and merge steps on the machine at hand: ``python -m nsc_kernels.bench``.

``@contender`` adds a kernel of your own (:mod:`nsc_kernels.bench.registry`).
"""

from .problem import Problem
from .registry import Contender, contender
from .shapes import Shape

__all__ = ["Contender", "Problem", "Shape", "contender"]
