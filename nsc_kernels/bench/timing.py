"""Timing several contenders against each other: interleaved, in one process, medians."""

from __future__ import annotations

import ctypes
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def wait_passively() -> None:
    """Start this program anew with OpenMP threads that sleep while they wait, unless the caller said how they are to.

    OpenMP asks once, when torch is loaded, and importing the package has loaded it.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        passive = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], passive)


def keep_freed_memory() -> None:
    """Tell glibc not to hand large blocks back: the page faults of fetching them again would be timed as well."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(M_TRIM_THRESHOLD, 2**30)


def interleaved(contenders: Mapping[str, Callable[[], object]], seconds: float, rounds: int = 9) -> dict[str, float]:
    """Median seconds per call of each contender.

    Every round times each contender once, a batch of calls at a time, so that a slow spell of the machine meets all
    of them. ``seconds`` is about what one contender may take in all.
    """
    calls = {}
    for name, run in contenders.items():
        run()
        start = time.perf_counter()
        run()
        once = max(time.perf_counter() - start, 1e-7)
        calls[name] = max(1, int(seconds / rounds / once))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                run()
            times[name].append((time.perf_counter() - start) / calls[name])
    return {name: statistics.median(values) for name, values in times.items()}
