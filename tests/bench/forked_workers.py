"""Workers of trials out of one process that has imported the libraries, which each would otherwise do anew."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from nsc_kernels.bench import workers

if TYPE_CHECKING:
    import pytest

_fork = multiprocessing.get_context("forkserver")


class Forked:
    """What :class:`workers.Worker` takes of ``subprocess.Popen``."""

    def __init__(self, command: list[str], *, env: dict[str, str], **_: Any) -> None:
        asked, asks = _fork.Pipe(duplex=False)
        answers, answered = _fork.Pipe(duplex=False)
        self._process = _fork.Process(target=_worker, args=(command[1:], env, os.getcwd(), asked, answered))
        self._process.start()
        for end in (asked, answered):
            end.close()
        self.stdin = os.fdopen(os.dup(asks.fileno()), "w")
        self.stdout = os.fdopen(os.dup(answers.fileno()))
        self.kill = self._process.kill

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode


def _worker(arguments: list[str], environment: dict[str, str], folder: str, asked: Connection, answered: Connection):
    """As ``python`` with these arguments would be."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(asked.fileno(), 0)
    os.dup2(answered.fileno(), 1)
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


@contextmanager
def server(*libraries: str) -> Iterator[None]:
    """What is started within it is forked of a process that has imported these."""
    _stop()
    _fork.set_forkserver_preload([workers.__name__, *libraries])
    yield
    _stop()


def _stop() -> None:
    """Other tests have a server with libraries of their own."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


def forked(patch: pytest.MonkeyPatch) -> None:
    """Have trials start their workers so."""
    patch.setattr(workers, "subprocess", SimpleNamespace(Popen=Forked, PIPE=None))
