"""The trials: every case forward and backward against float64 on the GPU, with memory poisoned by NaN.

Each is held to the criterion (criterion.py): twice the error of eager torch in the same dtype with the same rounding
points, and what matrix units that cut off may lose. Then the same inputs again, which must give the same bits, in every
way of calling (repeats.py).
"""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Iterator
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch, verified_hardware
from ..bench.trials import Trial
from ..contract import BackwardCall, Call, ForwardCall
from . import criterion
from .cases import R16, SMALLEST, TRIED, UNEQUAL, Case, cases
from .problems import problem
from .repeats import BITWISE, QUESTIONS, Skipped, wait_for_memory

FORWARD, BACKWARD = criterion.FORWARD, criterion.BACKWARD


class Run:
    """One case on one backend."""

    def __init__(self, backend: ModuleType | SimpleNamespace, case: Case, on: torch.device):
        self.backend, self.case = backend, case
        dtype = getattr(torch, case.dtype)
        self.p = problem(case.T, case.d_in, case.d_out, case.ranks, dtype, on, per_row=case.per_row)

    @property
    def name(self) -> str:
        return self.backend.__name__.rpartition(".")[2]

    def _forward_call(self) -> ForwardCall:
        p, given = self.p, self.case.given
        return ForwardCall(p.z, p.A, p.Bt, p.offsets, p.lam, p.base if self.case.base else None, given != "y", True)

    def _backward_call(self, u: Tensor) -> BackwardCall:
        p, given = self.p, self.case.given
        dy = p.dy if given != "statistics" else None
        dquad, dsqnorm = (p.dquad, p.dsqnorm) if given != "y" else (None, None)
        return BackwardCall(dy, dquad, dsqnorm, u, p.z, p.A, p.Bt, p.offsets, p.lam, None, True, True)

    def __call__(self) -> dict[str, Tensor]:
        """Forward, and backward from the forward's own u."""
        forward = self.backend.forward(self._forward_call())
        backward = self.backend.backward(self._backward_call(forward[3]))
        names = (*FORWARD, *BACKWARD)
        return {name: t for name, t in zip(names, (*forward, *backward), strict=True) if t is not None}

    def check(self) -> dict[str, tuple[float, float]]:
        """Error and bound of every result. The backward is judged from this backend's u."""
        found = self()
        forward, backward = ([found.get(name) for name in names] for names in (FORWARD, BACKWARD))
        judged = criterion.judge_forward(forward, *self._forward_call()[:6])
        return judged | criterion.judge_backward(backward, *self._backward_call(found["u"])[:10])


def beyond_int32(backend: ModuleType, on: torch.device) -> dict[str, tuple[float, float]]:
    """More than 2^31 elements in z and y; the last rows must be right. About 13 GB."""
    wait_for_memory(on, 20)
    T, d = (1 << 17) + 100, 1 << 14
    p = problem(1, d, d, (16,), torch.bfloat16, on)
    z = torch.randn(T, d, device=on, dtype=torch.bfloat16)
    factors = (p.A, p.Bt, p.offsets, p.lam)
    y, quad, sqnorm, u = backend.forward(ForwardCall(z, *factors, z, True, True))
    dz, _ = backend.backward(BackwardCall(y, quad, sqnorm, u, z, *factors, None, True, False))
    tail = slice(T - 200, T)
    inputs = (y[tail], quad[tail], sqnorm[tail], u[tail], z[tail], *factors, None)
    judged = criterion.judge_forward((y[tail], quad[tail], sqnorm[tail], u[tail]), z[tail], *factors, z[tail])
    return judged | criterion.judge_backward((dz[tail], None), *inputs, need_dlam=False)


def clusters(run: Run, on: torch.device) -> dict[str, tuple[float, float]]:
    """Every variant of the CUDA C++ kernel with every size of cluster; 16 blocks only where the device can run them."""
    backend = run.backend
    found: dict[str, tuple[float, float]] = {}
    for variant, size in itertools.product(backend.variants_of(run.p.offsets[-1]), (1, 2, 4, 8, 16)):
        how = {"variant": variant, "cluster": size}
        run.backend = SimpleNamespace(
            forward=partial(backend.forward, **how), backward=partial(backend.backward, **how)
        )
        try:
            found |= {f"{name} of variant {variant} in clusters of {size}": e for name, e in run.check().items()}
        except RuntimeError:
            if size <= 8:
                raise
        finally:
            run.backend = backend
    return found


def refused(name: str, on: torch.device) -> str | None:
    """Why a backend serves nothing on a device, such as kernels for another architecture; None where it serves."""
    backend, _ = dispatch.load(name)
    assert backend is not None
    return backend.rejects(_call(SMALLEST, on))


def _call(case: Case, on: torch.device) -> Call:
    offsets = tuple(itertools.accumulate(case.ranks, initial=0))
    return Call(on, getattr(torch, case.dtype), case.T, case.d_in, case.d_out, offsets)


class Payload(NamedTuple):
    backend: str
    what: str
    case: Case | None


def trials(names: list[str], dry_run: bool) -> dict[str, Trial]:
    """Every trial by its name, the smallest first."""
    found: dict[str, Trial] = {}

    def add(what: str, chosen: list[Case], alone: bool = False, limit: float = 60) -> None:
        for case, name in itertools.product(chosen, names):
            key = f"{name} {what} {case}"
            found[key] = Trial(key if alone else name, Payload(name, what, case), limit)

    add("accuracy", cases(dry_run))
    bitwise = cases(dry_run) if dry_run else [case for case in cases(False) if case.T in (63, 130, 256, 6304)]
    for what in ("repeats", "replays", "captures"):
        add(what, bitwise)
    if dry_run:
        add("thousand", [TRIED[0]])
        return found
    add("thousand", [SMALLEST, bitwise[1], bitwise[-1]], limit=120)
    for what in ("streams", "two_graphs"):
        add(what, bitwise[:8])
    compiled = [Case(T, 760, 1128, ranks, "bfloat16") for T in (63, 6304) for ranks in (UNEQUAL, R16[6])]
    for what in ("compiled", "reduce_overhead"):
        add(what, compiled, limit=180)
    add("external_streams", [SMALLEST])
    for case in (case for case in bitwise if "cuda" in names and case.dtype != "float32"):
        found[f"cuda clusters {case}"] = Trial("cuda", Payload("cuda", "clusters", case), 90)
    if "cuda" in names:
        key = f"cuda unwarmed {SMALLEST}"
        found[key] = Trial(key, Payload("cuda", "unwarmed", SMALLEST))  # in a process that has launched nothing
    for name in names:
        found[f"{name} beyond_int32"] = Trial(name, Payload(name, "beyond_int32", None), 120)
    return found


def attempt(payload: Payload, on: torch.device) -> dict[str, Any]:
    """One trial as a row: ``passed``, and why not; None where it could not be tried."""
    name, what, case = payload
    backend: Any = dispatch.load(name)[0]
    # The source is this process's: files may have been edited since others began.
    row: dict[str, Any] = {"backend": name, "source": verified_hardware.source(name)}
    row |= {"what": what, "case": None if case is None else case._asdict()}
    if on.type == "cuda":
        found = torch.cuda.get_device_properties(on)
        row |= {"device": found.name, "arch": f"sm_{10 * found.major + found.minor}", "memory": found.total_memory}
        if case is not None and case.memory > found.total_memory:
            return row | {"passed": None, "why": f"needs {case.memory / 1e9:.1f} GB of memory"}
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills uninitialised memory with NaN
    try:
        if case is None:
            return row | verdict(beyond_int32(backend, on))
        torch.set_float32_matmul_precision(case.precision)
        reason = backend.rejects(_call(case, on))
        if reason is not None:
            return row | {"passed": None, "why": reason}
        run = Run(backend, case, on)
        if what in BITWISE:
            passed = BITWISE[what](run, on)
            return row | {"passed": passed, "why": None if passed else "results differ bitwise"}
        return row | verdict(clusters(run, on) if what == "clusters" else run.check())
    except Skipped as reason:
        return row | {"passed": None, "why": str(reason)}
    except Exception as error:
        found_wrong = None if what in QUESTIONS else False
        why = f"{type(error).__name__}: {error}"
        return row | {"passed": found_wrong, "why": why, "trace": traceback.format_exc()}


def verdict(errors: dict[str, tuple[float, float]]) -> dict[str, Any]:
    wrong = criterion.faults(errors)
    return {"passed": not wrong, "why": "; ".join(wrong) or None, "errors": errors}


def run_one(payload: Payload, on: torch.device) -> Iterator[dict[str, Any]]:
    yield attempt(payload, on)
