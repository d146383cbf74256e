"""Processes that a launcher started: ``torchrun`` and ``accelerate launch`` tell them apart by the same variables."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch

from nsc_merge.processes.group import Group, together

# Processes wait for each other no longer than this: one that does not answer, its machine having gone down, ends the
# others after it. The death of a process is noticed at once, by gloo or by the launcher.
LIMIT = timedelta(minutes=10)
_REQUESTS = (signal.SIGINT, signal.SIGTERM)


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def launched_rank() -> int:
    """This process among those that a launcher started."""
    return int(os.environ.get("RANK", "0")) if launched() else 0


def launched_here() -> int:
    """How many processes a launcher started on this machine, this one included."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


@contextmanager
def started() -> Iterator[Group]:
    """The processes that a launcher started, sharing the work within a ``with`` block: NCCL between GPUs, gloo between
    CPUs. A process that was started by itself is alone.

    A launcher asks the others to end when it lost one, as a batch system asks whom it stops: the first such request
    raises a KeyboardInterrupt, as Ctrl-C does, and later ones are not heard. Of several processes, nor is any after an
    error, so that the process can still say what it was.
    """
    if not launched():
        # Of Ctrl-C that is Python's own.
        with _heard({signal.SIGTERM: _end}):
            yield Group()
        return
    before = {request: signal.signal(request, _end) for request in _REQUESTS}
    try:
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=LIMIT)
        with together(torch.distributed.group.WORLD) as group:
            yield group
    except BaseException:
        _listen_no_more()
        raise
    # Not after an error: it would wait for what the others never send.
    torch.distributed.destroy_process_group()
    for request, handler in before.items():
        signal.signal(request, handler)


@contextmanager
def undisturbed() -> Iterator[None]:
    """A block during which requests to end are not heard: for the last file that is written, and while a model gets
    back what it was given with.
    """
    with _heard(dict.fromkeys(_REQUESTS, signal.SIG_IGN)):
        yield


@contextmanager
def _heard(handlers: Mapping[signal.Signals, Any]) -> Iterator[None]:
    """A block in which these requests are handled so; afterwards all are as before. Threads have no say in it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Of one that was not set from Python there is none to be given back.
    before = {request: held for request in _REQUESTS if (held := signal.getsignal(request)) is not None}
    for request, handler in handlers.items():
        if request in before:
            signal.signal(request, handler)
    try:
        yield
    finally:
        for request, handler in before.items():
            signal.signal(request, handler)


def _end(*_: Any) -> None:
    _listen_no_more()
    raise KeyboardInterrupt


def _listen_no_more() -> None:
    for request in _REQUESTS:
        signal.signal(request, signal.SIG_IGN)
