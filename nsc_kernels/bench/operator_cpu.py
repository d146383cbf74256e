"""The fused CPU operator against eager PyTorch, torch.compile and PEFT's loop, forward and backward.

    python -m nsc_kernels.bench.operator_cpu --out bench/results/cpu     the whole grid, a table, and JSONL

Contenders are interleaved in one process and compared by medians. One thread unless --threads says otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import nsc_kernels as nk
from nsc_kernels import native
from nsc_kernels.backends import cpu as backend

from .cpu_contenders import Data, Shape, concatenated, fused, peft_loop
from .timing import interleaved, keep_freed_memory, wait_passively

REQUIRED = [Shape(T, 768, R, 4) for R in (64, 96, 320) for T in (32, 512, 4096)]
LOOP = [Shape(T, 768, 96, 6) for T in (32, 512, 4096)]
WIDE = [
    Shape(T, d, R, 4)
    for d in (768, 1024, 4096)
    for R in (16, 64, 96, 192, 320, 512)
    for T in (1, 32, 512, 4096)
    if T * d * R < 2**33
]
QUICK = [Shape(32, 768, 96, 4), Shape(512, 768, 96, 4), Shape(32, 768, 96, 6)]
GRIDS = {
    "quick": QUICK,
    "required": REQUIRED + LOOP,
    "all": REQUIRED + LOOP + [shape for shape in WIDE if shape not in REQUIRED],
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def contenders(shape: Shape, dtype: torch.dtype, compiled: bool) -> dict[str, dict[str, Callable[[], object]]]:
    data = Data.random(shape, dtype)
    runs = {"fused": fused(data), "eager": concatenated(data)}
    if compiled:
        runs["compiled"] = concatenated(data, compiled=True)
    if shape in LOOP:
        runs["peft_loop"] = peft_loop(data)
    return runs


def measure(shape: Shape, dtype: str, compiled: bool, seconds: float) -> Iterator[dict[str, Any]]:
    runs = contenders(shape, DTYPES[dtype], compiled)
    for direction in ("forward", "backward"):
        times = interleaved({name: run[direction] for name, run in runs.items()}, seconds)
        yield {
            "op": "merged_lora_nsc",
            "direction": direction,
            "dtype": dtype,
            "T": shape.T,
            "d": shape.d,
            "R": shape.R,
            "K": shape.K,
            "threads": torch.get_num_threads(),
            "seconds": times,
            "speedup": {name: times[name] / times["fused"] for name in times if name != "fused"},
            "gflops": 4e-9 * shape.T * shape.d * shape.R / times["fused"],
        }


def overhead(seconds: float) -> dict[str, Any]:
    """One forward and backward on inputs so small that only the way to the kernels is timed."""
    bank = nk.AdapterBank.from_factors(
        [torch.randn(2, 16) for _ in range(4)], [torch.randn(16, 2) for _ in range(4)]
    )
    z, lam = torch.randn(4, 16, requires_grad=True), torch.rand(4, requires_grad=True)
    base, dy = torch.randn(4, 16), torch.ones(4, 16)

    class Bare(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Any, lam: Any) -> Any:
            y, _, _, u = backend.native_forward(z, bank.A, bank.Bt, bank.offsets, lam, base, False, True)
            ctx.save_for_backward(u, lam)
            return y

        @staticmethod
        def backward(ctx: Any, dy: Any) -> Any:
            u, lam = ctx.saved_tensors
            return backend.native_backward(
                dy, None, None, u, None, bank.A, bank.Bt, bank.offsets, lam, None, True, True
            )

    times = interleaved(
        {
            "merged_lora": lambda: torch.autograd.grad(nk.merged_lora(z, bank, lam, base), (z, lam), dy),
            "bare_function": lambda: torch.autograd.grad(Bare.apply(z, lam), (z, lam), dy),
        },
        seconds,
    )
    return {"op": "overhead", "seconds": times, "ratio": times["merged_lora"] / times["bare_function"]}


def peak_gflops() -> dict[str, float] | None:
    """What one core can do with nothing to load (fma_peak.cpp), or None without a compiler for this processor."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "fma_peak"
        source = Path(__file__).parent / "fma_peak.cpp"
        try:
            subprocess.run(["c++", "-O2", "-march=native", source, "-o", program], check=True, capture_output=True)
            return json.loads(subprocess.run([program], check=True, capture_output=True).stdout)
        except (OSError, subprocess.CalledProcessError):
            return None


def source_hash() -> str | None:
    """Of the sources that the measured kernels were compiled from; None where only the package is installed."""
    files = [path for path in sorted((Path(__file__).parents[2] / "csrc").rglob("*")) if path.is_file()]
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16] if files else None


def environment() -> dict[str, Any]:
    model = "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        model = f"{fields.get('model name')} family {fields.get('cpu family')} model {fields.get('model')}"
    return {
        "op": "environment",
        "cpu": model,
        "instruction_set": native.cpu_instruction_sets()[:1],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "nsc_kernels": nk.__version__,
        "source": source_hash(),
        "peak_gflops": peak_gflops(),
        "load": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
    }


def line(row: dict[str, Any]) -> str:
    speedups = "  ".join(f"{name} {ratio:5.2f}x" for name, ratio in row["speedup"].items())
    return (
        f"{row['dtype']:8} {row['direction']:8} T={row['T']:<5} d={row['d']:<5} R={row['R']:<4} K={row['K']:<2}"
        f" {1e6 * row['seconds']['fused']:10.1f} us {row['gflops']:6.1f} GFLOP/s   {speedups}"
    )


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table of the required shapes: speed against each contender, forward / backward."""
    pairs: dict[tuple[str, Shape], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["op"] == "merged_lora_nsc":
            shape = Shape(row["T"], row["d"], row["R"], row["K"])
            pairs.setdefault((row["dtype"], shape), {})[row["direction"]] = row
    lines = ["| dtype | T | d | R | K | GFLOP/s | against eager | compiled | PEFT's loop |", "|" + "---|" * 9]
    for (dtype, s), both in pairs.items():
        if s not in REQUIRED + LOOP:
            continue

        def ratios(name: str, both: dict[str, dict[str, Any]] = both) -> str:
            found = [both[direction]["speedup"].get(name) for direction in ("forward", "backward")]
            return "" if None in found else " / ".join(f"{ratio:.2f}×" for ratio in found)

        rates = " / ".join(f"{both[direction]['gflops']:.0f}" for direction in ("forward", "backward"))
        cells = [dtype, s.T, s.d, s.R, s.K, rates, ratios("eager"), ratios("compiled"), ratios("peft_loop")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for operator.jsonl")
    parser.add_argument("--seconds", type=float, default=0.3, help="per contender and shape (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--grid", choices=GRIDS, default="all", help="quick: three shapes, nothing compiled")
    parser.add_argument("--table", type=Path, metavar="JSONL", help="only print earlier results as Markdown")
    arguments = parser.parse_args(argv)
    if arguments.table:
        print(markdown([json.loads(text) for text in arguments.table.read_text().splitlines()]))
        return 0
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    rows = [environment(), overhead(3 * arguments.seconds)]
    print(json.dumps(rows[0]))
    print(f"overhead of a forward and backward: {rows[1]['ratio']:.2f}x a bare autograd.Function")
    for dtype in DTYPES:
        for shape in GRIDS[arguments.grid]:
            compiled = shape in REQUIRED and arguments.grid != "quick"
            for row in measure(shape, dtype, compiled, arguments.seconds):
                rows.append(row)
                print(line(row), flush=True)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        name = f"operator-{arguments.threads}-thread.jsonl"
        temporary = arguments.out / f".{name}.tmp"
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        temporary.replace(arguments.out / name)
        print(f"wrote {arguments.out / name}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    wait_passively()
    raise SystemExit(main())
