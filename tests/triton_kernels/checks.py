"""One direction of the Triton kernels, run and held to the criterion."""

from __future__ import annotations

from given import backward_inputs
from torch import Tensor

from nsc_kernels.contract import BackwardCall, ForwardCall
from nsc_kernels.triton import launch
from nsc_kernels.triton.configs import Config
from nsc_kernels.verify.criterion import faults, judge_backward, judge_forward
from nsc_kernels.verify.problems import Problem


def check_forward(
    p: Problem, config: Config | None = None, *, base: bool = True, stats: bool = True, save_u: bool = True
) -> tuple[Tensor | None, ...]:
    """Run and compare one forward; returns its results."""
    inputs = (p.z, p.A, p.Bt, p.offsets, p.lam, p.base if base else None)
    found = launch.forward(ForwardCall(*inputs, stats, save_u), config=config)
    assert [t is not None for t in found] == [True, stats, stats, save_u]
    assert not faults(judge_forward(found, *inputs))
    return found


def check_backward(
    p: Problem,
    config: Config | None = None,
    *,
    need_dz: bool = True,
    need_dlam: bool = True,
    **given: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Run and compare one backward on what is ``given`` (:func:`backward_inputs`); returns its results."""
    inputs = backward_inputs(p, **given)
    found = launch.backward(BackwardCall(*inputs, need_dz, need_dlam), config=config)
    assert [t is not None for t in found] == [need_dz, need_dlam]
    assert not faults(judge_backward(found, *inputs, need_dz=need_dz, need_dlam=need_dlam))
    return found
