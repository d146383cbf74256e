"""What a backward is given, for the kernels of Triton and of CUDA C++ alike."""

from __future__ import annotations

from typing import Any

from nsc_kernels import reference
from nsc_kernels.verify.problems import Problem


def backward_inputs(
    p: Problem, *, dy: bool = True, dquad: bool = True, dsqnorm: bool = True, dz_base: bool = False
) -> tuple[Any, ...]:
    """What a backward takes before its needs, with the eager forward's u; None for what is not given."""
    return (
        p.dy if dy else None,
        p.dquad if dquad else None,
        p.dsqnorm if dsqnorm else None,
        reference.forward(p.z, p.A, p.Bt, p.offsets, p.lam, None, False)[3],
        p.z if dsqnorm else None,
        p.A,
        p.Bt,
        p.offsets,
        p.lam,
        p.dz_base if dz_base else None,
    )
