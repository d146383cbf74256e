"""What a machine does at best: copying, multiplying, launching. Measured beside what is compared with it."""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .costs import Ceilings
from .measuring import captured, microseconds, quantiles, synchronize
from .problem import DTYPES

SAMPLES = {"cuda": 20, "cpu": 7}
# What is timed, its unit, how much of it one call does, and the call.
Ceiling = tuple[str, str, float, Callable[[], Any]]


def copy(on: torch.device, small: bool) -> Ceiling:
    """Of 2 GiB on a GPU, 256 MiB on a CPU: more than its caches hold."""
    elements = 1 << (16 if small else 30 if on.type == "cuda" else 27)
    a = torch.ones(elements, device=on, dtype=torch.bfloat16)
    b = torch.empty_like(a)
    return "copy", "TB/s, read + written", 2 * a.nbytes, lambda: b.copy_(a)


def read(on: torch.device, small: bool) -> Ceiling:
    """Of 256 MiB. A copy falls short of it where the processor fetches what it writes over, which nobody counts."""
    a = torch.ones(1 << (15 if small else 26), device=on)
    return "read", "TB/s, read", a.nbytes, lambda: torch.dot(a, a)


def matrix(on: torch.device, small: bool, dtype: str = "bf16") -> Ceiling:
    """PyTorch's own product of square matrices."""
    side = 64 if small else 8192 if on.type == "cuda" else 1024
    p, q = (torch.randn(side, side, device=on).to(DTYPES[dtype]) for _ in range(2))
    product = torch.empty_like(p)
    return "matrix", f"TFLOP/s, {dtype}", 2 * side**3, lambda: torch.mm(p, q, out=product)


def l2_copy(on: torch.device, small: bool) -> Ceiling:
    """2 x 8 MB, which stay in the L2 of every data-centre GPU since the A100."""
    a = torch.randn(1 << (10 if small else 22), device=on, dtype=torch.bfloat16)
    b = torch.empty_like(a)
    copies = 32
    return "l2_copy", "TB/s, read + written", copies * 2 * a.nbytes, captured([lambda: b.copy_(a)] * copies, on)


def rates(found: Sequence[Ceiling], on: torch.device) -> Iterator[dict[str, Any]]:
    for what, unit, per_call, run in found:
        for _ in range(3):
            run()
        synchronize(on)
        yield {
            "what": what,
            "unit": unit,
            **quantiles([per_call / microseconds(run, on) / 1e6 for _ in range(SAMPLES[on.type])]),
        }


def launches(on: torch.device) -> Iterator[dict[str, Any]]:
    """Microseconds of the smallest call there is, from Python and, on a GPU, in a graph."""
    one, count = torch.zeros(1, device=on), 200

    def eager() -> None:
        for _ in range(count):
            one.add_(1)

    runs = {"eager_launch": eager}
    if on.type == "cuda":
        runs["graph_node"] = captured([lambda: one.add_(1)] * count, on)
    for what, run in runs.items():
        run()
        synchronize(on)
        times = quantiles([microseconds(run, on) / count for _ in range(SAMPLES[on.type])])
        yield {"what": what, "unit": "us per launch", **times}


def multiply_add() -> dict[str, Any] | None:
    """What one core can do with nothing to load (fma_peak.cpp); None without a compiler for this processor."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "fma_peak"
        source = Path(__file__).parent / "fma_peak.cpp"
        try:
            subprocess.run(["c++", "-O2", "-march=native", source, "-o", program], check=True, capture_output=True)
            found = json.loads(subprocess.run([program], check=True, capture_output=True).stdout)
        except (OSError, subprocess.CalledProcessError):
            return None
    return {"what": "multiply_add", "unit": "GFLOP/s of one core, nothing loaded", **found}


def measured(
    on: torch.device, dtypes: Sequence[str], threads: int = 0, small: bool = False
) -> Iterator[dict[str, Any]]:
    """Every ceiling of a device, in these dtypes."""
    if threads:
        torch.set_num_threads(threads)
    facts = {"threads": torch.get_num_threads() if on.type == "cpu" else 0}
    for row in rates([copy(on, small), *([read(on, small)] if on.type == "cpu" else [])], on):
        yield facts | row
    for dtype in dtypes:
        for row in rates([matrix(on, small, dtype)], on):
            yield facts | row | {"dtype": dtype}
    if on.type == "cuda":
        for row in rates([l2_copy(on, small)], on):
            yield facts | row
    for row in launches(on):
        yield facts | row


def of_rows(rows: Sequence[dict[str, Any]], dtype: str, threads: int) -> Ceilings | None:
    """The ceilings among rows of :func:`measured` and :func:`multiply_add`; None where they are not there.

    On a CPU the rate of memory is the larger of copying and of reading alone. That of products is the larger of
    PyTorch's own, which need not be good ones, and of multiply-adds that load nothing, in as many cores as threads; of
    float32, too, where there is no instruction for a narrow type.
    """
    here = [row for row in rows if row.get("threads") == threads]
    moves: dict[str, list[float]] = {}
    products: dict[str, list[float]] = {}
    for row in here:
        if row.get("what") in ("copy", "read"):
            moves.setdefault(row["what"], []).append(row["p50"])
        if row.get("what") == "matrix" and (row["dtype"] == dtype or (threads and row["dtype"] == "fp32")):
            products.setdefault(row["dtype"], []).append(row["p50"])
    rates = [statistics.median(found) for found in products.values()]
    for row in rows if threads else ():
        if row.get("what") == "multiply_add":
            of_type = row.get("bfloat16", row["float32"]) if dtype == "bf16" else row["float32"]
            rates.append(1e-3 * threads * of_type)
    memory = [statistics.median(found) for found in moves.values()]
    return Ceilings(1e12 * max(memory), 1e12 * max(rates)) if memory and rates else None
