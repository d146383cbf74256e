"""One optimisation step of NSC merging at the shapes of LLaMA-3-8B and LLaVA-1.5-7B, on a GPU, with random weights.

    python -m bench.merging.merge_step_gpu --out merge-step.jsonl
    python -m bench.merging.merge_step_gpu --out merge-step.jsonl --contenders loop compiled compiled_graph peft floor

Six rank-16 adapters on q and v, bfloat16; per task 256 tokens (LLaMA) or an image and 64 tokens of text (LLaVA). The
contenders are those of nsc_kernels/bench/step: one model for all, each built anew in every round, warmed up by a step,
whose objective is kept, and timed over the next ones. A trial is one model with one of our GPU backends in a process
of its own; a row per contender and round is written as it is measured. "_graph" replays a CUDA graph of the whole
step. Memory is the most that was allocated, less the weights of the model.
"""

from __future__ import annotations

import argparse
import gc
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import nsc_kernels as nk
from nsc_kernels.bench.clocks import Clocks
from nsc_kernels.bench.measuring import captured, synchronize
from nsc_kernels.bench.step.contenders import CONTENDERS, step_of
from nsc_kernels.bench.step.models import MODELS, TINY
from nsc_kernels.bench.step.problem import Problem, Shape
from nsc_kernels.bench.trials import Trial, add_backends, available, supervise, trial_arguments

from .. import from_tests
from .merge_step_tables import print_merge_step

NAMES = {"LLaMA-3-8B": "llama3-8b", "LLaVA-1.5-7B": "llava-7b"}
OTHERS = {"concatenated", "peft", "dense", "floor", "floor_together", "floor_compiled"}  # use none of our backends
GRAPH = "_graph"
DEFAULT = (
    *("loop", "loop_graph", "loop_together", "loop_together_graph"),
    *("concatenated", "peft", "dense", "floor", "floor_together"),
)


@dataclass(frozen=True)
class Contender:
    """One of :data:`nsc_kernels.bench.step.contenders.CONTENDERS`, and how it is run."""

    name: str
    backend: str | None = None
    graph: bool = False

    def __str__(self) -> str:
        return self.name + GRAPH * self.graph + (f"/{self.backend}" if self.backend else "")


def contender_of(name: str, backend: str) -> Contender:
    step = name.removesuffix(GRAPH)
    return Contender(step, None if step in OTHERS else backend, step != name)


def small(shape: Shape) -> Shape:
    """The same at a size for a dry run."""
    if not shape.vision_layers:
        return replace(shape, **TINY)
    return replace(shape, **TINY, vision_layers=1, vision_d=64, patches=2)


def timed(problem: Problem, contender: Contender, on: torch.device, steps: int) -> dict[str, float]:
    """Milliseconds of a step, the peak of memory, and the objective of the first step; not a number for a floor."""
    gc.collect()  # what the contender before held
    if on.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(on)
    with ExitStack() as stack:
        stack.enter_context(nk.use_backend(contender.backend or "auto"))
        step: Callable[[], object] = step_of(contender.name, problem, stack)
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


class What(NamedTuple):
    """The payload of a trial: one model, in a process that measures one of our backends beside all others."""

    backend: str
    model: str
    contenders: tuple[str, ...]
    rounds: int
    steps: int
    clocks: Path


def run_trial(what: What, on: torch.device) -> Iterator[dict[str, Any]]:
    """A row for each contender in each round, in changing order; one that fails is not tried again."""
    shape = MODELS[NAMES[what.model]]
    shape = shape if on.type == "cuda" else small(shape)
    order = random.Random(0)
    with Clocks(what.clocks, on) as clocks:
        problem = Problem(shape, on, torch.bfloat16)
        running = [contender_of(name, what.backend) for name in what.contenders]
        for turn in range(what.rounds):
            for contender in order.sample(running, len(running)):
                common = {"model": what.model, "contender": str(contender), "round": turn}
                start = time.monotonic()
                try:
                    found = timed(problem, contender, on, what.steps)
                except Exception as error:
                    synchronize(on)  # raises where the device is lost, and with it everything that follows
                    running.remove(contender)
                    yield {**common, "error": f"{type(error).__name__}: {error}"}
                    continue
                yield {**common, "name": contender.name, **found, "sm_mhz": clocks.since(start)}


def trials(args: argparse.Namespace) -> dict[str, Trial]:
    rounds, steps = (1, 1) if args.dry_run else (args.rounds, 4)
    clocks, names = args.out.with_name("clocks.jsonl"), tuple(args.contenders)
    chosen = "" if names == DEFAULT else f" {','.join(names)}"
    return {
        f"{backend} {model}{chosen}": Trial(
            f"{backend} {model}", What(backend, model, names, rounds, steps, clocks), limit=400
        )
        for model in args.models
        for backend in available(args.backends)
    }


def main() -> int:
    parser = trial_arguments(__doc__)
    parser.add_argument("--models", nargs="+", choices=NAMES, default=list(NAMES))
    add_backends(parser)
    known = [f"{name}{graph}" for name in CONTENDERS for graph in ("", GRAPH)]
    parser.add_argument("--contenders", nargs="+", choices=known, default=DEFAULT, metavar="C", help=", ".join(known))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    outcome = supervise(args, trials(args), run_trial, from_tests.device)
    print_merge_step(args.out)
    print(outcome)
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
