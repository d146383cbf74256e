"""Time prepared variants and other configurations beside the committed one, and write the table that overrides it.

    python -m bench.hardware.tune --out tune.jsonl --table nsc_kernels/triton/tables/nvidia-h200.json [--seconds 300]

A trial is a layer of the benchmark in one direction: the formula's configuration and at most ten others
(candidates.py), compiled in parallel, in a process of its own. Each is first compared with the formula's on the
same inputs, in memory poisoned by NaN; one that differs by more than rounding, or at all where the sums have the same
order, leaves a row with the error and is not timed. The others are timed as CUDA graphs over a rotation of inputs, in
rounds in random order with the formula's in every round; ``ratio`` is the median over rounds of the time over the
formula's in the same round. What is at least 3 % faster enters the table. A table is part of the source that the ledger
hashes: check correctness again after it.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsc_kernels.bench import problem as inputs
from nsc_kernels.bench.measuring import captured, microseconds, quantiles, synchronize
from nsc_kernels.bench.shapes import Shape
from nsc_kernels.bench.trials import Trial, results, supervise, trial_arguments
from nsc_kernels.contract import BackwardCall, ForwardCall
from nsc_kernels.triton import launch
from nsc_kernels.triton.configs import Config, Problem, bucket, formula, machine

from .. import from_tests
from .candidates import candidates
from .layers import SHAPES

GAIN = 0.97
ROUNDS = {"cuda": 25, "cpu": 1}
FORMULA = "the formula"
# One for each kind of candidate: sliced, tiles, and tiles of more than 128 columns.
DRY_RUNS = [Shape("dry run", T, 256, 72, K, 16) for T, K in ((5, 1), (130, 1), (130, 9))]
SAME_ORDER = {"expand_stages", "early"}  # fields that change when something is loaded and not what is added when


def call(
    data: inputs.Problem, backward: bool, u: Tensor | None, config: Config
) -> Callable[[], tuple[Tensor | None, ...]]:
    """One direction as the operator runs it, with everything switched on."""
    bank, z = data.bank, data.z.detach()
    factors = (bank.A, bank.Bt, bank.offsets, data.lam.detach())
    if not backward:
        forward = ForwardCall(z, *factors, data.base, True, True)
        return lambda: launch.forward(forward, config=config)
    assert u is not None  # a forward that had to save it did
    dy, dquad, dsqnorm = data.grads
    gradients = BackwardCall(dy, dquad, dsqnorm, u, z, *factors, None, True, True)
    return lambda: launch.backward(gradients, config=config)


def poisoned(run: Callable[[], tuple[Tensor | None, ...]], on: torch.device) -> tuple[Tensor | None, ...] | str:
    """Results in memory that read NaN before, or why there are none. Compiles on the first call."""
    try:
        if on.type == "cuda":
            torch.cuda.set_device(on)  # the current device is each thread's own
        found = run()
        synchronize(on)
    except Exception as error:  # a candidate may not compile, or not fit; the formula's own always does
        return f"{type(error).__name__}: {error}"
    return found


def wrong(found: tuple[Tensor | None, ...], expected: tuple[Tensor | None, ...], same_order: bool) -> str | None:
    """How results differ from the formula's by more than they may: a rounding of the dtype, and nothing where the sums
    have the same order. Sums over columns or tokens (float32) run across threads, whose layout is the compiler's.
    """
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if ours is None or theirs is None:
            continue
        if same_order and ours.dtype is torch.bfloat16 and not torch.equal(ours, theirs):
            return f"result {index} is not bitwise the formula's"
        ours, theirs, eps = ours.float(), theirs.float(), max(torch.finfo(ours.dtype).eps, 2**-10)
        bound = eps * (theirs.abs() + theirs.square().mean().sqrt())
        if not bool(((ours - theirs).abs() <= bound).all()):
            return f"result {index} is off by {float((ours - theirs).abs().max()):.3g}"
    return None


def right_ones(
    named: dict[str, Config], prepare: Callable[[Config], Callable[[], Any]], on: torch.device
) -> tuple[dict[str, Config], dict[str, str]]:
    """Candidates whose results may be trusted, the formula's first, and what is wrong with the others."""
    names = list(named)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is allocated with NaN
    try:
        synchronize(on)  # the threads below have a stream of their own
        expected = poisoned(prepare(named[FORMULA]), on)
        if isinstance(expected, str):
            raise RuntimeError(expected)
        # Triton's compiler lets other threads run.
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 8) if on.type == "cuda" else 1) as threads:
            found = list(threads.map(lambda name: poisoned(prepare(named[name]), on), names))
    finally:
        torch.use_deterministic_algorithms(deterministic)
    errors = {}
    for name, result in zip(names, found, strict=True):
        differs = {key for key, value in vars(named[name]).items() if value != getattr(named[FORMULA], key)}
        error = result if isinstance(result, str) else wrong(result, expected, differs <= SAME_ORDER)
        if error:
            errors[name] = error
    return {name: config for name, config in named.items() if name not in errors}, errors


def graph(calls: list[Callable[[], Any]], on: torch.device) -> Callable[[], float]:
    """Microseconds per call of a graph of the calls, each of which writes to addresses of its own."""
    kept: list[Any] = [None] * len(calls)

    def keep(i: int) -> None:
        kept[i] = calls[i]()

    replay = captured([partial(keep, i) for i in range(len(calls))], on)
    return lambda: microseconds(replay, on) / len(kept)


def tune(payload: tuple[Shape, bool], on: torch.device) -> Iterator[dict[str, Any]]:
    """A row per candidate: wrong ones first, then times with the formula's first."""
    shape, backward = payload
    widths = (shape.d_out, shape.d_in) if backward else (shape.d_in, shape.d_out)
    problem = Problem(bucket(shape.T), *widths, shape.K * shape.r, "half", backward)
    start = formula(machine(on), problem)
    if start is None:
        raise RuntimeError(f"no configuration for {problem}")
    named = {FORMULA: start, **candidates(machine(on), problem, start)}
    sets = [inputs.Problem(shape, on, seed) for seed in range(1 if on.type == "cpu" else 2 if shape.T > 4096 else 8)]
    saved = [call(data, False, data.z, start)()[3] for data in sets]
    right, errors = right_ones(named, lambda config: call(sets[0], backward, saved[0], config), on)
    facts = {"name": shape.name, "tokens": shape.T, **problem._asdict(), "formula": asdict(start)}
    for name, error in errors.items():
        yield {**facts, "candidate": name, "config": asdict(named[name]), "error": error}
    runs = {
        name: graph([call(data, backward, u, config) for data, u in zip(sets, saved, strict=True)], on)
        for name, config in right.items()
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(ROUNDS[on.type]):
        for name in random.sample(list(runs), len(runs)):
            times[name].append(runs[name]())
    for name, values in times.items():
        spent = {f"us_{key}" if key != "samples" else key: value for key, value in quantiles(values).items()}
        ratio = statistics.median(a / b for a, b in zip(values, times[FORMULA], strict=True))
        yield {**facts, "candidate": name, "config": asdict(right[name]), **spent, "ratio": ratio}


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best candidate of each problem, where it is faster enough. Of layers that share one, the last counts."""
    best: dict[Problem, dict[str, Any]] = {}
    for row in rows:
        if "ratio" in row:
            problem = Problem(*(row[field] for field in Problem._fields))
            if row["candidate"] == FORMULA or row["ratio"] < best[problem]["ratio"]:
                best[problem] = row
    return [{**p._asdict(), **row["config"]} for p, row in best.items() if row["ratio"] < GAIN]


def main() -> int:
    parser = trial_arguments(__doc__)
    parser.add_argument("--table", type=Path, required=True, help="JSON table to write")
    args = parser.parse_args()
    trials = {
        f"{shape.name} T={shape.T} {shape.d_in}->{shape.d_out} K={shape.K} {'backward' if backward else 'forward'}": (
            Trial("triton", (shape, backward), limit=600 if args.dry_run else 120)
        )
        for shape, backward in itertools.product(DRY_RUNS if args.dry_run else SHAPES, (False, True))
    }
    outcome = supervise(args, trials, tune, from_tests.device)
    rows = results(args.out)
    for row in rows:
        if "candidate" in row:
            said = row.get("error") or f"{row['us_p50']:9.1f} us  {row['ratio']:.3f}"
            print(f"{row['trial']:60} {row['candidate']:60} {said}")
    args.table.parent.mkdir(parents=True, exist_ok=True)
    args.table.write_text(json.dumps(table(rows), indent=1) + "\n")
    print(outcome)
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
