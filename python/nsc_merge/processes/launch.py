"""Processes that a launcher started: ``torchrun`` and ``accelerate launch`` tell them apart by the same variables."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nsc_merge.processes.group import Group, together


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def started() -> Iterator[Group]:
    """The processes that a launcher started, sharing the work within a ``with`` block: NCCL between GPUs, gloo between
    CPUs. A process that was started by itself is alone.
    """
    if not launched():
        yield Group()
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        with together(torch.distributed.group.WORLD) as group:
            yield group
    finally:
        torch.distributed.destroy_process_group()
