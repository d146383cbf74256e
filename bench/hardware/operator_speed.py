"""nsc_kernels.bench.operator_gpu as it is, but for its dry run, which computes as the tests do.

python -m bench.hardware.operator_speed --out bench.jsonl [--dry-run]
"""

from __future__ import annotations

import sys

from nsc_kernels.bench import operator_gpu

from .. import from_tests

if __name__ == "__main__":
    sys.exit(operator_gpu.main(from_tests.device))
