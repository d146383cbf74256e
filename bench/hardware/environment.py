"""What machine this is, and its ceilings: copy bandwidth, L2 bandwidth, matrix rate, launch latency.

python -m bench.hardware.environment --out environment.jsonl

Nothing here changes a setting.
"""

from __future__ import annotations

import sys

from nsc_kernels.bench import ceilings
from nsc_kernels.bench.clocks import Clocks
from nsc_kernels.bench.environment import facts
from nsc_kernels.bench.measuring import Rows, arguments, own_stream

from .. import from_tests


def main() -> int:
    args = arguments(__doc__).parse_args()
    on = from_tests.device(args.dry_run)
    rows = Rows(args.out)
    rows.write({**facts(on), "dry_run": args.dry_run})
    with own_stream(on), Clocks(args.out.with_name("clocks.jsonl"), on):
        for row in ceilings.measured(on, ["bf16"], small=args.dry_run):
            rows.write({**row, "dry_run": args.dry_run})
    print(f"{rows.count} rows in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
