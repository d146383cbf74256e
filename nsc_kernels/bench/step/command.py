"""One step of NSC merging of a model with random weights, against the bare model: the command ``step``.

    python -m nsc_kernels.bench step                                    a LLaMA of 8 layers, d = 512, float32
    python -m nsc_kernels.bench step --model vit-b
    python -m nsc_kernels.bench step --model llama3-8b --layers 2       two of its blocks, at full width
    python -m nsc_kernels.bench step --d 1024 --intermediate 2816 --layers 12 --heads 16 --kv_heads 16
        --all_linears 1 --rows 1 --tokens 11 --only loop_together fused_together folded_together --no-memory
                                              steps of 66 tokens: what folding costs there

Six adapters of rank 16 on q and v. --batches 1 gives all tasks one batch, which every contender then runs once a step,
scored by all six adapters. On a CPU a named model has four of its blocks unless --layers says otherwise.

Steps are interleaved in one process, in changing order. "to floor" is the median over rounds of the ratio to the
floor's step in the same round, by wall clock and, on a CPU, by processor time, which a busy machine disturbs less.
Memory is measured in one process per contender: what two steps take on top of model, adapters and optimizer.

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
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import environment, report
from ..measuring import check_device, quantiles, synchronize
from ..problem import DTYPES
from ..resident_memory import peak, reset_peak, resident
from ..tables import NOISY, spread
from ..timing import keep_freed_memory
from .contenders import CONTENDERS, step_of
from .models import MODELS
from .problem import Problem, Shape

BLOCKS = 4  # of a named model, on a CPU
SHAPE_HELP = {"layers": "blocks"}
MAY_BE_ZERO = ("vision_layers", "all_linears", "classes")
QUICK = ("loop", "concatenated", "peft", "floor")
Taken = dict[str, list[tuple[float, float]]]  # wall and processor seconds of every step


def times(
    shape: Shape, names: Sequence[str], rounds: int, on: torch.device, dtype: torch.dtype
) -> tuple[Taken, dict[str, float], dict[str, str]]:
    """Of every step, the objective of the first, and why a contender could not be run.

    Each has a model of its own, all with the same weights. Each round runs one step of each.
    """
    taken: Taken = {}
    objectives, errors = {}, {}
    with ExitStack() as stack:
        steps = {}
        for name in names:
            try:
                step = step_of(name, Problem(shape, on, dtype), stack)
                value = step()
            except Exception as error:
                errors[name] = f"{type(error).__name__}: {error}"
                continue
            steps[name], taken[name] = step, []
            if isinstance(value, Tensor):
                objectives[name] = value.item()
        order = list(steps)
        for _ in range(rounds):
            random.shuffle(order)
            for name in order:
                synchronize(on)
                wall, processor = time.perf_counter(), time.process_time()
                steps[name]()
                synchronize(on)
                taken[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return taken, objectives, errors


def paired(taken: Taken, name: str, other: str, clock: int) -> float | None:
    """Median over rounds of one contender's time by another's in the same round: slow spells cancel."""
    if other not in taken:
        return None
    pairs = zip(taken[name], taken[other], strict=True)
    return statistics.median(first[clock] / second[clock] for first, second in pairs)


def peak_of(shape: Shape, name: str, on: torch.device, dtype: torch.dtype) -> int:
    """Bytes that two steps add to the memory in use, measured in this process."""
    problem = Problem(shape, on, dtype)
    with ExitStack() as stack:
        step = step_of(name, problem, stack)
        if on.type == "cuda":
            torch.cuda.reset_peak_memory_stats(on)
            before = torch.cuda.memory_allocated(on)
        else:
            reset_peak()
            before = resident()
        step()
        step()
        return (torch.cuda.max_memory_allocated(on) if on.type == "cuda" else peak()) - before


def peaks(arguments: argparse.Namespace, shape: Shape, names: Sequence[str]) -> dict[str, int]:
    command = [sys.executable, "-m", "nsc_kernels.bench", "step", "--threads", str(arguments.threads)]
    command += ["--device", arguments.device, "--dtype", arguments.dtype, "--model", arguments.model]
    command += [text for name, value in asdict(shape).items() for text in (f"--{name}", str(value))]
    found = {}
    for name in names:
        done = subprocess.run([*command, "--peak-of", name], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            found[name] = int(done.stdout)
        else:
            print(f"{name}: its memory could not be measured: {done.stderr.strip()[-300:]}", file=sys.stderr)
    return found


def rows_of(
    arguments: argparse.Namespace, shape: Shape, taken: Taken, objectives: dict[str, float], memory: dict[str, int]
) -> Iterator[dict[str, Any]]:
    """A row per contender, with the fields of the operator's rows: reports of both are compared and drawn alike."""
    for name, steps in taken.items():
        us = [1e6 * wall for wall, _ in steps]
        over = "floor" if "floor" in taken else next(iter(taken))
        yield {
            "trial": f"step {arguments.model}",
            "set": "step",
            "dtype": arguments.dtype,
            "threads": arguments.threads if arguments.device == "cpu" else 0,
            "how": "eager",
            "cache": "warm",
            "name": arguments.model,
            "T": shape.rows * shape.tokens,
            "d_in": shape.d,
            "d_out": shape.d,
            "K": shape.tasks,
            "r": shape.rank,
            "direction": "step",
            "contender": name,
            "stats": True,
            "adapters": not name.startswith("floor"),
            **{f"us_{key}": value for key, value in quantiles(us).items() if key != "samples"},
            "us": us,
            "cpu_us": [1e6 * processor for _, processor in steps],
            "over": over,
            "over_ours": paired(taken, name, over, 0),
            "over_ours_cpu": paired(taken, name, over, 1),
            "peak_bytes": memory.get(name),
            "objective": objectives.get(name),
            "shape": asdict(shape),
        }


def lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield f"{'':17} {'median':>9} {'spread':>7} {'to ' + rows[0]['over']:>10} {'(cpu)':>8} {'memory':>10}  objective"
    for row in rows:
        memory = f"{row['peak_bytes'] / 2**20:7.0f} MB" if row["peak_bytes"] is not None else ""
        value = f"{row['objective']:.6f}" if row["objective"] is not None else ""
        yield (
            f"{row['contender']:17} {row['us_p50'] / 1e6:8.3f}s {100 * spread(row):6.0f}% {row['over_ours']:9.3f}x "
            f"{row['over_ours_cpu']:7.3f}x {memory:>10}  {value}"
        )
    noisy = [row["contender"] for row in rows if spread(row) > NOISY]
    if noisy:
        yield f"noisy, the middle 60 % of steps spread over {NOISY:.0%} or more: {', '.join(noisy)}"


def parser_of() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m nsc_kernels.bench step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="small-llama", help="(default %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="(default: bf16 on a GPU, fp32 on a CPU)")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each contender (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU (default %(default)s)")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=None, help="contenders (default: all)")
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)}, three rounds, no memory")
    parser.add_argument("--no-memory", action="store_true", help="skip the processes that measure memory")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="the report, written anew")
    parser.add_argument("--json", action="store_true", help="the report's rows on standard output, no table")
    parser.add_argument("--plot", type=Path, nargs="?", const=Path("bench-plots"), metavar="FOLDER")
    parser.add_argument("--peak-of", choices=CONTENDERS, help=argparse.SUPPRESS)
    for name in asdict(Shape()):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=SHAPE_HELP.get(name, argparse.SUPPRESS))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of()
    a = parser.parse_args(argv)
    for name, value in ("rounds", a.rounds), ("threads", a.threads), *((n, getattr(a, n)) for n in asdict(Shape())):
        if value is not None and value < (0 if name in MAY_BE_ZERO else 1):
            parser.error(f"--{name}: expected at least 1, found {value}")
    try:
        check_device(a.device)
        report.check_places(a.out, a.plot)
    except ValueError as refused:
        parser.exit(2, f"{parser.prog}: {refused}\n")
    a.dtype = a.dtype or ("bf16" if a.device == "cuda" else "fp32")
    shape = replace(MODELS[a.model], **{n: v for n in asdict(Shape()) if (v := getattr(a, n)) is not None})
    if a.device == "cpu" and a.layers is None and a.model != "small-llama" and shape.layers > BLOCKS:
        print(f"{BLOCKS} of {shape.layers} blocks of {a.model} (--layers {shape.layers}: all)", file=sys.stderr)
        shape = replace(shape, layers=BLOCKS, vision_layers=min(shape.vision_layers, BLOCKS))
    if a.quick:
        a.only, a.rounds, a.no_memory = a.only or QUICK, min(a.rounds, 3), True
    names, on = a.only or list(CONTENDERS), torch.device(a.device)
    if shape.classes:
        names = [name for name in names if name != "floor_compiled"]  # whose blocks are a decoder's
    torch.set_num_threads(a.threads)
    if a.peak_of:
        print(peak_of(shape, a.peak_of, on, DTYPES[a.dtype]))
        return 0
    keep_freed_memory()
    facts = {"trial": "machine", **environment.facts(on)}
    taken, objectives, errors = times(shape, names, a.rounds, on, DTYPES[a.dtype])
    for name, error in errors.items():
        print(f"not timed: {name}: {error}", file=sys.stderr)
    if not taken:
        return 1
    memory = {} if a.no_memory else peaks(a, shape, [*taken])
    rows = [facts, *rows_of(a, shape, taken, objectives, memory)]
    written = "".join(json.dumps(row) + "\n" for row in rows)
    print(written if a.json else "\n".join(lines(rows[1:])), end="" if a.json else "\n")
    if a.out:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        temporary = a.out.with_name(f".{a.out.name}.tmp")
        temporary.write_text(written)
        temporary.replace(a.out)
    if a.plot:
        from ..plots import draw  # matplotlib takes a second to import

        for path in draw(rows, a.plot):
            print(f"wrote {path}", file=sys.stderr)
    return int(bool(errors))
