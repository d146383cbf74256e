"""Correctness of the GPU backends on the hardware at hand.

    python -m bench.hardware.check --out correctness.jsonl [--backends triton cuda] [--workers 13] [--seconds 400]
    python -m bench.hardware.check --out memcheck.jsonl --smallest    one case in this process, for compute-sanitizer

Every case runs forward and backward against float64 on the GPU, with memory poisoned by NaN, and is held to the
criterion of tests/triton_kernels/problems.py: twice the error of eager torch in the same dtype with the same rounding
points, and what matrix units that cut off may lose. Then the same inputs again, which must give the same bits, in every
way of calling (repeats.py). Trials run in processes of their own (trials.py). Exits with 1 if any trial fails, with 3
if some are left to another run.
"""

from __future__ import annotations

import itertools
import sys
import traceback
from collections.abc import Iterator
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsc_kernels import dispatch
from nsc_kernels.bench.measuring import Rows, own_stream
from nsc_kernels.bench.trials import Trial, add_backends, available, supervise, trial_arguments
from nsc_kernels.contract import BackwardCall, Call, ForwardCall

from .. import from_tests
from .check_cases import R16, SMALLEST, TRIED, UNEQUAL, Case, cases
from .repeats import BITWISE, QUESTIONS, Skipped, wait_for_memory

problems = from_tests.problems()


class Run:
    """One case on one backend."""

    def __init__(self, backend: ModuleType | SimpleNamespace, case: Case, on: torch.device, seed: int = 0):
        self.backend, self.case = backend, case
        dtype = getattr(torch, case.dtype)
        self.p = problems.problem(case.T, case.d_in, case.d_out, case.ranks, dtype, on, per_row=case.per_row, seed=seed)

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
        names = (*problems.FORWARD, *problems.BACKWARD)
        return {name: t for name, t in zip(names, (*forward, *backward), strict=True) if t is not None}

    def check(self) -> dict[str, tuple[float, float]]:
        """Error and bound of every result. The backward is judged from this backend's u."""
        found = self()
        forward, backward = ([found.get(name) for name in names] for names in (problems.FORWARD, problems.BACKWARD))
        judged = problems.judge_forward(forward, *self._forward_call()[:6])
        return judged | problems.judge_backward(backward, *self._backward_call(found["u"])[:10])


def beyond_int32(backend: ModuleType, on: torch.device) -> dict[str, tuple[float, float]]:
    """More than 2^31 elements in z and y; the last rows must be right. About 13 GB."""
    wait_for_memory(on, 20)
    T, d = (1 << 17) + 100, 1 << 14
    p = problems.problem(1, d, d, (16,), torch.bfloat16, on)
    z = torch.randn(T, d, device=on, dtype=torch.bfloat16)
    factors = (p.A, p.Bt, p.offsets, p.lam)
    y, quad, sqnorm, u = backend.forward(ForwardCall(z, *factors, z, True, True))
    dz, _ = backend.backward(BackwardCall(y, quad, sqnorm, u, z, *factors, None, True, False))
    tail = slice(T - 200, T)
    inputs = (y[tail], quad[tail], sqnorm[tail], u[tail], z[tail], *factors, None)
    judged = problems.judge_forward((y[tail], quad[tail], sqnorm[tail], u[tail]), z[tail], *factors, z[tail])
    return judged | problems.judge_backward((dz[tail], None), *inputs, need_dlam=False)


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
    row: dict[str, Any] = {"backend": name, "what": what, "case": None if case is None else case._asdict()}
    if on.type == "cuda":
        found = torch.cuda.get_device_properties(on)
        row |= {"device": found.name, "arch": f"sm_{10 * found.major + found.minor}"}
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills uninitialised memory with NaN
    try:
        if case is None:
            return row | verdict(beyond_int32(backend, on))
        torch.set_float32_matmul_precision(case.precision)
        run = Run(backend, case, on)
        reason = backend.rejects(Call(on, run.p.z.dtype, case.T, case.d_in, case.d_out, run.p.offsets))
        if reason is not None:
            return row | {"passed": None, "why": reason}
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
    wrong = [f"{n}: error {e:.3g}, bound {b:.3g}" for n, (e, b) in errors.items() if not e <= b]
    return {"passed": not wrong, "why": "; ".join(wrong) or None, "errors": errors}


def run_one(payload: Payload, on: torch.device) -> Iterator[dict[str, Any]]:
    yield attempt(payload, on)


def smallest(args: Any, names: list[str]) -> int:
    """One case in this process: a tool that watches a process need not follow others."""
    on, rows = from_tests.device(args.dry_run), Rows(args.out)
    found = []
    with own_stream(on):
        for name in names:
            case = TRIED[0] if args.dry_run else SMALLEST
            found.append(attempt(Payload(name, "accuracy", case), on))
            rows.write(found[-1] | {"dry_run": args.dry_run})
            print(f"{name} {case}: {found[-1]['passed']} {found[-1]['why'] or ''}", flush=True)
    return int(not found or not all(row["passed"] for row in found))


def main() -> int:
    parser = trial_arguments(__doc__)
    add_backends(parser)
    parser.add_argument("--smallest", action="store_true", help="one small case in this process")
    args = parser.parse_args()
    names = available(args.backends)
    if not names:
        print(f"none of {', '.join(args.backends)} is available")
        return 1
    if args.smallest:
        return smallest(args, names)
    outcome = supervise(args, trials(names, args.dry_run), run_one, from_tests.device)
    print(f"{', '.join(names)}: {outcome}")
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
