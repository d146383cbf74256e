"""Time and memory of every merge method that needs no data, on adapters of a model as large as LLaMA-3-8B.

    python -m bench.merging.method_costs --out bench/results/cpu              a table, and methods.jsonl
    python -m bench.merging.method_costs --layers 4 --methods ties emr        quicker; times are then of 4 layers

Six rank-16 adapters with random factors on q (4096 x 4096) and v (1024 x 4096) of 32 layers, float32, one thread. Each
method runs once in a process of its own, one module after another; an update is dropped as soon as it is there, as one
would who writes it to a file. "peak" is the highest resident set of that process, with torch and the adapters; "update"
is what comes on top if the merged updates are kept, as nsc_merge.merge does. EMR computes the update of a task when it
is asked for, here those of all six tasks in every module, and keeps none.

Those that have a dense definition without factors are also run that way (--dense), on one q and one v instead of all
layers, and their time is multiplied by the number of layers. "ratio" is dense by ours, both of these two modules alone,
by processor time, which a busy machine disturbs less. "differs" is how far apart the two results are (Frobenius,
relative): trimming turns rounding into entries that one of them keeps and the other does not.

Dense contenders:
    svd         SVD of the summed updates, float32, cut at rank 16
    knots_ties  SVD of all updates next to one another (d_out x 6 d_in), float64, then TIES on the aligned vectors
    ties        all updates in memory at once, k-th magnitude of each by selection
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor, nn

from bench.merging.cost_rows import environment, write_rows
from nsc_kernels.bench.resident_memory import peak, reset_peak, resident
from nsc_merge.adapters import Adapter, Factor
from nsc_merge.methods import METHODS, Problem

TASKS, RANK, WIDTH = 6, 16, 4096
SHAPES = {"q_proj": (WIDTH, WIDTH), "v_proj": (1024, WIDTH)}
OPTIONS: dict[str, dict[str, Any]] = {"svd": {"rank": RANK}}
NAMES = [method.name for method in METHODS.values() if method.updates or method.name == "emr"]
# What the project set out to reach.
LEAST_RATIO = {"knots_ties": 50}
MOST_BYTES = 8e9


def adapters_of(layers: int) -> dict[str, Adapter]:
    generator = torch.Generator().manual_seed(0)

    def factor(d_out: int, d_in: int) -> Factor:
        A = torch.randn(RANK, d_in, generator=generator) / d_in**0.5
        return Factor(A, 0.02 * torch.randn(d_out, RANK, generator=generator), 2.0)

    paths = {f"layers.{layer}.{name}": shape for layer in range(layers) for name, shape in SHAPES.items()}
    return {
        name: Adapter(name, {path: factor(*shape) for path, shape in paths.items()})
        for name in (f"task{k}" for k in range(TASKS))
    }


def model_of(layers: int) -> nn.Module:
    """The linears that the adapters are for, without weights."""
    model = nn.Module()
    meta: dict[str, Any] = {"bias": False, "device": "meta"}
    model.layers = nn.ModuleList(
        nn.ModuleDict({name: nn.Linear(d_in, d_out, **meta) for name, (d_out, d_in) in SHAPES.items()})
        for _ in range(layers)
    )
    return model


def streamed(name: str, adapters: Mapping[str, Adapter], layers: int) -> Iterator[Factor]:
    """Every module's update; of EMR every task's."""
    method, options = METHODS[name], OPTIONS.get(name, {})
    paths = [f"layers.{layer}.{module}" for layer in range(layers) for module in SHAPES]
    if method.updates is not None:
        for _, factor in method.updates(adapters, paths, method.options(**options)):
            yield factor
        return
    result = method.run(Problem(model_of(layers), dict(adapters)), options)
    for path in paths:
        for task in result.tasks:
            yield result.per_task[task][path]


def size(factor: Factor) -> int:
    return sum(tensor.nbytes for tensor in (factor.A, factor.B, factor.dense) if tensor is not None)


def measure(name: str, layers: int) -> dict[str, Any]:
    """One pass over all layers, in this process."""
    adapters = adapters_of(layers)
    before = resident()
    reset_peak()
    kept = 0
    wall, processor = time.perf_counter(), time.process_time()
    for factor in streamed(name, adapters, layers):
        kept += size(factor) if METHODS[name].updates is not None else 0
        del factor
    return {
        "op": "method",
        "method": name,
        "options": OPTIONS.get(name, {}),
        "layers": layers,
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - processor,
        "peak_bytes": peak(),
        "added_bytes": peak() - before,
        "update_bytes": kept,
        "load": os.getloadavg()[0],
    }


def dense_svd(updates: Sequence[Tensor], options: Any) -> Tensor:
    total = torch.stack(list(updates)).sum(0).float()
    left, sigma, right = torch.linalg.svd(total, full_matrices=False)
    return options.scale * (left[:, : options.rank] * sigma[: options.rank]) @ right[: options.rank]


def dense_ties(updates: Sequence[Tensor], options: Any) -> Tensor:
    kept = []
    for update in updates:
        magnitudes = update.abs()
        rank = max(1, update.numel() - int(options.density * update.numel()))
        kept.append(torch.where(magnitudes >= magnitudes.flatten().kthvalue(rank).values, update, 0.0))
    stack = torch.stack(kept)
    signs = stack.sum(0).sign()
    agrees = (stack.sign() == signs) & (stack != 0)
    return options.scale * (stack * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def dense_knots_ties(updates: Sequence[Tensor], options: Any) -> Tensor:
    left, sigma, right = torch.linalg.svd(torch.cat(list(updates), 1).double(), full_matrices=False)
    kept = int((sigma > options.atol).sum())
    parts = (sigma[:kept, None] * right[:kept]).split(updates[0].shape[1], 1)
    return left[:, :kept] @ dense_ties(parts, options)


DENSE: dict[str, Callable[[Sequence[Tensor], Any], Tensor]] = {
    "svd": dense_svd,
    "knots_ties": dense_knots_ties,
    "ties": dense_ties,
}


def measure_dense(name: str, module: str) -> dict[str, Any]:
    """One module of one layer by factors and densely, in this process."""
    path = f"layers.0.{module}"
    adapters = {task: Adapter(task, {path: adapter.factors[path]}) for task, adapter in adapters_of(1).items()}
    options = METHODS[name].options(**OPTIONS.get(name, {}))
    updates_of = METHODS[name].updates
    assert updates_of is not None
    taken = []
    for _ in range(4):
        start = time.process_time()
        ((_, ours),) = updates_of(adapters, [path], options)
        taken.append(time.process_time() - start)
    reset_peak()
    wall, processor = time.perf_counter(), time.process_time()
    updates = [adapter.factors[path].delta() for adapter in adapters.values()]
    found = DENSE[name](updates if name == "knots_ties" else [update.float() for update in updates], options)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    expected = ours.delta()
    return {
        "op": "dense",
        "method": name,
        "module": module,
        "shape": SHAPES[module],
        "ours_cpu_seconds": statistics.median(taken[1:]),
        "seconds": wall,
        "cpu_seconds": processor,
        "peak_bytes": peak(),
        "relative_difference": float((found.double() - expected).norm() / expected.norm()),
        "load": os.getloadavg()[0],
    }


def child(arguments: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.merging.method_costs", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def summary(name: str, rows: Sequence[Mapping[str, Any]], layers: int) -> str:
    row = next(row for row in rows if row["op"] == "method" and row["method"] == name)
    line = (
        f"{name:17} {row['seconds']:8.1f}s {row['cpu_seconds']:8.1f}s {row['peak_bytes'] / 1e9:7.2f} GB "
        f"{row['update_bytes'] / 1e9:7.2f} GB"
    )
    dense = [row for row in rows if row["op"] == "dense" and row["method"] == name]
    if not dense:
        return line
    theirs, ours = (sum(row[key] for row in dense) for key in ("cpu_seconds", "ours_cpu_seconds"))
    return (
        f"{line} {layers * theirs:9.0f}s {theirs / ours:7.1f}x {max(row['peak_bytes'] for row in dense) / 1e9:7.2f} GB "
        f"{max(row['relative_difference'] for row in dense):9.1e}"
    )


def missed(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Targets that were not reached."""
    for row in rows:
        if row["op"] == "method" and row["peak_bytes"] + row["update_bytes"] > MOST_BYTES:
            kept = row["peak_bytes"] + row["update_bytes"]
            yield f"{row['method']}: {kept / 1e9:.1f} GB with its updates kept, more than {MOST_BYTES / 1e9:.0f}"
    for name, least in LEAST_RATIO.items():
        dense = [row for row in rows if row["op"] == "dense" and row["method"] == name]
        ratio = sum(row["cpu_seconds"] for row in dense) / max(sum(row["ours_cpu_seconds"] for row in dense), 1e-9)
        if dense and ratio < least:
            yield f"{name}: {ratio:.1f} times as fast as densely, less than {least}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for methods.jsonl")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=NAMES, metavar="METHOD")
    parser.add_argument("--dense", nargs="*", choices=DENSE, default=list(DENSE), help="default: all; none if empty")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--measure-dense", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.layers)))
        return 0
    if arguments.measure_dense:
        print(json.dumps(measure_dense(*arguments.measure_dense)))
        return 0
    rows = [
        environment(threads=arguments.threads, tasks=TASKS, rank=RANK, shapes=SHAPES, layers=arguments.layers)
    ]
    print(
        f"{'':17} {'wall':>9} {'cpu':>9} {'peak':>10} {'update':>10} {'dense':>10} {'ratio':>8} {'peak':>10} "
        f"{'differs':>9}"
    )
    shared = ["--threads", str(arguments.threads)]
    for name in arguments.methods:
        rows.append(child(["--measure", name, "--layers", str(arguments.layers), *shared]))
        if name in arguments.dense:
            rows.extend(child(["--measure-dense", name, module, *shared]) for module in SHAPES)
        print(summary(name, rows, arguments.layers), flush=True)
    for line in missed(rows):
        print(f"missed: {line}")
    if arguments.out:
        write_rows(arguments.out / "methods.jsonl", rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
