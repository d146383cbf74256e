"""What machine this is, and its ceilings: copy bandwidth, L2 bandwidth, matrix rate, launch latency.

python bench/gpu_environment.py --out environment.jsonl

Also :class:`Clocks`, for other scripts to log the clocks by while they measure. Nothing here changes a setting.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import nsc_kernels
from gpu_common import Rows, arguments, captured, device, microseconds, own_stream, quantiles, synchronize


def nvidia_smi() -> str | None:
    fields = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


# What nvidia-smi is asked for, and the names in the rows.
CLOCKS = {"sm_mhz": "clocks.sm", "mem_mhz": "clocks.mem", "watts": "power.draw", "celsius": "temperature.gpu"}


class Clocks:
    """The GPU's clocks, power and temperature ten times a second, while the block runs, added to a JSONL file.

    nvidia-smi reads them in a process of its own. Where it cannot there are no samples.
    """

    def __init__(self, path: Path, on: torch.device):
        self._path, self._on = path, on
        self._process: subprocess.Popen[str] | None = None
        self._samples: list[tuple[float, float]] = []  # monotonic time, MHz of the processors

    def __enter__(self) -> Clocks:
        if self._on.type == "cuda":
            which = f"--id=GPU-{torch.cuda.get_device_properties(self._on).uuid}"
            query = f"--query-gpu={','.join(CLOCKS.values())}"
            command = ["nvidia-smi", which, query, "--format=csv,noheader,nounits", "-lms", "100"]
            try:
                self._process = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, text=True
                )
            except OSError:
                return self
            threading.Thread(target=self._read, args=(self._process,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _read(self, process: subprocess.Popen[str]) -> None:
        with self._path.open("a") as file:
            for line in process.stdout or ():
                self.add(line, file.write)

    def add(self, line: str, write: Callable[[str], Any]) -> None:
        """One line of nvidia-smi's; one that is cut off, or says that a value is not there, is left out."""
        try:
            row = dict(zip(CLOCKS, map(float, line.split(",")), strict=True))
        except ValueError:
            return
        self._samples.append((time.monotonic(), row["sm_mhz"]))
        write(json.dumps({"time": time.time(), **row}) + "\n")

    def since(self, start: float) -> float | None:
        """Median clock of the processors in MHz since ``start`` (of time.monotonic), None without a sample."""
        found = [mhz for when, mhz in self._samples if when >= start]
        return statistics.median(found) if found else None


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
    on = device(args.dry_run)
    rows = Rows(args.out)
    rows.write({"what": "environment", **facts(on), "dry_run": args.dry_run})
    with own_stream(on), Clocks(args.out.with_name("clocks.jsonl"), on):
        measure(rows, on, args.dry_run)
    print(f"{rows.count} rows in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
