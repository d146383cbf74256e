"""Counters are found at zero, left at zero, and never shared by launches that may overlap."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from problems import check_backward, check_forward, problem
from test_triton_kernels import ONE_SLICE, SLICED, TILE

from nsc_kernels.triton import counters, launch
from nsc_kernels.triton.counters import ALIGN, ARENA, CounterPool


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


class FakeStream:
    """A stream of a GPU that is not there, for the bookkeeping alone."""

    def __init__(self, handle: int):
        self.cuda_stream = handle

    def synchronize(self) -> None:
        pass


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """State of a pretended GPU: the current stream, and whether it is being captured."""
    state: dict[str, object] = {"stream": FakeStream(1), "capturing": False}
    zeros = torch.zeros
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: state["stream"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    monkeypatch.setattr(counters.torch, "zeros", lambda *a, device=None, **k: zeros(*a, **k))
    return state


def test_streams_and_captured_launches_have_slices_of_their_own(gpu):
    pool = CounterPool(torch.device("cuda", 0))
    first = pool.take(40)
    gpu["stream"] = FakeStream(2)
    second = pool.take(40)
    gpu["capturing"] = True
    captured = [pool.take(40) for _ in range(3)]
    gpu["capturing"] = False
    again = pool.take(40)
    slices = [first, second, *captured]
    places = sorted((s.data_ptr(), s.numel()) for s in slices)
    for (a, n), (b, _) in itertools.pairwise(places):
        assert a + 4 * n <= b, "slices overlap"
    assert again.data_ptr() == second.data_ptr()


def test_a_capture_that_finds_no_room_clears_its_own_counters(gpu):
    pool = CounterPool(torch.device("cuda", 0))
    gpu["capturing"] = True
    unprepared = pool.take(40)
    assert unprepared.numel() == 40
    assert not pool._arenas, "nothing may be allocated for keeps inside a capture"
    gpu["capturing"] = False
    pool.take(40)
    gpu["capturing"] = True
    for _ in range(ARENA // (2 * ALIGN)):
        inside = pool.take(ALIGN)
    assert len(pool._arenas) == 1
    assert inside.untyped_storage().data_ptr() == pool._arenas[0].data_ptr()
    gpu["capturing"] = False
    pool.take(40)
    assert len(pool._arenas) == 2, "an eager call makes room for the next capture"
