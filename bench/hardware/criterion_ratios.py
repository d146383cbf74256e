"""What the correctness criterion makes of a right kernel and of wrong ones: error over bound of the worst result.

    python -m bench.hardware.criterion_ratios [--large]

Runs the CUDA kernel's source with the faults of tests/cuda/test_cuda_criterion.py on the emulator, under a matrix unit
that rounds and under one that cuts off. With --large also the sums of a right kernel that cuts off, taken step by step
in NumPy on layers too large for the emulator, and what a few faults would change: some minutes. Needs a C++ compiler.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from nsc_kernels import reference
from nsc_kernels.verify.check import Run
from nsc_kernels.verify.criterion import judge_backward, judge_forward
from nsc_kernels.verify.problems import problem

from .. import from_tests

harness = from_tests.module("cuda/harness.py")
interpreter_bf16 = from_tests.module("triton_kernels/interpreter_bf16.py")
planted = from_tests.module("cuda/test_cuda_criterion.py")

CPU = torch.device("cpu")


def emulated() -> None:
    with tempfile.TemporaryDirectory() as name:
        faulty = planted.build_faulty(Path(name))
        for unit in harness.UNITS:
            for number, fault in enumerate(("the kernel as it is", *(fault.what for fault in planted.FAULTS))):
                faulty.fault.value, faulty.unit, faulty.cluster = number, unit, 2
                found = []
                for case in planted.CASES[:2]:
                    ratios = planted.worst(Run(faulty.backend(), case, CPU))
                    worst = max(ratios, key=lambda name: ratios[name])
                    found.append(f"{worst} {ratios[worst]:.4g}")
                print(f"{unit:<12} {fault:<26} {'   '.join(found)}", flush=True)


def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """``x @ w^T`` by a unit that cuts off, a few hundred rows at a time."""
    rows = [interpreter_bf16.truncated_dot(t.float().numpy(), w.float().numpy().T, 0.0) for t in x.split(256)]
    return torch.cat([torch.from_numpy(t) for t in rows])


def simulated() -> None:
    for T, d, K in ((6304, 768, 20), (2048, 4096, 6), (512, 16384, 1)):
        p = problem(T, d, d, (16,) * K, torch.bfloat16, CPU)
        u = product(p.z, p.A)
        saved = u.bfloat16().float()
        forward = (p.z, p.A, p.Bt, p.offsets, p.lam, p.base)
        terms = reference.gather(saved * product(p.dy, p.Bt), p.offsets)
        backward = (p.dy, p.dquad, p.dsqnorm, u.bfloat16(), p.z, p.A, p.Bt, p.offsets, p.lam, None)
        for what, sums in (("cut off", u), ("u rounded before quad", saved)):
            quad = reference.gather(sums.square(), p.offsets)
            error, bound = judge_forward((None, quad, None, None), *forward)["quad"]
            print(f"T={T} d={d} K={K} quad, {what}: {error / bound:.3g}", flush=True)
        for what, kept in (("cut off", T), ("one tile of 64 missing", T - 64), ("one token missing", T - 1)):
            found = (None, terms[:kept].sum(0))
            error, bound = judge_backward(found, *backward, need_dz=False)["dlam"]
            print(f"T={T} d={d} K={K} dlam, {what}: {error / bound:.3g}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="also the sums of larger layers")
    args = parser.parse_args()
    emulated()
    if args.large:
        simulated()
    return 0


if __name__ == "__main__":
    sys.exit(main())
