"""Speed of the operator on a GPU against what people run and against the strongest designs known.

    python -m nsc_kernels.bench.operator_gpu --out bench.jsonl [--sets operator whole] [--seconds 500]

gpu_contenders.py says who takes part, gpu_data.py in which layers. A trial is one set of contenders on one shape, with
one of our backends among them, in one process: samples of all of them in changing order, so that a ratio is of
neighbours in time. Each is first compared with float64 at the very size; one that is wrong is named and not timed.

A sample is the mean of a run of calls between two events. "eager" launches them from Python, "graph" replays a CUDA
graph of them. "warm" calls on one set of inputs. "cold" goes around so many sets that between two turns of one the
others move three times the L2, and keeps the results of a whole round: what a call writes has an address of its own in
the round (checked, also in the graph), so it is written over only after it had to leave L2 for memory, and cannot be
saved by a later write to the same place. What works in place writes over inputs, which go around as well.

Bytes are the least a call must move: each input read once, each output written once. Adapters have rank 16.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import nsc_kernels as nk

from .gpu_accuracy import errors, faults
from .gpu_clocks import Clocks
from .gpu_contenders import Contender, contenders
from .gpu_data import DRY_RUN, FAMILIES, LARGE, MLP, Data, Shape, least_bytes, operations, rotation
from .gpu_measuring import captured, device, microseconds, quantiles, synchronize
from .gpu_trials import Meet, Trial, add_backends, available, supervise, trial_arguments

GRAPH, EAGER, WARM = ("graph", "cold"), ("eager", "cold"), ("graph", "warm")
CALLS = {"cuda": 16, "cpu": 1}  # per sample, at least


class Set(NamedTuple):
    """``limit``: seconds that one shape may take, compilation and all."""

    hows: tuple[tuple[str, str], ...]
    limit: float


SETS = {
    "operator": Set((GRAPH, EAGER, WARM), 90),
    "whole": Set((GRAPH, EAGER), 90),
    "compiled": Set((GRAPH, EAGER), 150),
    "two_launches": Set((GRAPH, EAGER), 180),
    "autograd": Set((EAGER,), 150),
    "autotuned": Set((GRAPH, EAGER), 400),
    "whole_compiled": Set((GRAPH, EAGER), 400),
}
# In the order of their worth. Each phase is run for all backends before the next; what compiles for long comes last.
PHASES = [
    [("operator", FAMILIES), ("whole", FAMILIES)],
    [
        ("compiled", FAMILIES),
        ("operator", [*LARGE, *MLP]),
        ("two_launches", FAMILIES),
        ("whole", [*MLP, *LARGE]),
        ("autograd", FAMILIES),
        ("compiled", [*LARGE, *MLP]),
        ("two_launches", [*LARGE, *MLP]),
    ],
    [("autotuned", FAMILIES), ("whole_compiled", FAMILIES), ("autotuned", LARGE)],
]
QUICK = [[("operator", FAMILIES[:2])]]


class What(NamedTuple):
    """The payload of a trial."""

    backend: str
    of: str
    shape: Shape
    samples: int
    clocks: Path


class Round:
    """Calls in turn, again and again; the result of each is kept until its next one is there."""

    def __init__(self, calls: Sequence[Callable[[], Any]], least: int):
        self._calls = calls
        self.kept: list[Any] = [None] * len(calls)
        self.turns = len(calls) * -(-least // len(calls))

    def _turn(self, i: int) -> None:
        self.kept[i] = self._calls[i]()

    def pieces(self) -> list[Callable[[], None]]:
        return [partial(self._turn, i % len(self._calls)) for i in range(self.turns)]

    def run(self) -> None:
        for piece in self.pieces():
            piece()

    def apart(self) -> bool:
        """Whether no two results share memory."""
        spans = []
        for t in (t for result in self.kept for t in result[:3] if isinstance(t, Tensor)):
            storage = t.untyped_storage()
            spans.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
        spans.sort()
        return all(one[1] <= other[0] for one, other in itertools.pairwise(spans))


Sampler = Callable[[], float]


def sampler(contender: Contender, direction: str, how: str, sets: Sequence[Data], on: torch.device) -> Sampler:
    """Microseconds per call, one sample at a time. Also warms up, and captures."""
    calls: list[Callable[[], Any]]
    if direction == "forward":
        calls = [partial(contender.forward, d) for d in sets]
    else:
        calls = [partial(contender.backward, d, contender.forward(d).saved) for d in sets]
    around = Round(calls, CALLS[on.type])
    around.run()
    synchronize(on)
    run = around.run
    if how == "graph":
        run = captured(around.pieces(), on)
        run()
    if not around.apart():
        raise RuntimeError("two calls of a round wrote to the same memory")
    synchronize(on)
    return lambda: microseconds(run, on) / around.turns


def attempt(contender: Contender, on: torch.device, prepare: Callable[[], Any]) -> Any:
    """What ``prepare`` returns, or in words why it cannot: one that fails does not stop the others."""
    try:
        with torch.set_grad_enabled(contender.autograd):
            return prepare()
    except Exception as error:
        synchronize(on)  # raises where the device is lost, and with it everything that follows in this process
        return f"{type(error).__name__}: {error}"


def accuracy(contender: Contender, shape: Shape, on: torch.device, seed: int) -> dict[str, Any]:
    """On inputs of its own: nothing that another left in memory is the right answer."""
    found = attempt(contender, on, lambda: errors(contender, Data(shape, on, seed, contender.whole)))
    if isinstance(found, str):
        return {"error": found}
    wrong = faults(found)
    return {"accuracy": found, **({"error": "; ".join(wrong)} if wrong else {})}


def timed(
    running: list[Contender], direction: str, how: str, sets: Sequence[Data], on: torch.device, samples: int
) -> Iterator[dict[str, Any]]:
    """A row for each contender, of samples that take turns."""
    found: dict[str, Sampler] = {}
    for contender in running:
        one = attempt(contender, on, partial(sampler, contender, direction, how, sets, on))
        if isinstance(one, str):
            yield {"contender": contender.name, "error": one}
        else:
            found[contender.name] = one
    times: dict[str, list[float]] = {name: [] for name in found}
    order = [contender for contender in running if contender.name in found]
    for _ in range(samples):
        random.shuffle(order)
        for contender in order:
            with torch.set_grad_enabled(contender.autograd):
                times[contender.name].append(found[contender.name]())
    for contender in running:
        if contender.name not in times:
            continue
        ours = "fused_inplace" if contender.inplace and not contender.whole else running[0].name
        mine, spent = times.get(ours), times[contender.name]
        over = statistics.median(a / b for a, b in zip(spent, mine, strict=True)) if mine else None
        shape = sets[0].shape
        result = quantiles(spent)
        moved = least_bytes(shape, direction, contender.whole, contender.inplace)
        yield {
            "contender": contender.name,
            "stats": contender.stats,
            "adapters": contender.adapters,
            **{f"us_{name}": value for name, value in result.items() if name != "samples"},
            "us": spent,
            "over_ours": over,
            "least_bytes": moved,
            "tb_per_s": moved / result["p50"] / 1e6,
            "tflop_per_s": operations(shape, contender.whole) / result["p50"] / 1e6,
        }


def run_trial(what: What, on: torch.device) -> Iterator[dict[str, Any]]:
    random.seed(0)
    shape, whole = what.shape, what.of.startswith("whole")
    l2 = torch.cuda.get_device_properties(on).L2_cache_size if on.type == "cuda" else 1
    common = {"set": what.of, **shape._asdict()}
    with nk.use_backend(what.backend), Clocks(what.clocks, on) as clocks:
        data = [Data(shape, on, seed, whole) for seed in range(rotation(shape, whole, l2))]
        running = []
        for i, contender in enumerate(contenders(what.of)):
            if contender.prepare is not None:
                attempt(contender, on, partial(contender.prepare, data))
            found = accuracy(contender, shape, on, 1000 + i)
            yield {**common, "contender": contender.name, **found}
            if "error" not in found:
                running.append(contender)
        hows = SETS[what.of].hows
        # The interpreter takes a tenth of a second per call: a dry run goes through each way once.
        for how, cache in hows if on.type == "cuda" or what.of == "operator" else hows[:1]:
            sets = data if cache == "cold" else data[:1]
            for direction in ("forward", "backward"):
                start = time.monotonic()
                for row in timed(running, direction, how, sets, on, what.samples):
                    around = {"direction": direction, "how": how, "cache": cache, "sets": len(sets)}
                    yield {**common, **around, **row, "sm_mhz": clocks.since(start)}


def trials(args: argparse.Namespace) -> dict[str, Trial]:
    ours = available(args.backends)
    clocks = args.out.with_name("clocks.jsonl")
    found = {}
    phases = [[(of, [DRY_RUN]) for of in SETS]] if args.dry_run else QUICK if args.quick else PHASES
    for i, phase in enumerate(phases):
        for backend in ours:
            for of, shapes in phase:
                for shape in shapes if of in args.sets else ():
                    key = f"{backend} {of} {shape.name} T={shape.T} {shape.d_in}->{shape.d_out} R={shape.R}"
                    what = What(backend, of, shape, 1 if args.dry_run else args.samples, clocks)
                    found[key] = Trial(f"{backend} phase {i + 1}", what, SETS[of].limit)
    return found


def main(meet: Meet = device) -> int:
    parser = trial_arguments(__doc__)
    parser.add_argument("--samples", type=int, default=15)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--quick", action="store_true", help="two layers, with nothing that compiles for long")
    add_backends(parser)
    args = parser.parse_args()
    outcome = supervise(args, trials(args), run_trial, meet)
    print(outcome)
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
