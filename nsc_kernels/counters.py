"""What a launch on a GPU needs besides its arguments: where its output goes, and counters that nobody clears.

A launch finds its counters at zero and leaves them at zero, so that no launch has to clear them.

Two launches that may run at the same time must not share counters:

* eager launches on one stream run one after another: one slice per (device, stream), used again and again;
* a launch recorded in a CUDA graph is replayed on any stream, next to anything: it has a slice of its own for ever.

Slices are cut from arenas that are zeroed when they are allocated, outside of any capture, and never freed, because
graphs hold their addresses. Eager calls add an arena when the current one runs low, so that a capture finds room; one
that does not clears its counters with a recorded memset instead, right and one node slower.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

ARENA = 1 << 18  # 1 MiB: about 2,700 recorded launches at T = 2,048 (96 counters)
LOW = ARENA // 2
ALIGN = 32  # one 128-byte line, so that launches do not share one


def persistent(make: Callable[[], Tensor], device: torch.device) -> Tensor:
    """``make()``, to be kept for good and ready for every stream of ``device``.

    On a thread of its own, because this one's memory may come from a graph's pool: while torch.compile with
    mode="reduce-overhead" warms up, what stays allocated there is an error. Such a pool serves one thread only.
    """
    if device.type != "cuda":
        return make()

    def made() -> Tensor:
        with torch.cuda.device(device):
            kept = make()
            torch.cuda.current_stream().synchronize()
        return kept

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(made).result()


def output_over(base: Tensor | None, shape: tuple[int, int], like: Tensor, reuse_base: bool) -> Tensor:
    """``base`` itself if it may be overwritten and no two of its rows overlap, else a new tensor.

    In place is safe because an element of the output has one program or block, which reads base there before it writes.
    """
    if reuse_base and base is not None and base.stride(0) >= shape[1]:
        return base
    return like.new_empty(shape)


class CounterPool:
    """The counters of one device."""

    def __init__(self, device: torch.device):
        self.device = device
        self._arenas: list[Tensor] = []
        self._used = 0
        self._of_stream: dict[int, Tensor] = {}
        self._lock = threading.Lock()

    def take(self, count: int) -> Tensor:
        """``count`` or more int32 zeros for one launch on the device's current stream."""
        stream, capturing = 0, False
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):  # both questions are about the current device
                stream = torch.cuda.current_stream().cuda_stream
                capturing = torch.cuda.is_current_stream_capturing()
        with self._lock:
            if capturing:
                if self._left() < count:
                    return torch.zeros(count, dtype=torch.int32, device=self.device)
                return self._cut(count)
            kept = self._of_stream.get(stream)
            if kept is None or kept.numel() < count:
                self._reserve(max(count, ALIGN))
                kept = self._of_stream[stream] = self._cut(1 << (max(count, ALIGN) - 1).bit_length())
            self._reserve(LOW)
            return kept

    def _left(self) -> int:
        return self._arenas[-1].numel() - self._used if self._arenas else 0

    def _reserve(self, count: int) -> None:
        """Have room for ``count`` in the current arena."""
        if self._left() < count:
            size = max(ARENA, 2 * count)
            self._arenas.append(
                persistent(lambda: torch.zeros(size, dtype=torch.int32, device=self.device), self.device)
            )
            self._used = 0

    def _cut(self, count: int) -> Tensor:
        start = self._used
        self._used += -(-count // ALIGN) * ALIGN
        return self._arenas[-1][start : start + count]


@cache
def counter_pool(device: torch.device) -> CounterPool:
    """The counters of a device, of every kernel that counts there."""
    return CounterPool(device)
