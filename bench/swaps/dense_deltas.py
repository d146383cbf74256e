"""Merging dense deltas without a model: finding their factors, and reading them one at a time.

    python -m bench.swaps.dense_deltas --out bench/results/cpu/swaps

"factored" rows: one float32 matrix [d, d], the product of rank-16 factors or random, on one thread by processor time,
median of three; "svd" is torch.linalg.svd of the same, which would tell the rank as well. "streamed" rows: six tasks,
each a safetensors file of 16 dense deltas [2048, 2048], merged by nsc_merge.merge_factors from a mapping that reads a
matrix when it is asked for it, each method in a process of its own; "peak" is the highest resident set over that
before, "all" what the deltas take together. Each once as it is, and once with MALLOC_MMAP_THRESHOLD_=1048576, by which
glibc gives freed memory back: without, holes between what is kept stay in the resident set.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import nsc_merge
from bench.merging.cost_rows import environment, write_rows
from nsc_kernels.bench.resident_memory import peak, reset_peak, resident
from nsc_merge.adapters.algebra.factoring import factored

TASKS, LAYERS, WIDTH, RANK = 6, 16, 2048, 16


class OnDisk(Mapping[str, Tensor]):
    """The matrices of a safetensors file, each read when it is asked for."""

    def __init__(self, file: Path) -> None:
        self.file = file
        with safe_open(file, "pt") as held:
            self.paths = list(held.keys())

    def __getitem__(self, path: str) -> Tensor:
        with safe_open(self.file, "pt") as held:
            return held.get_tensor(path)

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)


def product(width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(RANK, width, generator=generator) / width**0.5 for _ in range(2))
    return B.t() @ A


def seconds(call: Callable[[], Any], rounds: int = 3) -> float:
    def once() -> float:
        begin = time.process_time()
        call()
        return time.process_time() - begin

    return statistics.median(once() for _ in range(rounds))


def factoring(width: int) -> dict[str, Any]:
    low, full = product(width, 1), torch.randn(width, width, generator=torch.Generator().manual_seed(2))
    found = factored(low)
    return {
        "op": "factored",
        "width": width,
        "rank": found.rank,
        "error": float((found.delta() - low.double()).norm() / low.double().norm()),
        "low_rank_s": seconds(lambda: factored(low)),
        "full_rank_s": seconds(lambda: factored(full)),
        "svd_s": seconds(lambda: torch.linalg.svd(low, full_matrices=False), 1) if width <= WIDTH else None,
    }


def streamed(method: str, folder: Path) -> dict[str, Any]:
    adapters = {f"task{task}": OnDisk(folder / f"{task}.safetensors") for task in range(TASKS)}
    torch.set_num_threads(1)
    reset_peak()
    before, begin = resident(), time.perf_counter()
    merged = nsc_merge.merge_factors(adapters, method)
    read = time.perf_counter() - begin
    paths = sum(1 for _ in merged)
    return {
        "op": "streamed",
        "method": method,
        "paths": paths,
        "read_and_factored_s": read,
        "merged_s": time.perf_counter() - begin - read,
        "peak_bytes": peak() - before,
        "all_bytes": 4 * TASKS * LAYERS * WIDTH**2,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for dense-deltas.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [environment(threads=1), *(factoring(width) for width in (1024, WIDTH, 4096))]
    with tempfile.TemporaryDirectory() as place:
        for task in range(TASKS):
            save_file(
                {f"layers.{n}": product(WIDTH, 100 * task + n) for n in range(LAYERS)},
                Path(place) / f"{task}.safetensors",
            )
        for threshold in (None, "1048576"):
            if threshold is not None:
                os.environ["MALLOC_MMAP_THRESHOLD_"] = threshold
            with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as alone:
                methods = ("task_arithmetic", "knots_ties", "ties")
                found = alone.map(streamed, methods, [Path(place)] * len(methods))
                rows += [{**row, "mmap_threshold": threshold} for row in found]
    for row in rows:
        print(row)
    if options.out:
        write_rows(options.out / "dense-deltas.jsonl", rows)


if __name__ == "__main__":
    main()
