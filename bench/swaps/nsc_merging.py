"""NSC's public code (wonyoung01/nsc_merging) beside ours: seconds of a step, memory, and how far apart the results are.

    NSC_MERGING_REPO=nsc_merging python -m bench.swaps.nsc_merging --out bench/results/cpu/swaps
    ... --width 256 --rounds 1                                                                          quicker

Its ``LinearTrainable`` needs peft below 0.19. A CLIP vision model of 32 blocks with random weights (its code measures
blocks 24 to 31 and no others), rank-16 adapters on q and v, float32, one thread; each task has its own batches. Three
ways: "theirs" is its ``train_merged_model``; "layers" the same with ``accelerate`` on its model; "merge" ours in its
place. A step is the time between two draws of the first task's loader, the first step left out; its seconds are the
median over all steps of all rounds, in which the ways take turns in one process. "call" is the whole call, loading
included. "peak" is the highest resident set of a call of two steps above that before, in a process of its own. "apart"
is the largest difference of a coefficient from theirs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from bench.merging.cost_rows import environment, write_rows
from bench.swaps.checkouts import checkout
from bench.swaps.nsc_inputs import arguments, their_merge, write_inputs
from nsc_kernels.bench.resident_memory import peak, reset_peak, resident
from nsc_merge.integrations.nsc_merging import train_merged_model
from nsc_merge.integrations.nsc_merging_layers import accelerate

WAYS = ("theirs", "layers", "merge")
BLOCKS = 32


class Drawn:
    """A loader that notes when its batches are drawn."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches, self.times = batches, list[float]()

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.times.append(time.perf_counter())
            yield batch


class Run:
    """One way of merging on the same inputs as the others."""

    def __init__(self, theirs: Any, inputs: dict[str, Any], tasks: int) -> None:
        self.theirs, self.inputs, self.tasks = theirs, inputs, tasks
        self.own = theirs.KernelMergeModel

        class Fused(theirs.KernelMergeModel):
            def to(self, *args: Any, **named: Any) -> Any:
                moved = super().to(*args, **named)
                accelerate(moved)
                return moved

        self.fused = Fused

    def call(self, way: str, steps: int) -> tuple[dict[str, Any], list[float], float]:
        """Coefficients, seconds of every step between the first and the last, and of the whole call."""
        self.theirs.KernelMergeModel = self.fused if way == "layers" else self.own
        merge = train_merged_model if way == "merge" else self.theirs.train_merged_model
        more: dict[str, Any] = {"progress": False} if way == "merge" else {}
        first, *others = self.inputs["val_loaders"]
        drawn = Drawn(first)
        inputs = {**self.inputs, "val_loaders": [drawn, *others]}
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            start = time.perf_counter()
            found = merge(arguments(self.tasks, steps), device="cpu", **inputs, **more)
            taken = time.perf_counter() - start
        return found.coeffs(), [b - a for a, b in itertools.pairwise(drawn.times[1:])], taken


@contextlib.contextmanager
def prepared(options: argparse.Namespace) -> Iterator[Run]:
    repository = checkout("NSC_MERGING_REPO")
    assert repository is not None
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place, their_merge(repository) as merge:
        inputs = write_inputs(
            Path(place), tasks=options.tasks, width=options.width, blocks=BLOCKS, image=options.image,
            batch=options.batch, batches=options.steps,
        )  # fmt: skip
        yield Run(merge, inputs, options.tasks)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All ways, taking turns, in this process."""
    taken: dict[str, list[tuple[list[float], float]]] = {way: [] for way in WAYS}
    found: dict[str, dict[str, Any]] = {}
    with prepared(options) as run:
        for _ in range(options.rounds):
            for way, row in taken.items():
                found[way], steps, seconds = run.call(way, options.steps)
                row.append((steps, seconds))
    rows = []
    for way, row in taken.items():
        apart = max(float(abs(found[way][path] - values).max()) for path, values in found["theirs"].items())
        rows.append(
            {
                "op": "nsc_merging",
                "way": way,
                "width": options.width,
                "tasks": options.tasks,
                "blocks": BLOCKS,
                "batch": options.batch,
                "tokens": (options.image // 8) ** 2 + 1,
                "steps": options.steps,
                "step_seconds": statistics.median(itertools.chain(*(steps for steps, _ in row))),
                "call_seconds": statistics.median(seconds for _, seconds in row),
                "apart": apart,
                "rounds": options.rounds,
                "load": os.getloadavg()[0],
            }
        )
    return rows


def memory(options: argparse.Namespace, way: str) -> dict[str, Any]:
    """One call in this process."""
    with prepared(options) as run:
        before = resident()
        reset_peak()
        run.call(way, 2)
        return {"peak_bytes": peak() - before}


def child(options: argparse.Namespace, what: str) -> Any:
    sizes = [f"--{name}={getattr(options, name)}" for name in ("width", "tasks", "batch", "image", "steps", "rounds")]
    command = [sys.executable, "-m", "bench.swaps.nsc_merging", *sizes, "--child", what]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for nsc_merging.jsonl")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--image", type=int, default=56, help="pixels of a side; a token has 8 by 8")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--child", choices=["time", *WAYS], help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if checkout("NSC_MERGING_REPO") is None:
        parser.error("expected a checkout in the environment variable NSC_MERGING_REPO, found none")
    if options.child:
        print(json.dumps(measure(options) if options.child == "time" else memory(options, options.child)))
        return
    rows = child(options, "time")
    print(f"{'':8} seconds/step  theirs/it  whole call      peak  apart")
    for row in rows:
        row.update(child(options, row["way"]))
        print(
            f"{row['way']:8} {row['step_seconds']:12.3f} {rows[0]['step_seconds'] / row['step_seconds']:9.2f}x "
            f"{row['call_seconds']:10.1f}s {row['peak_bytes'] / 1e6:7.0f} MB  {row['apart']:.1e}",
            flush=True,
        )
    if options.out:
        write_rows(options.out / "nsc_merging.jsonl", [environment(threads=1), *rows])


if __name__ == "__main__":
    main()
