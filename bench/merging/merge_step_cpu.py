"""One optimisation step of NSC merging on a small LLaMA: this loop, what others run, and the floor.

    python -m bench.merging.merge_step_cpu --out bench/results/cpu     a table, and merge-step.jsonl
    python -m bench.merging.merge_step_cpu --d 1024 --intermediate 2816 --layers 12 --heads 16 --kv_heads 16
        --all_linears 1 --rows 1 --tokens 11 --only loop_together fused_together folded_together --no-memory
                                              steps of 66 tokens: what folding costs there

The default is 8 layers, d=512, six rank-16 adapters on q and v, 2 x 128 tokens per task, float32, one thread.
--batches 1 gives all tasks one batch, which every contender then runs once a step, scored by all six adapters.

Steps are interleaved in one process. The columns "to floor" are medians over rounds of the ratio to the floor's step in
the same round, by wall clock and by processor time, which a busy machine disturbs less. Memory is measured in one
process per contender: the highest resident set during two steps less the resident set before them, when model, adapters
and optimizer were in place.

Contenders:
    loop            nsc_merge, one task at a time
    loop_together   the same with the batches of all tasks in one pass
    fused           loop, applying the adapters to every token in the fused operator (fold=False)
    fused_together  the same, all tasks' batches in one pass
    folded          loop, adding the adapters to the weights in every step, however few its tokens (fold=True)
    folded_together  the same, all tasks' batches in one pass
    no_early_exit   loop, running the whole model
    checkpointing   loop, recomputing the blocks
    compiled        loop, with the blocks before the measured ones compiled (compile=True)
    compiled_together  the same, all tasks' batches in one pass
    concatenated    adapters concatenated along the rank, eager products; forward hooks for the ratio; whole model
    peft            PEFT's own forward with six active adapters and tensor-valued scaling; hooks; whole model
    dense           dense task vectors, merged once a step and run through functional_call; hooks; whole model
    floor           the bare frozen model, cut at the last measured input, forward and backward; no adapters at all
    floor_together  the same, all tasks' batches in one pass
    floor_compiled  floor, with the same blocks compiled as in compiled
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

import nsc_kernels as nk
from nsc_kernels.bench.resident_memory import peak, reset_peak, resident
from nsc_kernels.bench.timing import keep_freed_memory

from .merge_step_contenders import CONTENDERS
from .merge_step_problem import Problem, Shape

# What the project set out to reach: at most this many times the floor; at least this much faster than the others.
MOST_TO_FLOOR, LEAST_TO_OTHERS = 1.06, {"peft": 1.25, "dense": 1.5}
OURS = ("loop", "loop_together", "fused", "fused_together", "compiled", "compiled_together")


def times(
    shape: Shape, names: Sequence[str], rounds: int
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, float]]:
    """Per contender: wall and processor seconds of every step, and the objective of the first.

    Each has a model of its own, all with the same weights. Each round runs one step of each.
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    objectives = {}
    with ExitStack() as stack:
        steps = {name: CONTENDERS[name](Problem(shape), stack) for name in names}
        for name, step in steps.items():
            value = step()
            if isinstance(value, Tensor):
                objectives[name] = value.item()
        for _ in range(rounds):
            for name, step in steps.items():
                wall, processor = time.perf_counter(), time.process_time()
                step()
                taken[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return taken, objectives


def paired(taken: dict[str, list[tuple[float, float]]], name: str, other: str, clock: int) -> float:
    """Median over rounds of one contender's time by another's in the same round: slow spells cancel."""
    if other not in taken:
        return math.nan
    pairs = zip(taken[name], taken[other], strict=True)
    return statistics.median(first[clock] / second[clock] for first, second in pairs)


def bars(taken: dict[str, list[tuple[float, float]]]) -> Iterator[str]:
    """What was to be reached and what was, a line each, by processor time."""
    for name in OURS:
        if name not in taken:
            continue
        if "floor" in taken:
            ratio = paired(taken, name, "floor", 1)
            yield f"{name}: {ratio:.3f}x the floor, to be at most {MOST_TO_FLOOR}: {_verdict(ratio <= MOST_TO_FLOOR)}"
        for other, least in LEAST_TO_OTHERS.items():
            if other in taken:
                ratio = paired(taken, other, name, 1)
                # The trunk's own work is in both: with adapters for free, this is what would be left to gain.
                most = paired(taken, other, "floor_together" if "together" in name else "floor", 1)
                yield (
                    f"{name}: {ratio:.3f}x faster than {other}, to be at least {least}: {_verdict(ratio >= least)} "
                    f"(the floor itself: {most:.3f}x)"
                )


def _verdict(good: bool) -> str:
    return "reached" if good else "missed"


def peak_of(shape: Shape, name: str) -> int:
    """Bytes that two steps add to the resident set, measured in this process."""
    problem = Problem(shape)
    with ExitStack() as stack:
        step = CONTENDERS[name](problem, stack)
        reset_peak()
        before = resident()
        step()
        step()
        return peak() - before


def peaks(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, int]:
    found = {}
    command = [sys.executable, "-m", "bench.merging.merge_step_cpu", "--threads", str(arguments.threads)]
    command += _shape_arguments(arguments)
    for name in names:
        done = subprocess.run([*command, "--peak-of", name], capture_output=True, text=True, check=True)
        found[name] = int(done.stdout)
    return found


def _shape_arguments(arguments: argparse.Namespace) -> list[str]:
    return [text for name in asdict(Shape()) for text in (f"--{name}", str(getattr(arguments, name)))]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for merge-step.jsonl")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each contender (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--no-memory", action="store_true", help="skip the processes that measure memory")
    parser.add_argument("--peak-of", choices=CONTENDERS, help=argparse.SUPPRESS)
    for name, value in asdict(Shape()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    shape = Shape(**{name: getattr(arguments, name) for name in asdict(Shape())})
    if arguments.peak_of:
        print(peak_of(shape, arguments.peak_of))
        return 0
    keep_freed_memory()
    names = arguments.only
    taken, objectives = times(shape, names, arguments.rounds)
    memory = {} if arguments.no_memory else peaks(arguments, names)
    rows: list[dict[str, Any]] = [
        {
            "op": "environment",
            "torch": torch.__version__,
            "python": platform.python_version(),
            "nsc_kernels": nk.__version__,
            "backends": nk.available_backends(),
            "threads": arguments.threads,
            "load": os.getloadavg()[0],
            "date": time.strftime("%Y-%m-%d"),
            "shape": asdict(shape),
            "dtype": "float32",
        }
    ]
    medians = {name: statistics.median(wall for wall, _ in taken[name]) for name in names}
    processor = {name: statistics.median(used for _, used in taken[name]) for name in names}
    print(f"{'':17} {'median':>8} {'least':>8} {'cpu':>8} {'to floor':>9} {'(cpu)':>8} {'memory':>9}  objective")
    for name in names:
        least = min(wall for wall, _ in taken[name])
        rows.append(
            {
                "op": "merge_step",
                "contender": name,
                "seconds": medians[name],
                "least_seconds": least,
                "cpu_seconds": processor[name],
                "steps": taken[name],
                "peak_bytes": memory.get(name),
                "objective": objectives.get(name),
            }
        )
        ratios = [paired(taken, name, "floor", clock) for clock in (0, 1)]
        used = f"{memory[name] / 2**20:6.0f} MB" if name in memory else ""
        value = f"{objectives[name]:.6f}" if name in objectives else ""
        print(
            f"{name:17} {medians[name]:7.3f}s {least:7.3f}s {processor[name]:7.3f}s {ratios[0]:8.3f}x "
            f"{ratios[1]:7.3f}x {used:>9}  {value}"
        )
    for line in bars(taken):
        print(line)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        temporary = arguments.out / ".merge-step.jsonl.tmp"
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        temporary.replace(arguments.out / "merge-step.jsonl")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
