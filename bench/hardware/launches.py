"""How many kernels one forward and one backward launch, as the profiler sees them.

python -m bench.hardware.launches --out launches.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

import nsc_kernels as nk
from nsc_kernels.bench.measuring import synchronize
from nsc_kernels.bench.problem import Problem
from nsc_kernels.bench.shapes import Shape
from nsc_kernels.bench.trials import Trial, add_backends, available, results, supervise, trial_arguments

from .. import from_tests
from .layers import DRY_RUN, SHAPES

TOKENS = (256, 6304, 16384)  # of the shapes that are tried: few, many at a large rank, very many


class What(NamedTuple):
    """The payload of a trial."""

    backend: str
    shape: Shape
    direction: str


def launched(run: Callable[[], Any], on: torch.device) -> list[str]:
    """Names of the kernels, copies and fills on the device's timeline during one warm call."""
    for _ in range(3):
        run()
    synchronize(on)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on.type == "cuda" else [])]
    with profile(activities=activities) as found:
        run()
        synchronize(on)
    return [event.name for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]


def run_trial(what: What, on: torch.device) -> Iterator[dict[str, Any]]:
    data = Problem(what.shape, on, seed=0)
    with nk.use_backend(what.backend):
        outputs = data.fused()
        kernels = launched(data.fused if what.direction == "forward" else lambda: data.backward(outputs), on)
    yield {"direction": what.direction, **what.shape._asdict(), "launches": len(kernels), "kernels": kernels}


def trials(args: argparse.Namespace) -> dict[str, Trial]:
    shapes = [DRY_RUN] if args.dry_run else [shape for shape in SHAPES if shape.T in TOKENS]
    return {
        f"{backend} {direction} {shape.name} T={shape.T} R={shape.R}": Trial(
            backend, What(backend, shape, direction), limit=30
        )
        for backend in available(args.backends)
        for shape in shapes
        for direction in ("forward", "backward")
    }


def main() -> int:
    parser = trial_arguments(__doc__)
    add_backends(parser)
    args = parser.parse_args()
    outcome = supervise(args, trials(args), run_trial, from_tests.device)
    counted = [row for row in results(args.out) if "launches" in row and row["backend"] in args.backends]
    for row in counted:
        print(f"{row['trial']}: {row['launches']} launches {row['kernels']}")
    print(outcome)
    several = any(row["launches"] != 1 for row in counted)
    return 1 if several and not args.dry_run else outcome.code


if __name__ == "__main__":
    sys.exit(main())
