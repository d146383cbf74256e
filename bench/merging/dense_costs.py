"""Time and memory of the methods that look at single entries, on factors and on dense updates, in one table.

    python -m bench.merging.dense_costs --out bench/results/cpu               dense-costs.jsonl, and a table
    python -m bench.merging.dense_costs --shapes 1024x4096 --tasks 6          quicker

K rank-16 adapters with random factors on one linear, float32. "ours" is what nsc_merge.merge calls; "dense" is the
method on whole matrices in plain PyTorch, all updates of the module in memory at once. EMR computes the updates of all
tasks, one after another. In a process of its own for every shape, number of tasks and of threads, the two run in turns;
seconds are medians, "peak" is the most that the resident set grows while one runs. "ratio" is dense by ours, by
processor time, which a busy machine disturbs less; with several threads by wall time too.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
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
from nsc_merge.methods.task_vectors.fr_merging import FROptions, kept_frequencies

RANK = 16
DROP, DENSITY = 0.9, 0.2


def adapters_of(shape: tuple[int, int], tasks: int) -> dict[str, Adapter]:
    generator = torch.Generator().manual_seed(0)
    rows, columns = shape

    def factor() -> Factor:
        A = torch.randn(RANK, columns, generator=generator) / columns**0.5
        return Factor(A, 0.02 * torch.randn(rows, RANK, generator=generator), 2.0)

    return {name: Adapter(name, {"linear": factor()}) for name in (f"task{k}" for k in range(tasks))}


def ours(name: str, adapters: Mapping[str, Adapter]) -> Iterator[Tensor | None]:
    method = METHODS[name]
    if method.updates is not None:
        for _, factor in method.updates(adapters, ["linear"], method.options()):
            yield factor.dense
        return
    model = nn.Module()
    rows, columns = next(iter(adapters.values())).factors["linear"].delta().shape
    model.linear = nn.Linear(columns, rows, bias=False, device="meta")
    result = method.run(Problem(model, dict(adapters)), {})
    for task in result.tasks:
        yield result.per_task[task]["linear"].dense


def dense_updates(adapters: Mapping[str, Adapter]) -> list[Tensor]:
    factors = [adapter.factors["linear"] for adapter in adapters.values()]
    return [factor.scaling * factor.B @ factor.A for factor in factors]


def trimmed(update: Tensor) -> Tensor:
    magnitudes = update.abs()
    rank = max(1, update.numel() - int(DENSITY * update.numel()))
    return torch.where(magnitudes >= magnitudes.flatten().kthvalue(rank).values, update, 0.0)


def elected(updates: Sequence[Tensor]) -> Tensor:
    stack = torch.stack(list(updates))
    agrees = (stack.sign() == stack.sum(0).sign()) & (stack != 0)
    return (stack * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def dropped(update: Tensor) -> Tensor:
    return update * (torch.rand(update.shape) >= DROP) / (1 - DROP)


def dense_ties(updates: list[Tensor]) -> Iterator[Tensor]:
    yield elected([trimmed(update) for update in updates])


def dense_dare(updates: list[Tensor]) -> Iterator[Tensor]:
    yield torch.stack([dropped(update) for update in updates]).sum(0)


def dense_dare_ties(updates: list[Tensor]) -> Iterator[Tensor]:
    yield elected([trimmed(dropped(update)) for update in updates])


def unified(updates: list[Tensor]) -> tuple[Tensor, Tensor]:
    stack = torch.stack(updates)
    signs = torch.where(stack.sum(0) > 0, 1.0, -1.0)
    return (stack * signs).clamp(min=0).amax(0) * signs, signs


def dense_emr_unified(updates: list[Tensor]) -> Iterator[Tensor]:
    yield unified(updates)[0]


def dense_emr(updates: list[Tensor]) -> Iterator[Tensor]:
    whole, signs = unified(updates)
    for update in updates:
        masked = whole * (update * signs > 0)
        yield update.abs().mean() / masked.abs().mean() * masked


def dense_fr(updates: list[Tensor]) -> Iterator[Tensor]:
    options = FROptions()
    counted = kept_frequencies(updates[0].shape, options)
    filtered = [torch.fft.ifft2(torch.fft.fft2(update) * counted).real for update in updates]
    means = [update.abs().mean() for update in filtered]
    yield 0.7 * torch.stack(
        [update * (max(means) / mean) for update, mean in zip(filtered, means, strict=True)]
    ).sum(0)


DENSE: dict[str, Callable[[list[Tensor]], Iterator[Tensor]]] = {
    "ties": dense_ties,
    "dare": dense_dare,
    "dare_ties": dense_dare_ties,
    "emr": dense_emr,
    "emr_unified": dense_emr_unified,
    "fr": dense_fr,
}


def measure(
    shape: tuple[int, int], tasks: int, threads: int, rounds: int, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Both contenders of every method in turns, in this process."""
    torch.set_num_threads(threads)
    adapters = adapters_of(shape, tasks)
    contenders: dict[str, Callable[[str], Iterator[Tensor | None]]] = {
        "ours": lambda name: ours(name, adapters),
        "dense": lambda name: DENSE[name](dense_updates(adapters)),
    }
    taken: dict[tuple[str, str], list[tuple[float, float, int]]] = {}
    for name in names:
        for _ in range(rounds):
            for contender, run in contenders.items():
                # What the last run freed and malloc kept would hide what this one takes.
                ctypes.CDLL(None).malloc_trim(0)
                before = resident()
                reset_peak()
                wall, processor = time.perf_counter(), time.process_time()
                for update in run(name):
                    del update
                seconds = time.perf_counter() - wall, time.process_time() - processor
                taken.setdefault((name, contender), []).append((*seconds, peak() - before))
    return [
        {
            "op": "dense_costs",
            "method": name,
            "contender": contender,
            "shape": list(shape),
            "tasks": tasks,
            "rank": RANK,
            "threads": threads,
            "seconds": statistics.median(row[0] for row in rows),
            "cpu_seconds": statistics.median(row[1] for row in rows),
            "added_bytes": max(row[2] for row in rows),
            "rounds": rounds,
            "load": os.getloadavg()[0],
        }
        for (name, contender), rows in taken.items()
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for own, dense in zip(rows[::2], rows[1::2], strict=True):
        shape = "x".join(map(str, own["shape"]))
        yield (
            f"{own['method']:12} {shape:>11} K={own['tasks']:<3} {own['threads']} threads  "
            f"{own['seconds']:7.2f}s {own['cpu_seconds']:7.2f}s {own['added_bytes'] / 1e6:6.0f} MB  "
            f"{dense['seconds']:7.2f}s {dense['cpu_seconds']:7.2f}s {dense['added_bytes'] / 1e6:6.0f} MB  "
            f"{dense['cpu_seconds'] / own['cpu_seconds']:5.1f}x {dense['seconds'] / own['seconds']:5.1f}x "
            f"{math.inf if not own['added_bytes'] else dense['added_bytes'] / own['added_bytes']:5.1f}x"
        )


def shape_of(text: str) -> tuple[int, int]:
    rows, columns = text.split("x")
    return int(rows), int(columns)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for dense-costs.jsonl")
    parser.add_argument("--shapes", nargs="+", default=["1024x4096", "4096x4096"], metavar="ROWSxCOLUMNS")
    parser.add_argument("--tasks", nargs="+", type=int, default=[2, 6, 12])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--methods", nargs="+", choices=DENSE, default=list(DENSE), metavar="METHOD")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.measure:
        (shape,), (tasks,), (threads,) = arguments.shapes, arguments.tasks, arguments.threads
        print(json.dumps(measure(shape_of(shape), tasks, threads, arguments.rounds, arguments.methods)))
        return 0
    rows = [environment()]
    print(f"{'':40}ours: wall, cpu and peak     dense: wall, cpu and peak    ratios of cpu, wall and peak")
    for shape in arguments.shapes:
        for tasks in arguments.tasks:
            for threads in arguments.threads:
                command = [sys.executable, "-m", "bench.merging.dense_costs", "--measure", "--shapes", shape]
                command += ["--tasks", str(tasks), "--threads", str(threads), "--rounds", str(arguments.rounds)]
                command += ["--methods", *arguments.methods]
                threaded = {**os.environ, "OMP_NUM_THREADS": str(threads)}
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=threaded)
                found = json.loads(done.stdout)
                rows.extend(found)
                print("\n".join(table(found)), flush=True)
                if arguments.out:
                    write_rows(arguments.out / "dense-costs.jsonl", rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
