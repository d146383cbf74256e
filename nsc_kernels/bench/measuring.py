"""What the GPU scripts share: rows in JSONL as they are measured, the device, and time."""

from __future__ import annotations

import argparse
import fcntl
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from .environment import source_of


class Rows:
    """Writes each row at once, so that a script that is stopped leaves what it has. ``keep``: after what is there.
    ``alone``: while no other process does.

    Raises:
        BlockingIOError: if another one does.
    """

    def __init__(self, path: Path, keep: bool = False, alone: bool = False):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a" if keep else "w")
        if alone:
            _lock(self._file)
        cut_off = keep and path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
        self._file.write("\n" if cut_off else "")
        self.count = 0

    def write(self, row: dict[str, Any]) -> dict[str, Any]:
        """Returns the row as it is in the file: with the source in use here, unless it says of which it is."""
        written = {**row, "source": row.get("source") or source_of(row.get("backend"))}
        self._file.write(json.dumps(written) + "\n")
        self._file.flush()
        self.count += 1
        return written

    def close(self) -> None:
        self._file.close()


def check_device(kind: str) -> None:
    """
    Raises:
        ValueError: for a GPU that is not there.
    """
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: there is no CUDA device; --device cpu measures the CPU's backend")


def _lock(file: IO[str]) -> None:
    """Until the file is closed or the process ends, also for other machines on a shared filesystem."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise
    except OSError:  # A filesystem that has no locks, as some of clusters: nobody can be told apart there.
        pass


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; none if it is not there. A line that was cut off is left out, wherever it was."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to write")
    parser.add_argument(
        "--dry-run", action="store_true", help="small sizes on the CPU, to try the script: no row is a measurement"
    )
    return parser


def device(dry_run: bool) -> torch.device:
    """The GPU, or the CPU for a dry run, for which Triton must interpret."""
    return torch.device("cpu") if dry_run else torch.device("cuda", torch.cuda.current_device())


@contextmanager
def own_stream(on: torch.device) -> Iterator[None]:
    """A stream of our own, current for everything in the block: forward, backward, timing, capture.

    Autograd runs a backward on the stream of its forward, and keeps that of a leaf's first use. Were one of them the
    default stream, a capture of the backward alone would have to wait for it, which fails.
    """
    if on.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(on)
    stream.wait_stream(torch.cuda.current_stream(on))
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def synchronize(on: torch.device) -> None:
    if on.type == "cuda":
        torch.cuda.synchronize(on)


def slug() -> str:
    """The GPU's name as a folder name."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no-gpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def quantiles(samples: Sequence[float]) -> dict[str, float]:
    """Median and the 20th and 80th percentile."""
    ordered = sorted(samples)
    return {
        "p20": ordered[len(ordered) // 5],
        "p50": statistics.median(ordered),
        "p80": ordered[len(ordered) - 1 - len(ordered) // 5],
        "samples": len(ordered),
    }


def microseconds(run: Callable[[], None], on: torch.device) -> float:
    """Device time of ``run`` between two events; host time on the CPU."""
    if on.type != "cuda":
        start = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end)


def captured(calls: Sequence[Callable[[], Any]], on: torch.device) -> Callable[[], None]:
    """One CUDA graph of the calls in turn, after one run to warm up; a plain loop on the CPU.

    Captured on the current stream, which must be one of our own (:func:`own_stream`).
    """
    if on.type != "cuda":

        def plain() -> None:
            for call in calls:
                call()

        return plain
    stream = torch.cuda.current_stream(on)
    if stream == torch.cuda.default_stream(on):
        raise RuntimeError("the default stream cannot be captured: wrap the whole of it in own_stream()")
    for call in calls:
        call()
    return recorded(calls, on)


def recorded(calls: Sequence[Callable[[], Any]], on: torch.device) -> Callable[[], None]:
    """:func:`captured` without the run before it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(on)):
        for call in calls:
            call()
    return graph.replay
