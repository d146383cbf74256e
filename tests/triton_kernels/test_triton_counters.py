"""Counters are found at zero, left at zero, and never shared by launches that may overlap."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from checks import check_backward, check_forward
from test_triton_kernels import ONE_SLICE, SLICED, TILE

from nsc_kernels.counters import ALIGN, ARENA, CounterPool
from nsc_kernels.triton import launch
from nsc_kernels.triton.columns import owner_table
from nsc_kernels.verify.problems import problem


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> CounterPool:
    """A pool of this test's own, used by every launch in it."""
    fresh = CounterPool(device)
    monkeypatch.setattr(launch, "counter_pool", lambda device: fresh)
    return fresh


@pytest.mark.parametrize("config", [TILE, SLICED, ONE_SLICE], ids=["tile", "sliced", "one_slice"])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=["both", "dz", "dlam"])
def test_every_counter_is_zero_after_a_launch(pool, config, needs, device):
    for T in (1, 16, 45):
        p = problem(T, 40, 24, [4, 8], torch.float32, device)
        check_forward(p, config)
        check_backward(p, config, need_dz=needs[0], need_dlam=needs[1])
        assert pool._arenas or not needs[1], "dlam is summed with counters in every schedule"
        for arena in pool._arenas:
            assert not arena.any()


def test_a_launch_is_right_after_launches_of_other_shapes(pool, device):
    """One stream's slice serves launches of any number of tiles in turn."""
    for T, config in ((45, SLICED), (3, ONE_SLICE), (33, replace(SLICED, slices=2)), (45, TILE), (45, SLICED)):
        p = problem(T, 40, 24, [4, 8], torch.float32, device, seed=T)
        check_forward(p, config)
        check_backward(p, config)


def test_a_stream_keeps_its_slice_until_it_needs_a_larger_one(device):
    pool = CounterPool(device)
    small = pool.take(5)
    assert small.numel() >= 5
    assert pool.take(ALIGN).data_ptr() == small.data_ptr()
    large = pool.take(10 * ALIGN)
    assert large.numel() >= 10 * ALIGN
    apart = large.data_ptr() >= small.data_ptr() + 4 * small.numel()
    assert apart
    assert pool.take(5).data_ptr() == large.data_ptr()


def test_a_request_larger_than_an_arena_is_served(device):
    taken = CounterPool(device).take(ARENA + 1)
    assert taken.numel() > ARENA
    assert not taken.any()


class FakeGPUs:
    """GPUs that are not there, for the bookkeeping alone: which is current, its stream, where a capture goes on."""

    def __init__(self) -> None:
        self.current = 0
        self.cuda_stream = 1
        self.capturing: set[int] = set()
        self.allocated: list[tuple[int, int]] = []  # thread and current device of each tensor
        self.waits = 0

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index
        yield
        self.current = before

    def current_stream(self) -> FakeGPUs:
        return self

    def synchronize(self) -> None:
        self.waits += 1

    def is_current_stream_capturing(self) -> bool:
        return self.current in self.capturing

    def tensors(self, make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: Any, device: torch.device, **kwargs: Any) -> torch.Tensor:
            self.allocated.append((threading.get_ident(), self.current))
            return make(*args, **kwargs)

        return made


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGPUs:
    fake = FakeGPUs()
    for name in ("device", "current_stream", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    for name in ("zeros", "tensor"):
        monkeypatch.setattr(torch, name, fake.tensors(getattr(torch, name)))
    return fake


def test_streams_and_captured_launches_have_slices_of_their_own(gpu):
    pool = CounterPool(torch.device("cuda", 0))
    first = pool.take(40)
    gpu.cuda_stream = 2
    second = pool.take(40)
    gpu.capturing = {0}
    captured = [pool.take(40) for _ in range(3)]
    gpu.capturing = set()
    again = pool.take(40)
    slices = [first, second, *captured]
    places = sorted((s.data_ptr(), s.numel()) for s in slices)
    for (a, n), (b, _) in itertools.pairwise(places):
        assert a + 4 * n <= b, "slices overlap"
    assert again.data_ptr() == second.data_ptr()


def test_a_capture_that_finds_no_room_clears_its_own_counters(gpu):
    pool = CounterPool(torch.device("cuda", 0))
    gpu.capturing = {0}
    unprepared = pool.take(40)
    assert unprepared.numel() == 40
    assert not pool._arenas, "nothing may be allocated for keeps inside a capture"
    gpu.capturing = set()
    pool.take(40)
    gpu.capturing = {0}
    for _ in range(ARENA // (2 * ALIGN)):
        inside = pool.take(ALIGN)
    assert len(pool._arenas) == 1
    assert inside.untyped_storage().data_ptr() == pool._arenas[0].data_ptr()
    gpu.capturing = set()
    pool.take(40)
    assert len(pool._arenas) == 2, "an eager call makes room for the next capture"


def test_only_a_capture_on_the_pools_own_device_counts(gpu):
    """The current device may be another one, as it is in a thread that has not chosen any."""
    pool = CounterPool(torch.device("cuda", 1))
    gpu.capturing = {0}
    assert pool.take(40).data_ptr() == pool.take(40).data_ptr()
    gpu.capturing = {1}
    assert pool.take(40).data_ptr() != pool.take(40).data_ptr()
    assert len(pool._arenas) == 1
    assert gpu.current == 0


def test_what_stays_is_allocated_by_another_thread_on_its_device_and_waited_for(gpu):
    """In this thread it might come from the memory pool of a graph."""
    device = torch.device("cuda", 1)
    CounterPool(device).take(40)
    owner_table.__wrapped__((0, 8, 24), 8, device)
    assert [on for _, on in gpu.allocated] == [1, 1]
    assert threading.get_ident() not in {thread for thread, _ in gpu.allocated}
    assert gpu.waits == 2


def test_the_tile_schedule_needs_two_counters_for_any_number_of_tiles(pool, monkeypatch, device):
    asked = []
    take = pool.take
    monkeypatch.setattr(pool, "take", lambda count: asked.append(count) or take(count))
    p = problem(45, 40, 24, [4, 8], torch.float32, device)
    for config in (TILE, SLICED):
        check_backward(p, config)
    assert asked == [2, 2 + 3 * 3]
