"""Correctness of the GPU backends on the hardware at hand: ``nsc_kernels.verify``, as the stages call it.

    python -m bench.hardware.check --stage correctness --out FOLDER [--backends triton cuda] [--workers 13]
    python -m bench.hardware.check --stage launches --out FOLDER
    python -m bench.hardware.check --smallest       one case in this process, for compute-sanitizer

A dry run tries bfloat16 too, which Triton's interpreter has to be taught first.
"""

from __future__ import annotations

import sys

from nsc_kernels import verified_hardware
from nsc_kernels.bench.measuring import own_stream
from nsc_kernels.bench.trials import available
from nsc_kernels.printing import exit_status
from nsc_kernels.verify import __main__ as verify
from nsc_kernels.verify.cases import SMALLEST
from nsc_kernels.verify.check import Payload, attempt

from .. import from_tests


def smallest() -> int:
    """A tool that watches a process need not follow others."""
    on, passed = from_tests.device(dry_run=False), []
    with own_stream(on):
        for name in available(verified_hardware.BACKENDS):
            row = attempt(Payload(name, "accuracy", SMALLEST), on)
            passed.append(row["passed"] is True)
            print(f"{name} {SMALLEST}: {row['passed']} {row['why'] or ''}", flush=True)
    return int(not passed or not all(passed))


def main() -> int:
    return smallest() if sys.argv[1:] == ["--smallest"] else verify.main(meet=from_tests.device)


if __name__ == "__main__":
    sys.exit(exit_status(main))
