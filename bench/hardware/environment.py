"""What machine this is, and its ceilings: copy bandwidth, L2 bandwidth, matrix rate, launch latency.

python -m bench.hardware.environment --out environment.jsonl

Nothing here changes a setting.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

import nsc_kernels
from nsc_kernels.bench.gpu_clocks import Clocks
from nsc_kernels.bench.gpu_measuring import Rows, arguments, captured, microseconds, own_stream, quantiles, synchronize

from .. import from_tests


def nvidia_smi() -> str | None:
    fields = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


# What is timed, its unit, how much of it one call does, and the call.
Ceiling = tuple[str, str, float, Callable[[], Any]]


def copy(on: torch.device, small: bool) -> Ceiling:
    a = torch.randn((1 << 16) if small else (1 << 30), device=on, dtype=torch.bfloat16)
    b = torch.empty_like(a)
    return "copy", "TB/s, read + written", 2 * a.nbytes, lambda: b.copy_(a)


def matrix(on: torch.device, small: bool) -> Ceiling:
    side = 64 if small else 8192
    p, q = (torch.randn(side, side, device=on, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(p)
    return "matrix", "TFLOP/s, bf16", 2 * side**3, lambda: torch.mm(p, q, out=product)


def l2_copy(on: torch.device, small: bool) -> Ceiling:
    """2 x 8 MB, which stay in the L2 of every data-centre GPU since the A100."""
    a = torch.randn(1 << (10 if small else 22), device=on, dtype=torch.bfloat16)
    b = torch.empty_like(a)
    copies = 32
    return "l2_copy", "TB/s, read + written", copies * 2 * a.nbytes, captured([lambda: b.copy_(a)] * copies, on)


def facts(on: torch.device) -> dict[str, Any]:
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton_version,
        "nsc_kernels": nsc_kernels.__version__,
        "backends": nsc_kernels.available_backends(),
        "nvidia_smi": nvidia_smi(),
    }
    if on.type == "cuda":
        properties = torch.cuda.get_device_properties(on)
        found |= {
            "device": properties.name,
            "arch": f"sm_{10 * properties.major + properties.minor}",
            "processors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
        }
    return found


def measure(rows: Rows, on: torch.device, dry_run: bool) -> None:
    for ceiling in (copy, matrix, l2_copy):
        what, unit, per_call, run = ceiling(on, dry_run)
        for _ in range(3):
            run()
        synchronize(on)
        rates = quantiles([per_call / microseconds(run, on) / 1e6 for _ in range(20)])
        rows.write({"what": what, "unit": unit, **rates, "dry_run": dry_run})
        del run

    one, launches = torch.zeros(1, device=on), 200

    def eager() -> None:
        for _ in range(launches):
            one.add_(1)

    for what, run in (("eager_launch", eager), ("graph_node", captured([lambda: one.add_(1)] * launches, on))):
        run()
        synchronize(on)
        times = quantiles([microseconds(run, on) / launches for _ in range(20)])
        rows.write({"what": what, "unit": "us per launch", **times, "dry_run": dry_run})


def main() -> int:
    args = arguments(__doc__).parse_args()
    on = from_tests.device(args.dry_run)
    rows = Rows(args.out)
    rows.write({"what": "environment", **facts(on), "dry_run": args.dry_run})
    with own_stream(on), Clocks(args.out.with_name("clocks.jsonl"), on):
        measure(rows, on, args.dry_run)
    print(f"{rows.count} rows in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
