"""Speed of the fused operator on the machine at hand, against what people run: a table, and the rows as JSON lines.

    python -m nsc_kernels.bench --quick                a few layers, to have a figure soon
    python -m nsc_kernels.bench                        every layer of the table
    python -m nsc_kernels.bench --out bench-results    also leaves the rows there

With a CUDA device its backends are measured, by nsc_kernels.bench.operator_gpu, and run again with the same --out it
goes on where it stopped; without one the CPU's, by nsc_kernels.bench.operator_cpu. Both have more options of their own.

Exits with 0 if all was measured, with 1 if no backend is available or a trial failed, with 3 if trials are left to
another run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

import nsc_kernels as nk

from . import gpu_tables, operator_cpu
from .timing import wait_passively

QUICK_SECONDS = 40  # after which a quick run starts no new trial on a GPU


def on_cpu(quick: bool, out: Path | None) -> int:
    options = ["--grid", "quick", "--seconds", "0.1"] if quick else ["--grid", "required"]
    return operator_cpu.main([*options, *(["--out", str(out)] if out else [])])


def on_gpu(quick: bool, folder: Path) -> int:
    command = [sys.executable, "-m", "nsc_kernels.bench.operator_gpu", "--out", str(folder / "bench.jsonl")]
    command += ["--quick", "--seconds", str(QUICK_SECONDS)] if quick else []
    code = subprocess.run(command, check=False).returncode
    gpu_tables.print_speed(folder, gpu_tables.print_ceilings(folder))
    return code


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m nsc_kernels.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few layers, and nothing that compiles for long")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to leave the rows; nowhere unless given")
    arguments = parser.parse_args(argv)
    found = nk.available_backends()
    measured = ("triton", "cuda") if torch.cuda.is_available() else ("cpu",)
    if not any(found[name] is True for name in measured):
        print("nothing to measure: " + "; ".join(f"{name}: {found[name]}" for name in measured), file=sys.stderr)
        return 1
    if not torch.cuda.is_available():
        return on_cpu(arguments.quick, arguments.out)
    if arguments.out:
        return on_gpu(arguments.quick, arguments.out)
    with tempfile.TemporaryDirectory() as folder:
        return on_gpu(arguments.quick, Path(folder))


if __name__ == "__main__":
    wait_passively()
    raise SystemExit(main())
