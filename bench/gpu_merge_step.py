"""One optimisation step of NSC merging at the shapes of LLaMA-3-8B and LLaVA-1.5-7B, on a GPU, with random weights.

    python bench/gpu_merge_step.py --out merge-step.jsonl

Six rank-16 adapters on q and v, bfloat16; per task 256 tokens (LLaMA) or an image and 64 tokens of text (LLaVA). The
contenders are those of bench_merge_step.py: one model for all, each built anew in every round, warmed up by one step,
whose objective is kept, and timed over the next ones. Ours run with each GPU backend; "_graph" replays a CUDA graph of
the whole step. Memory is the most that was allocated, less the weights of the model.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

import nsc_kernels as nk
from gpu_common import Rows, arguments, captured, device, synchronize
from merge_step_contenders import CONTENDERS, Problem, Shape


@dataclass(frozen=True)
class Model:
    """A shape, and what the project set out to reach with it.

    Attributes:
        iterations_in: seconds for 500 steps.
        over_peft: how many times faster than PEFT's loop.
    """

    shape: Shape
    iterations_in: float
    over_peft: float | None


LLAMA = Shape(layers=32, d=4096, intermediate=14336, heads=32, kv_heads=8, vocabulary=128256, rows=1, tokens=256)
LLAVA = Shape(
    layers=32,
    d=4096,
    intermediate=11008,
    heads=32,
    kv_heads=32,
    vocabulary=32064,
    rows=1,
    tokens=640,
    vision_layers=24,
)
MODELS = {"LLaMA-3-8B": Model(LLAMA, 90, 3.0), "LLaVA-1.5-7B": Model(LLAVA, 120, None)}
TINY = {
    "layers": 4,
    "d": 64,
    "intermediate": 96,
    "heads": 4,
    "kv_heads": 2,
    "vocabulary": 64,
    "tasks": 2,
    "rank": 4,
    "tokens": 9,
    "batches": 2,
}
MOST_TO_FLOOR, MOST_BYTES = 1.15, 6e9
OURS, OTHERS = ("loop", "loop_together"), ("concatenated", "peft", "dense", "floor", "floor_together")


@dataclass(frozen=True)
class Contender:
    """One of :data:`merge_step_contenders.CONTENDERS`, and how it is run."""

    name: str
    backend: str | None = None
    graph: bool = False

    def __str__(self) -> str:
        return self.name + ("_graph" if self.graph else "") + (f"/{self.backend}" if self.backend else "")

    @property
    def floor(self) -> str:
        """The floor of a step that puts the tasks' batches together, or does not."""
        return "floor_together" if self.name.endswith("_together") else "floor"


def contenders() -> list[Contender]:
    ours = [name for name in ("triton", "cuda") if nk.available_backends()[name] is True]
    mine = [Contender(name, backend, graph) for backend in ours for name in OURS for graph in (False, True)]
    return [*mine, *(Contender(name) for name in OTHERS)]


def small(shape: Shape) -> Shape:
    """The same at a size for a dry run."""
    if not shape.vision_layers:
        return replace(shape, **TINY)
    return replace(shape, **TINY, vision_layers=1, vision_d=64, patches=2)


@contextmanager
def defaults(on: torch.device) -> Iterator[None]:
    """bfloat16 and the device as what new tensors are of and on."""
    kind = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with on:
            yield
    finally:
        torch.set_default_dtype(kind)


def timed(problem: Problem, contender: Contender, on: torch.device, steps: int) -> dict[str, float]:
    """Milliseconds of a step, the peak of memory, and the objective of the first step; not a number for a floor."""
    if on.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(on)
    with ExitStack() as stack:
        stack.enter_context(nk.use_backend(contender.backend or "auto"))
        step: Callable[[], object] = CONTENDERS[contender.name](problem, stack)
        first = step()
        if contender.graph:
            step = captured([step], on)
            step()
        synchronize(on)
        start = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize(on)
        taken = 1e3 * (time.perf_counter() - start) / steps
    peak = torch.cuda.max_memory_allocated(on) if on.type == "cuda" else 0
    return {
        "ms": taken,
        "peak_bytes": peak - sum(value.nbytes for value in problem.model.parameters()),
        "objective": first.item() if isinstance(first, Tensor) else math.nan,
    }


def attempt(problem: Problem, contender: Contender, on: torch.device, steps: int) -> dict[str, float] | str:
    """What :func:`timed` finds, or why it cannot: what stops one contender says nothing about the others."""
    try:
        return timed(problem, contender, on, steps)
    except Exception as error:
        return repr(error)


def measure(name: str, model: Model, on: torch.device, rows: Rows, rounds: int, dry_run: bool) -> None:
    shape = small(model.shape) if dry_run else model.shape
    problem = Problem(shape)
    found: dict[str, list[dict[str, float]]] = {}
    running = contenders()
    for _ in range(rounds):
        for contender in list(running):
            one = attempt(problem, contender, on, 1 if dry_run else 4)
            if isinstance(one, str):
                running.remove(contender)
                found.pop(str(contender), None)
                rows.write({"model": name, "contender": str(contender), "error": one, "dry_run": dry_run})
                print(f"{name}  {contender}: {one}", flush=True)
            else:
                found.setdefault(str(contender), []).append(one)
    for contender in running:
        times = [one["ms"] for one in found[str(contender)]]
        row = {
            "model": name,
            "contender": str(contender),
            "backend": contender.backend,
            "ms": statistics.median(times),
            "rounds": times,
            "objective": found[str(contender)][0]["objective"],
            "peak_bytes": max(one["peak_bytes"] for one in found[str(contender)]),
            **{f"over_{other}": ratio(found, other, contender) for other in OTHERS if other in found},
            "shape": asdict(shape),
            "dry_run": dry_run,
        }
        rows.write(row)
        figures = f"{row['ms']:9.2f} ms  {row['peak_bytes'] / 1e9:6.2f} GB  {row['objective']:.5f}"
        print(f"{name:<13} {contender!s:<28} {figures}", flush=True)
        for line in () if dry_run else verdicts(model, contender, row):
            print(f"    {line}", flush=True)


def ratio(found: dict[str, list[dict[str, float]]], other: str, contender: Contender) -> float:
    """How many times a step of ``contender`` fits into one of ``other``: the median over rounds."""
    pairs = zip(found[other], found[str(contender)], strict=True)
    return statistics.median(slow["ms"] / quick["ms"] for slow, quick in pairs)


def verdicts(model: Model, contender: Contender, row: dict[str, Any]) -> Iterator[str]:
    """What was to be reached and what was."""
    if contender.name not in OURS:
        return
    aims = [
        ("500 steps, s", 0.5 * row["ms"], model.iterations_in, True),
        ("peak over weights, GB", row["peak_bytes"] / 1e9, MOST_BYTES / 1e9, True),
    ]
    if f"over_{contender.floor}" in row:
        aims.append(("to the floor", 1 / row[f"over_{contender.floor}"], MOST_TO_FLOOR, True))
    if model.over_peft is not None and "over_peft" in row:
        aims.append(("faster than peft", row["over_peft"], model.over_peft, False))
    for what, value, bar, at_most in aims:
        good = value <= bar if at_most else value >= bar
        bound = f"{'at most' if at_most else 'at least'} {bar}"
        yield f"{what}: {value:.3f}, to be {bound}: {'reached' if good else 'missed'}"


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    on = device(args.dry_run)
    rows = Rows(args.out)
    with defaults(on):
        for name in args.models:
            measure(name, MODELS[name], on, rows, 1 if args.dry_run else args.rounds, args.dry_run)
    return int(not rows.count)


if __name__ == "__main__":
    sys.exit(main())
