"""Every variant and cluster size of the CUDA C++ kernel on the shapes of the benchmark, to set its formula by.

    python -m bench.hardware.clusters --out clusters.jsonl [--seconds 120]

A trial is a shape in one direction; all its choices are timed in one process, as CUDA graphs over a rotation of inputs,
in turns, with everything switched on. Rows with ``chosen`` are what the formula in csrc/cuda/geometry.h takes; the last
row of a trial compares it with the best. A size that the device cannot run leaves a row with the error.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import nsc_kernels as nk
from nsc_kernels.backends import cuda
from nsc_kernels.bench.measuring import captured, microseconds, quantiles
from nsc_kernels.bench.problem import Problem
from nsc_kernels.bench.shapes import Shape
from nsc_kernels.bench.trials import Trial, supervise, trial_arguments
from nsc_kernels.contract import BackwardCall, ForwardCall

from .layers import SHAPES

ALL = [*cuda.VARIANTS, *cuda.WARPGROUP_VARIANTS]
RANKS = [Shape(f"{R} columns", T, 4096, 4096, R // 16, 16) for R in (16, 64, 128, 256, 512) for T in (256, 1536)]
SAMPLES = 15


class How(NamedTuple):
    variant: int = cuda.AUTOMATIC
    cluster: int = 0

    def __str__(self) -> str:
        if self.variant == cuda.AUTOMATIC:
            return "the formula"
        family = "mma" if self.variant < len(cuda.VARIANTS) else "wgmma"
        return "{} {} x {} in clusters of {}".format(family, *ALL[self.variant], self.cluster)


def call(data: Problem, backward: bool, u: Tensor | None, how: How) -> Callable[[], Any]:
    z, lam = data.z.detach(), data.lam.detach()
    factors = (data.bank.A, data.bank.Bt, data.bank.offsets, lam)
    if not backward:
        forward = ForwardCall(z, *factors, data.base, True, True)
        return lambda: cuda.forward(forward, **how._asdict())
    assert u is not None  # a forward that had to save it did
    dy, dquad, dsqnorm = data.grads
    gradients = BackwardCall(dy, dquad, dsqnorm, u, z, *factors, None, True, True)
    return lambda: cuda.backward(gradients, **how._asdict())


def prepared(calls: list[Callable[[], Any]], on: torch.device) -> Callable[[], None] | str:
    """A graph of the calls, or why the device cannot run them."""
    try:
        return captured(calls, on)
    except RuntimeError as error:
        torch.cuda.synchronize(on)  # raises where it is the process that is broken, and not the size
        return str(error)


def sweep(payload: tuple[Shape, bool], on: torch.device) -> Iterator[dict[str, Any]]:
    shape, backward = payload
    sets = [Problem(shape, on, seed) for seed in range(2 if shape.T > 4096 else 8)]
    saved = [cuda.forward(ForwardCall(d.z.detach(), *d.factors, d.base, False, True))[3] for d in sets]
    graphs: dict[How, Callable[[], None]] = {}
    facts = {**shape._asdict(), "backend": "cuda", "backward": backward}
    for how in [How(), *itertools.starmap(How, itertools.product(cuda.variants_of(shape.R), (1, 2, 4, 8, 16)))]:
        graph = prepared([call(d, backward, u, how) for d, u in zip(sets, saved, strict=True)], on)
        if isinstance(graph, str):
            yield {**facts, "how": str(how), "error": graph}
        else:
            graphs[how] = graph
    times: dict[How, list[float]] = {how: [] for how in graphs}
    for _ in range(SAMPLES):
        for how in random.sample(list(graphs), len(graphs)):
            times[how].append(microseconds(graphs[how], on) / len(sets))
    medians = {how: quantiles(values)["p50"] for how, values in times.items()}
    for how, median in medians.items():
        yield {**facts, "how": str(how), **how._asdict(), "chosen": how == How(), "us_p50": median}
    best = min(medians, key=lambda how: medians[how])
    yield {**facts, "best": str(best), "best_over_formula": medians[How()] / medians[best]}


def main() -> int:
    args = trial_arguments(__doc__).parse_args()
    reason = nk.available_backends()["cuda"]
    if args.dry_run or reason is not True:
        print(f"nothing to measure: {'a dry run' if args.dry_run else reason}")
        return 0
    trials = {
        f"{shape.name} T={shape.T} R={shape.R} {'backward' if backward else 'forward'}": Trial(
            "cuda", (shape, backward)
        )
        for shape, backward in itertools.product([*RANKS, *SHAPES], (False, True))
    }
    outcome = supervise(args, trials, sweep)
    print(outcome)
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
