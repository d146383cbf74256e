"""Trials in processes of their own: a crash, a hang or a broken CUDA context costs the trial that met it, and no other.

A script names its trials in the order of their worth and says how one is run; :func:`supervise` does the rest:

* Workers are the same script, started again. A worker serves one group (a backend) and is handed one trial at a time.
* The file has a row ``started`` before each trial, what the trial yields as it comes, and a row ``ended`` after it. So
  when the machine goes away, the file names the trial that was under way and holds everything before.
* A trial over its limit is killed (``hung``); a worker that ends by itself is replaced (``died``). So is one whose
  device no longer answers after a trial that failed: an illegal address stays with the process.
* Ctrl-C ends it at once: what is under way is left to another run, as where the time is up (``stopped``).
* Run again with the same file, it goes on: what has ended at the same source and settings is not repeated (``--again``
  repeats what did not end well), and what was under way when everything stopped comes last. What found no process, as
  where another program has all of the GPU, has not been tried. While one process adds to a file, another leaves it.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nsc_kernels as nk
from nsc_kernels import verified_hardware

from .environment import source_of
from .measuring import Rows, arguments, device, read_rows
from .workers import DIED, DONE, FAILED, HUNG, OF_TRIALS, STOPPED, Meet, RunOne, Worker, serve

NOT_STARTED = "its process did not start"
GRACE = 10.0  # seconds that a trial under way still has when the time for all of them is up


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


# What is said of a trial that ended: its name, its last row, how long it took, and what it yielded.
Said = Callable[[str, dict[str, Any], float, list[dict[str, Any]]], None]


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
        serve(lambda key: trials[key].payload, args.dry_run, run_one, meet)
    if OF_TRIALS in os.environ:
        # Of a notebook, or of -c: its code called the script with arguments of its own, and would without end.
        raise RuntimeError("trials start the command line again that began them: run this as a command, with python -m")
    return _Supervisor(args, trials, said, more).run()


def _await(end: threading.Event) -> None:
    """Python handles a signal in the main thread, which does not wake where the system gave it to another one."""
    while not end.wait(0.5):
        pass


class _Supervisor:
    def __init__(self, args: argparse.Namespace, trials: Mapping[str, Trial], said: Said, more: Sequence[str]):
        self.args, self.trials, self.said, self.more = args, trials, said, more
        try:
            self.rows = Rows(args.out, keep=True, alone=True)
        except BlockingIOError:
            # Both would run all, and count what the other finds of a trial as their own.
            print(f"{args.out}: another process adds rows to it: let it end, or give another --out", file=sys.stderr)
            raise SystemExit(3) from None
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
                self.ends[row["trial"]] = STOPPED if row.get("why") == NOT_STARTED else row["ended"]
        repeated = (STOPPED, *((FAILED, HUNG, DIED) if args.again else ()))
        self.ends = {key: end for key, end in self.ends.items() if end not in repeated}
        self.waiting = [key for key in trials if key not in self.ends]
        self.waiting.sort(key=lambda key: key in cut_off)  # stable: the rest stays in order
        self.failed_starts: dict[str, int] = {}
        self.stopped_by: BaseException | None = None
        self.workers: set[Worker] = set()  # all that were started

    def run(self) -> Outcome:
        # Not joined: until Python 3.12 a join that Ctrl-C interrupts takes its thread for ended.
        ends = [threading.Event() for _ in range(max(self.args.workers, 1))]
        for slot, end in enumerate(ends):
            threading.Thread(target=self._slot, args=(slot, end)).start()
        try:
            for end in ends:
                _await(end)
        except BaseException as error:  # Ctrl-C
            self._stop(error)
            for end in ends:
                _await(end)
        self.rows.close()
        if self.stopped_by is not None:
            raise self.stopped_by
        found = list(self.ends.values())
        failed = sum(end in (FAILED, HUNG, DIED) for end in found)
        return Outcome(found.count(DONE), failed, len(self.trials) - found.count(DONE) - failed)

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

    def _slot(self, slot: int, end: threading.Event) -> None:
        try:
            self._work(slot)
        except BaseException as error:  # of the report or of who says it, as where nobody reads that any more
            self._stop(error)
        finally:
            end.set()

    def _stop(self, error: BaseException) -> None:
        """Nothing more is begun, and what is under way ends."""
        with self.lock:
            self.stopped_by, self.waiting = self.stopped_by or error, []
            for worker in self.workers:
                worker.process.kill()

    def _work(self, slot: int) -> None:
        worker: Worker | None = None
        while (key := self._next(worker.group if worker else None, slot)) is not None:
            group = self.trials[key].group
            if worker is not None and worker.group != group:
                worker.close()
                worker = None
            worker = worker or self._started(group)
            if worker is None and self._given_back(key, group):
                continue
            # The other may have ended while this one was told that there is no place for it.
            worker = worker or self._started(group)
            if worker is None:
                last = self._or_stopped({"ended": DIED, "why": NOT_STARTED})
                self._ended(key, last, 0.0, [])
            elif not self._attempt(worker, key):
                worker.close()
                worker = None
        if worker is not None:
            worker.close()

    def _given_back(self, key: str, group: str) -> bool:
        """Whether the group has another process, to which the trial is left then; returns when that has ended.

        One more may be too many, as on a GPU that serves only one.
        """
        with self.lock:
            if self.stopped_by is not None or not self._has_another(group):
                return False
            self.waiting.insert(0, key)
        while self._has_another(group):
            time.sleep(0.1)
        return True

    def _has_another(self, group: str) -> bool:
        return any(w.group == group and w.process.poll() is None for w in [*self.workers])

    def _started(self, group: str) -> Worker | None:
        with self.lock:
            if self.stopped_by is not None or self.failed_starts.get(group, 0) >= 2:
                return None
            worker = Worker(group, self.more)
            self.workers.add(worker)
        if worker.started():
            return worker
        worker.close()
        if not self._has_another(group):
            self.failed_starts[group] = self.failed_starts.get(group, 0) + 1
        return None

    def _attempt(self, worker: Worker, key: str) -> bool:
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
        self._ended(key, self._or_stopped(last), time.monotonic() - begin, yielded)
        return last["healthy"]

    def _or_stopped(self, last: dict[str, Any]) -> dict[str, Any]:
        """A process that this one has killed says nothing of its trial."""
        stopped = self.stopped_by is not None and last["ended"] == DIED
        return last | {"ended": STOPPED, "why": "interrupted"} if stopped else last

    def _ended(self, key: str, last: dict[str, Any], seconds: float, yielded: list[dict[str, Any]]) -> None:
        self._write(key, last | {"seconds": seconds})
        self.ends[key] = last["ended"]
        self.said(key, last, seconds, yielded)
