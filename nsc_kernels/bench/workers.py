"""A process that serves trials, seen from both of its ends. Whatever it is doing, it may be killed."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import IO, Any, NoReturn

import torch

from .measuring import own_stream

START_LIMIT = 180.0  # seconds for a worker to import everything and meet its device
DONE, FAILED, HUNG, DIED, STOPPED = "done", "failed", "hung", "died", "stopped"
OF_TRIALS = "NSC_PROCESS_OF_TRIALS"  # in the environment of what a worker was started as
LAST = "\x1e"  # begins the line that ends a trial

# What one trial yields, on a device and on a stream of the worker's own. An exception ends the trial as failed, and so
# does a row with ``passed`` False.
RunOne = Callable[[Any, torch.device], Iterable[dict[str, Any]]]
# What a worker does first, given whether it is a dry run: :func:`measuring.device`, or more.
Meet = Callable[[bool], torch.device]


def serve(payload_of: Callable[[str], Any], dry_run: bool, run_one: RunOne, meet: Meet) -> NoReturn:
    """Keys come on standard input; answers go where standard output went, which nothing else can print to any more."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: do not outlive who reads the answers
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    on = meet(dry_run)
    with own_stream(on):  # the first to need the device
        answers.write("ready\n")
        for line in sys.stdin:
            last: dict[str, Any] = {"ended": DONE}
            try:
                for row in run_one(payload_of(line.rstrip("\n")), on):
                    answers.write(json.dumps(row) + "\n")
                    if row.get("passed") is False:
                        last = {"ended": FAILED, "why": row.get("why")}
            except Exception as error:
                last = {"ended": FAILED, "why": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
            healthy = _cleaned(on)
            if not healthy and last["ended"] == DONE:
                last = {"ended": FAILED, "why": "the device does not answer after it"}
            answers.write(LAST + json.dumps(last | {"healthy": healthy}) + "\n")
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


class Worker:
    """The process from outside: it serves one group."""

    def __init__(self, group: str, more: Sequence[str]):
        self.group = group
        pipe = subprocess.PIPE
        # As this process was started, with -m or by a file: only so do a module's relative imports work again.
        command = [sys.executable, *sys.orig_argv[1:], *more, "--worker"]
        # In a session of its own: Ctrl-C on a terminal is for this process, which says what becomes of the trial.
        environment = os.environ | {OF_TRIALS: "1"}
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env=environment, start_new_session=True
        )
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
