"""A few forwards and backwards of one shape with one backend, for a profiler to look at.

ncu -k regex:merged_lora -s 4 -c 2 python -m bench.hardware.one_shape triton 1

    BACKEND INDEX    which backend, and which of problem.SHAPES
"""

from __future__ import annotations

import argparse
import sys

import nsc_kernels as nk
from nsc_kernels.bench.measuring import device, own_stream, synchronize
from nsc_kernels.bench.problem import Problem

from .layers import SHAPES


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", choices=("triton", "cuda"))
    parser.add_argument("index", type=int)
    parser.add_argument("--calls", type=int, default=4)
    args = parser.parse_args()
    on = device(dry_run=False)
    with own_stream(on), nk.use_backend(args.backend):
        data = Problem(SHAPES[args.index], on, seed=0)
        for _ in range(args.calls):
            data.backward(data.fused())
        synchronize(on)
    return 0


if __name__ == "__main__":
    sys.exit(main())
