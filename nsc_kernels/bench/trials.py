"""Trials in processes of their own: a crash, a hang or a broken CUDA context costs the trial that met it, and no other.

A script names its trials in the order of their worth and says how one is run; :func:`supervise` does the rest:

* Workers are the same script, started again. A worker serves one group (a backend) and is handed one trial at a time.
* The file has a row ``started`` before each trial, what the trial yields as it comes, and a row ``ended`` after it. So
  when the machine goes away, the file names the trial that was under way and holds everything before.
* A trial over its limit is killed (``hung``); a worker that ends by itself is replaced (``died``). So is one whose
  device no longer answers after a trial that failed: an illegal address stays with the process.
* Run again with the same file, it goes on: what has ended at the same source and settings is not repeated (``--again``
  repeats what did not end well), and what was under way when everything stopped comes last.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

import torch

import nsc_kernels as nk
from nsc_kernels import verified_hardware

from .environment import source_of
from .measuring import Rows, arguments, device, own_stream, read_rows

START_LIMIT = 180.0  # seconds for a worker to import everything and meet its device
GRACE = 10.0  # seconds that a trial under way still has when the time for all of them is up
DONE, FAILED, HUNG, DIED, STOPPED = "done", "failed", "hung", "died", "stopped"
LAST = "\x1e"  # begins the line that ends a trial


class Trial(NamedTuple):
    """``group``: a worker serves one; its first word is the backend. ``limit``: seconds.

    ``settings``: what else its rows depend on, so that it is repeated where that has changed.
    """

    group: str
    payload: Any
    limit: float = 60.0
    settings: str | None = None

    @property
    def backend(self) -> str:
        return self.group.split()[0]

    @property
    def source(self) -> str | None:
        return source_of(self.backend)

    def wrote(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of its name is of these sources and settings, and not of earlier ones."""
        return row["source"] == self.source and row.get("settings", self.settings) == self.settings


# What one trial yields, on a device and on a stream of the worker's own. An exception ends the trial as failed, and so
# does a row with ``passed`` False.
RunOne = Callable[[Any, torch.device], Iterable[dict[str, Any]]]
# What is said of a trial that ended: its name, its last row, how long it took, and what it yielded.
Said = Callable[[str, dict[str, Any], float, list[dict[str, Any]]], None]
# What a worker does first, given whether it is a dry run: :func:`measuring.device`, or more.
Meet = Callable[[bool], torch.device]


class Outcome(NamedTuple):
    """How many trials are done, ended otherwise, and are left to another run."""

    done: int
    failed: int
    left: int

    @property
    def code(self) -> int:
        """For the shell: 1 if a trial failed, 3 if some are left to another run."""
        return 1 if self.failed else 3 if self.left else 0

    def __str__(self) -> str:
        return f"{self.done} trials done, {self.failed} failed, {self.left} left"


def trial_arguments(description: str | None, workers: int = 1) -> argparse.ArgumentParser:
    """:func:`measuring.arguments`, and how the trials are run."""
    parser = arguments(description)
    parser.add_argument("--workers", type=int, default=workers, help="processes at a time (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3600, help="start no new trial after this long")
    parser.add_argument("--limit", type=float, help="seconds that any trial may take, in place of its own limit")
    parser.add_argument("--again", action="store_true", help="repeat trials that failed, hung or died before")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def add_backends(parser: argparse.ArgumentParser) -> None:
    """``--backends``; :func:`available` says which of them there are."""
    ours = verified_hardware.BACKENDS
    parser.add_argument("--backends", nargs="+", choices=ours, default=list(ours))


def available(backends: Sequence[str]) -> list[str]:
    return [name for name in backends if nk.available_backends()[name] is True]


def results(path: Path) -> list[dict[str, Any]]:
    """What the last run of every trial yielded; if it did not end well also its ``ended`` row, which says ``why``."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in read_rows(path):
        if "started" in row:
            found[row["trial"]] = []
        elif "trial" in row and row.get("ended") not in (DONE, STOPPED):
            found.setdefault(row["trial"], []).append(row)
    return [row for rows in found.values() for row in rows]


def under_way(path: Path) -> list[str]:
    """Trials that were started and not ended: where a run was cut off."""
    last = {row["trial"]: row for row in read_rows(path) if "started" in row or "ended" in row}
    return [key for key, row in last.items() if row.get("ended", STOPPED) == STOPPED]


def say_end(key: str, last: dict[str, Any], seconds: float, rows: list[dict[str, Any]]) -> None:
    print(f"{key}: {last['ended']} after {seconds:.1f} s  {last.get('why', '')}", flush=True)


def supervise(
    args: argparse.Namespace,
    trials: Mapping[str, Trial],
    run_one: RunOne,
    meet: Meet = device,
    said: Said = say_end,
    more: Sequence[str] = (),
) -> Outcome:
    """Run what is left of the trials. In a worker: serve them, and do not return.

    ``more``: arguments that a worker is given besides those of this process.
    """
    if args.worker:
        _serve(args, trials, run_one, meet)
    return _Supervisor(args, trials, said, more).run()


def _serve(args: argparse.Namespace, trials: Mapping[str, Trial], run_one: RunOne, meet: Meet) -> NoReturn:
    """Keys come on standard input; answers go where standard output went, which nothing else can print to any more."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: do not outlive who reads the answers
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    on = meet(args.dry_run)
    answers.write("ready\n")
    with own_stream(on):
        for line in sys.stdin:
            last: dict[str, Any] = {"ended": DONE}
            try:
                for row in run_one(trials[line.rstrip("\n")].payload, on):
                    answers.write(json.dumps(row) + "\n")
                    if row.get("passed") is False:
                        last = {"ended": FAILED, "why": row.get("why")}
            except Exception as error:
                last = {"ended": FAILED, "why": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
            answers.write(LAST + json.dumps(last | {"healthy": _cleaned(on)}) + "\n")
    os._exit(0)


def _cleaned(on: torch.device) -> bool:
    """Give the trial's memory back; False where the device no longer answers."""
    if "torch._dynamo" in sys.modules:  # which takes seconds to import
        torch._dynamo.reset()
    gc.collect()
    if on.type == "cuda":
        try:
            torch.cuda.synchronize(on)
            torch.cuda.empty_cache()
        except RuntimeError:
            return False
    return True


class _Worker:
    """A process that serves one group. Whatever it is doing, it may be killed."""

    def __init__(self, group: str, more: Sequence[str]):
        self.group = group
        pipe = subprocess.PIPE
        # As this process was started, with -m or by a file: only so do a module's relative imports work again.
        command = [sys.executable, *sys.orig_argv[1:], *more, "--worker"]
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self.answers: IO[str] = self.process.stdout  # type: ignore[assignment]

    def started(self) -> bool:
        timer = threading.Timer(START_LIMIT, self.process.kill)
        timer.start()
        ready = self.answers.readline() == "ready\n"
        timer.cancel()
        return ready

    def answer(self, key: str, seconds: float, row: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Hand the worker a trial, and its rows on as they come; returns how the trial ended."""
        timed_out = threading.Event()

        def kill() -> None:
            timed_out.set()
            self.process.kill()

        timer = threading.Timer(seconds, kill)
        timer.start()
        try:
            print(key, file=self.process.stdin, flush=True)
            for line in self.answers:
                if line.startswith(LAST):
                    return json.loads(line.removeprefix(LAST))
                row(json.loads(line))
        except (BrokenPipeError, json.JSONDecodeError):  # it died before, or within a line
            pass
        finally:
            timer.cancel()
        self.process.kill()
        code = self.process.wait()
        if timed_out.is_set():
            return {"ended": HUNG, "why": f"killed after {seconds:.0f} s", "healthy": False}
        return {"ended": DIED, "why": f"its process ended with code {code}", "healthy": False}

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class _Supervisor:
    def __init__(self, args: argparse.Namespace, trials: Mapping[str, Trial], said: Said, more: Sequence[str]):
        self.args, self.trials, self.said, self.more = args, trials, said, more
        self.end = time.monotonic() + args.seconds
        self.lock = threading.Lock()
        self.ends: dict[str, str] = {}
        cut_off = []
        for row in read_rows(args.out):
            trial = trials.get(row.get("trial", ""))
            if trial is None or not trial.wrote(row) or row.get("dry_run") != args.dry_run:
                continue
            if "started" in row:
                cut_off.append(row["trial"])
            elif "ended" in row:
                self.ends[row["trial"]] = row["ended"]
        repeated = (STOPPED, *((FAILED, HUNG, DIED) if args.again else ()))
        self.ends = {key: end for key, end in self.ends.items() if end not in repeated}
        self.waiting = [key for key in trials if key not in self.ends]
        self.waiting.sort(key=lambda key: key in cut_off)  # stable: the rest stays in order
        self.failed_starts: dict[str, int] = {}
        self.stopped_by: BaseException | None = None
        self.rows = Rows(args.out, keep=True)

    def run(self) -> Outcome:
        slots = [threading.Thread(target=self._slot, args=(i,)) for i in range(max(self.args.workers, 1))]
        for slot in slots:
            slot.start()
        for slot in slots:
            slot.join()
        if self.stopped_by is not None:
            raise self.stopped_by
        ends = list(self.ends.values())
        failed = sum(end in (FAILED, HUNG, DIED) for end in ends)
        return Outcome(ends.count(DONE), failed, len(self.trials) - ends.count(DONE) - failed)

    def _write(self, key: str, row: dict[str, Any]) -> dict[str, Any]:
        trial = self.trials[key]
        settings = {} if trial.settings is None else {"settings": trial.settings}
        with self.lock:
            return self.rows.write(
                {"trial": key, "backend": trial.backend, **row, **settings, "dry_run": self.args.dry_run}
            )

    def _next(self, group: str | None, slot: int) -> str | None:
        """The next trial of the group at hand, else of one that other slots leave alone as far as possible."""
        with self.lock:
            if not self.waiting or time.monotonic() > self.end:
                return None
            groups = list(dict.fromkeys(self.trials[key].group for key in self.waiting))
            if group not in groups:
                group = groups[slot % len(groups)]
            key = next(key for key in self.waiting if self.trials[key].group == group)
            self.waiting.remove(key)
            return key

    def _slot(self, slot: int) -> None:
        try:
            self._work(slot)
        except BaseException as error:  # of the report or of who says it, as where nobody reads that any more
            with self.lock:
                self.stopped_by, self.waiting = self.stopped_by or error, []

    def _work(self, slot: int) -> None:
        worker: _Worker | None = None
        while (key := self._next(worker.group if worker else None, slot)) is not None:
            group = self.trials[key].group
            if worker is not None and worker.group != group:
                worker.close()
                worker = None
            worker = worker or self._started(group)
            if worker is None:
                self._ended(key, {"ended": DIED, "why": "its process did not start"}, 0.0, [])
            elif not self._attempt(worker, key):
                worker.close()
                worker = None
        if worker is not None:
            worker.close()

    def _started(self, group: str) -> _Worker | None:
        if self.failed_starts.get(group, 0) >= 2:
            return None
        worker = _Worker(group, self.more)
        if worker.started():
            return worker
        worker.close()
        self.failed_starts[group] = self.failed_starts.get(group, 0) + 1
        return None

    def _attempt(self, worker: _Worker, key: str) -> bool:
        """Whether the worker can take another trial after this one."""
        begin = time.monotonic()
        limit = self.args.limit or self.trials[key].limit
        left = max(self.end + GRACE - begin, 1.0)
        self._write(key, {"started": time.time()})
        yielded: list[dict[str, Any]] = []

        def keep(row: dict[str, Any]) -> None:
            yielded.append(self._write(key, row))

        last = worker.answer(key, min(limit, left), keep)
        if last["ended"] == HUNG and left < limit:
            last |= {"ended": STOPPED, "why": "the time for all trials was up"}
        self._ended(key, last, time.monotonic() - begin, yielded)
        return last["healthy"]

    def _ended(self, key: str, last: dict[str, Any], seconds: float, yielded: list[dict[str, Any]]) -> None:
        self._write(key, last | {"seconds": seconds})
        self.ends[key] = last["ended"]
        self.said(key, last, seconds, yielded)
