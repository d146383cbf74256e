"""The processes that share the work of a merge, and what they add up.

A process works alone until :func:`together` says with whom: that torch.distributed is initialised says nothing, since
a program may merge in one of its processes only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """Processes that run the same program on the same merge.

    Attributes:
        rank: this process among them.
        size: how many they are.
        handle: torch's ``ProcessGroup``; None for a process alone.
    """

    rank: int = 0
    size: int = 1
    handle: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes, logs and draws."""
        return self.rank == 0

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Put the sums over all processes into ``tensors``, in place, by one exchange for each dtype and device; all
        processes then hold the same bits.
        """
        if self.size == 1:
            return
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for alike in kinds.values():
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in alike])
            torch.distributed.all_reduce(flat, group=self.handle)
            parts = flat.split([tensor.numel() for tensor in alike])
            with torch.no_grad():
                for tensor, part in zip(alike, parts, strict=True):
                    tensor.copy_(part.view_as(tensor))

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in some process."""
        return any(self.share([flag]))

    def share(self, value: Sequence[Any]) -> list[Any]:
        """The lists ``value`` of all processes joined, in the order of ranks."""
        if self.size == 1:
            return list(value)
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, value, group=self.handle)
        return [one for part in found for one in part]

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """A block in which no process waits for another, and which all leave alike: what fails in one ends them all,
        with one exit status and one message, that of the first which failed.
        """
        if self.size == 1:
            yield
            return
        try:
            yield
        except Exception as error:
            status = int(getattr(error, "exit_status", 1))
            if next(found for found in enumerate(self.share([status])) if found[1])[0] != self.rank:
                raise SystemExit(status) from error
            raise
        statuses = [status for status in self.share([0]) if status]
        if statuses:
            raise SystemExit(statuses[0])

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            torch.distributed.barrier(group=self.handle)


_ALONE = Group()
_CURRENT: ContextVar[Group] = ContextVar("nsc_merge_processes")


def current() -> Group:
    """The processes that share the work at hand; this one alone unless :func:`together` says otherwise."""
    return _CURRENT.get(_ALONE)


@contextmanager
def together(handle: Any) -> Iterator[Group]:
    """Share the work within a ``with`` block among the processes of a ``torch.distributed.ProcessGroup``, all of which
    must enter it with equal arguments; None leaves things as they are.
    """
    if handle is None:
        yield current()
        return
    group = Group(torch.distributed.get_rank(handle), torch.distributed.get_world_size(handle), handle)
    token = _CURRENT.set(group)
    try:
        yield group
    finally:
        _CURRENT.reset(token)
