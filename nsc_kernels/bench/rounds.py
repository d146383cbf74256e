"""Times contenders on one shape against each other: right first, then in rounds that all of them take part in.

A sample is the mean of a run of calls. ``eager`` launches them from Python; ``graph``, on a GPU, replays a CUDA graph
of them. ``warm`` calls on one set of inputs. ``cold`` goes around so many sets that between two turns of one the others
move three times the last-level cache, and keeps the results of a whole round: what a call writes has an address of its
own in the round (checked, also in a graph), so it is written over only after it had to leave the cache for memory, and
cannot be saved by a later write to the same place. What works in place writes over inputs, which go around as well.
"""

from __future__ import annotations

import itertools
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import nsc_kernels as nk

from .. import dispatch
from .accuracy import Judge, faults
from .clocks import Clocks
from .costs import least_bytes, operations, rotation
from .environment import settings_kept
from .measuring import captured, microseconds, quantiles, synchronize
from .problem import DTYPES, Problem, call_of
from .registry import Contender, chosen, where_and_why
from .shapes import Shape

GRAPH, EAGER, WARM = ("graph", "cold"), ("eager", "cold"), ("graph", "warm")
DIRECTIONS = ("forward", "backward")
CALLS = 16  # of a sample, at least, on a GPU
MOST_SETS = 1000  # of inputs that calls go around: layers too small for that many to fill a cache are not cold


class Cell(NamedTuple):
    """What is measured together, in one process: the payload of a trial.

    Attributes:
        of: ``"operator"`` or ``"linear"``.
        dtype: a name of :data:`problem.DTYPES`.
        names: contenders, or groups of them; ratios are to the first.
        hows: ``eager`` or ``graph``, ``cold`` or ``warm``.
        samples: rounds.
        seconds: how long a sample is at least, on a CPU.
        threads: of a CPU; 0 leaves them as they are.
        backend: which this package's operator takes where a contender does not say; None: as it is chosen for the
            process, by ``NSC_BACKEND`` or automatically.
        clocks: file for a GPU's clocks; none without.
        cache_bytes: of the cache that calls are to find cold; 0 asks the device.
        quick: without what compiles for long.
    """

    of: str
    shape: Shape
    dtype: str = "bf16"
    names: tuple[str, ...] = ("default",)
    hows: tuple[tuple[str, str], ...] = (EAGER,)
    samples: int = 15
    seconds: float = 0.02
    threads: int = 0
    backend: str | None = None
    clocks: Path | None = None
    cache_bytes: int = 0
    quick: bool = False


class Round:
    """Calls in turn, again and again; the result of each is kept until its next one is there.

    ``some``: a run is ``least`` calls, and not a whole number of rounds.
    """

    def __init__(self, calls: Sequence[Callable[[], Any]], least: int, some: bool = False):
        self._calls = calls
        self.kept: list[Any] = [None] * len(calls)
        self.turns = least if some else len(calls) * -(-least // len(calls))

    def _turn(self, i: int) -> None:
        self.kept[i] = self._calls[i]()

    def pieces(self) -> list[Callable[[], None]]:
        return [partial(self._turn, i % len(self._calls)) for i in range(self.turns)]

    def run(self, first: int = 0) -> None:
        """``turns`` calls, from the one of this number on."""
        for i in range(first, first + self.turns):
            self._turn(i % len(self._calls))

    def apart(self) -> bool:
        """Whether no two results share memory."""
        spans = []
        results = [result[:3] for result in self.kept if result is not None]
        for t in (t for result in results for t in result if isinstance(t, Tensor)):
            storage = t.untyped_storage()
            spans.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
        spans.sort()
        return all(one[1] <= other[0] for one, other in itertools.pairwise(spans))


class Sampler(NamedTuple):
    """``take(first)`` is the microseconds per call of ``calls`` calls, on the sets from the one of that number on."""

    take: Callable[[int], float]
    calls: int


def sampler(
    contender: Contender, direction: str, how: str, sets: Sequence[Problem], least: Callable[[float], int]
) -> Sampler:
    """Also warms up, and captures.

    ``least``: from the microseconds of a call, how many a sample takes. On a CPU, where a call may take as long as a
    sample should, that may be a part of a round: the next sample, whoever's it is, goes on with the next sets.
    """
    on = sets[0].device
    calls: list[Callable[[], Any]] = []
    for forward, backward in [contender.make(p) for p in sets]:
        if direction == "forward":
            calls.append(forward)
        else:
            calls.append(partial(backward, forward()[3]))
    around = Round(calls, 1)
    around.run()
    synchronize(on)
    once = microseconds(around.run, on) / around.turns
    if not around.apart():
        raise RuntimeError("two calls of a round wrote to the same memory")
    around = Round(calls, least(once), some=on.type == "cpu")
    around.run()
    replay = captured(around.pieces(), on) if how == "graph" else None
    if replay is not None:
        replay()
        if not around.apart():
            raise RuntimeError("two calls of a round wrote to the same memory")
    synchronize(on)

    def take(first: int) -> float:
        return microseconds(replay or partial(around.run, first), on) / around.turns

    return Sampler(take, around.turns)


def attempt(contender: Contender, on: torch.device, prepare: Callable[[], Any]) -> Any:
    """What ``prepare`` returns, or in words why it cannot: one that fails does not stop the others."""
    try:
        with torch.set_grad_enabled(contender.autograd), settings_kept():
            return prepare()
    except Exception as error:
        synchronize(on)  # raises where the device is lost, and with it everything that follows in this process
        return where_and_why(error)


def accuracy(contender: Contender, judge: Judge) -> dict[str, Any]:
    found = attempt(contender, judge.p.device, lambda: judge.errors(contender))
    if isinstance(found, str):
        return {"error": found}
    wrong = faults(found)
    return {"accuracy": found, **({"error": "; ".join(wrong)} if wrong else {})}


def timed(
    running: Sequence[Contender], direction: str, how: str, sets: Sequence[Problem], cell: Cell
) -> Iterator[dict[str, Any]]:
    """A row for each contender, of samples that take turns in changing order."""
    on, shape, size = sets[0].device, sets[0].shape, sets[0].z.element_size()

    def least(us: float) -> int:
        return CALLS if on.type == "cuda" else max(1, round(1e6 * cell.seconds / max(us, 0.1)))

    found: dict[str, Sampler] = {}
    for contender in running:
        one = attempt(contender, on, partial(sampler, contender, direction, how, sets, least))
        if isinstance(one, str):
            yield {"contender": contender.name, "error": one}
        else:
            found[contender.name] = one
    times: dict[str, list[float]] = {name: [] for name in found}
    order = [contender for contender in running if contender.name in found]
    first = 0
    for _ in range(cell.samples):
        random.shuffle(order)
        for contender in order:
            taken = attempt(contender, on, partial(found[contender.name].take, first))
            if isinstance(taken, str):
                yield {"contender": contender.name, "error": taken}
                del times[contender.name]
            else:
                times[contender.name].append(taken)
            first += found[contender.name].calls
        order = [contender for contender in order if contender.name in times]
    for contender in running:
        if contender.name not in times:
            continue
        # Like with like: what works in place beside what does, too.
        ours = "fused_inplace" if contender.inplace else running[0].name
        mine, spent = times.get(ours), times[contender.name]
        over = statistics.median(a / b for a, b in zip(spent, mine, strict=True)) if mine else None
        result = quantiles(spent)
        moved = least_bytes(shape, direction, contender.whole, contender.inplace, size)
        yield {
            "contender": contender.name,
            "stats": contender.stats,
            "adapters": contender.adapters,
            **{f"us_{name}": value for name, value in result.items() if name != "samples"},
            "us": spent,
            "over": ours,
            "over_ours": over,
            "least_bytes": moved,
            "operations": operations(shape, contender.whole),
            "tb_per_s": moved / result["p50"] / 1e6,
            "tflop_per_s": operations(shape, contender.whole) / result["p50"] / 1e6,
        }


def cache_bytes(on: torch.device) -> int:
    """Of the last cache before memory; 32 MiB where the system does not say."""
    if on.type == "cuda":
        return torch.cuda.get_device_properties(on).L2_cache_size
    sizes = [path.read_text() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    found = [int(text.strip()[:-1]) * units[text.strip()[-1]] for text in sizes if text.strip()[-1:] in units]
    return max(found, default=32 << 20)


def served_by(on: torch.device, dtype: torch.dtype, shape: Shape) -> str:
    """The backend, by name, that this package's operator takes."""
    backend = dispatch.select(dispatch.chosen(), call_of(on, dtype, shape))
    return next(name for name in dispatch.PREFERENCE if dispatch.load(name)[0] is backend)


def run_cell(cell: Cell, on: torch.device) -> Iterator[dict[str, Any]]:
    """Rows of one shape: what each contender's accuracy is or why it takes no part, then its times."""
    random.seed(0)
    shape, whole, dtype = cell.shape, cell.of == "linear", DTYPES[cell.dtype]
    if cell.threads:
        torch.set_num_threads(cell.threads)
    size = torch.empty(0, dtype=dtype, device="cpu").element_size()
    common = {"set": cell.of, "dtype": cell.dtype, "threads": torch.get_num_threads() if on.type == "cpu" else 0}
    common |= shape._asdict()
    with nk.use_backend(cell.backend or dispatch.chosen()), Clocks(cell.clocks, on) as clocks:
        cold = any(cache == "cold" for _, cache in cell.hows)
        count = min(rotation(shape, whole, cell.cache_bytes or cache_bytes(on), size), MOST_SETS) if cold else 1
        data = [Problem(shape, on, seed, whole, dtype) for seed in range(count)]
        judge = Judge(Problem(shape, on, 1000, whole, dtype))
        yield {**common, "served_by": served_by(on, dtype, shape)}
        running = []
        for contender in chosen(cell.of, cell.names, on.type, cell.quick):
            why = contender.unavailable and contender.unavailable(on, dtype, shape)
            if why:
                yield {**common, "contender": contender.name, "left_out": why}
                continue
            if contender.prepare is not None:
                attempt(contender, on, partial(contender.prepare, data))
            found = accuracy(contender, judge)
            yield {**common, "contender": contender.name, **found}
            if "error" not in found:
                running.append(contender)
        del judge
        for how, cache in cell.hows if running else ():
            sets = data if cache == "cold" else data[:1]
            for direction in DIRECTIONS:
                start = time.monotonic()
                around = {"direction": direction, "how": how, "cache": cache, "sets": len(sets)}
                for row in timed(running, direction, how, sets, cell):
                    yield {**common, **around, **row, "sm_mhz": clocks.since(start), "load": os.getloadavg()[0]}
