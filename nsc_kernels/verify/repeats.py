"""Ways of calling that must all give the same bits: repeated, captured, on several streams, compiled.

Each takes a run of check.py and says whether it holds.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

import nsc_kernels as nk

from ..bench.measuring import captured, recorded, synchronize
from ..counters import counter_pool
from ..triton import columns

NAN = float("nan")
Results = dict[str, Tensor]


class Run(Protocol):
    """One case on one backend: computes a forward and a backward when called."""

    p: Any

    @property
    def name(self) -> str: ...

    def __call__(self) -> Results: ...


class Skipped(Exception):
    """The machine cannot try this; it says nothing about the kernels."""


def wait_for_memory(on: torch.device, gigabytes: int, seconds: float = 45) -> None:
    """Return once so much is free: other trials end and give theirs back."""
    end = time.monotonic() + seconds
    while on.type == "cuda" and torch.cuda.mem_get_info(on)[0] < gigabytes << 30:
        if time.monotonic() > end:
            raise Skipped(f"less than {gigabytes} GB of memory free")
        time.sleep(1)


def same(first: Results, second: Results) -> bool:
    """Whether the second has the bits of what is in the first; NaN differs from itself."""
    return all(torch.equal(first[name], second[name]) for name in first)


def repeats(run: Run, on: torch.device) -> bool:
    first = run()
    return all(same(first, run()) for _ in range(5))


def thousand(run: Run, on: torch.device) -> bool:
    """A race may show once in hundreds of launches."""
    first = run()
    return all(same(first, run()) for _ in range(3 if on.type == "cpu" else 1000))


def _replayed(expected: Results, found: Results, graph: Callable[[], None], on: torch.device) -> bool:
    """Whether three replays give what is expected, each over results that were overwritten."""
    for _ in range(3):
        with torch.no_grad():
            for t in found.values():
                t.fill_(NAN)
        graph()
        synchronize(on)
        if not same(found, expected):  # what there is of it: on a CPU nothing, before the first
            return False
    return True


def replays(run: Run, on: torch.device) -> bool:
    """Both directions in one graph."""
    expected, found = run(), {}
    graph = captured([lambda: found.update(run())], on)
    return _replayed(expected, found, graph, on)


def _into(found: Results, call: Callable[[], Results]) -> None:
    found.update(call())


def unwarmed(run: Run, on: torch.device) -> bool:
    """Captured before anything has run: CUDA loads a kernel when it is first used."""
    found: Results = {}
    graph = recorded([lambda: found.update(run())], on)
    graph()
    synchronize(on)
    return same(run(), found)


def captures(run: Run, on: torch.device) -> bool:
    """Through autograd: a forward alone, a backward alone, and both, each in a graph of its own.

    Not the gradient of base: it is dy itself, an input, which is not to be overwritten.
    """
    p = run.p
    bank = nk.AdapterBank(p.A, p.Bt, p.offsets)
    z, lam, base = (t.clone().requires_grad_() for t in (p.z, p.lam, p.base))

    def forward() -> Results:
        return dict(zip(("y", "quad", "sqnorm"), nk.merged_lora_nsc(z, bank, lam, base), strict=True))

    def backward(outputs: Results) -> Results:
        found = torch.autograd.grad(list(outputs.values()), (z, lam), (p.dy, p.dquad, p.dsqnorm), retain_graph=True)
        return dict(zip(("dz", "dlam"), found, strict=True))

    def both() -> Results:
        outputs = forward()
        return outputs | backward(outputs)

    with nk.use_backend(run.name):
        expected = {name: t.detach().clone() for name, t in both().items()}
        outputs = forward()
        calls: tuple[Callable[[], Results], ...] = (forward, lambda: backward(outputs), both)
        for call in calls:
            found: Results = {}
            graph = captured([partial(_into, found, call)], on)
            if not _replayed(expected, found, graph, on):
                return False
    return True


def _overlapping(calls: list[Callable[[], Any]], rounds: int) -> list[list[Any]]:
    side = [torch.cuda.Stream() for _ in calls]
    results: list[list[Any]] = [[] for _ in calls]
    torch.cuda.synchronize()
    for _ in range(rounds):
        for stream, call, kept in zip(side, calls, results, strict=True):
            with torch.cuda.stream(stream):
                kept.append(call())
    torch.cuda.synchronize()
    return results


def streams(run: Run, on: torch.device) -> bool:
    """Four streams at once, without a word between them."""
    expected = run()
    return all(same(expected, found) for kept in _overlapping([run] * 4, 8) for found in kept)


def two_graphs(run: Run, on: torch.device) -> bool:
    """Two graphs captured on one stream, replayed on two, with eager launches on a third."""
    expected = run()
    first: Results = {}
    second: Results = {}
    graphs = [captured([partial(_into, found, run)], on) for found in (first, second)]
    for t in (*first.values(), *second.values()):
        t.fill_(NAN)
    *_, launched = _overlapping([graphs[0], graphs[1], run], 20)
    return all(same(expected, found) for found in (first, second, *launched))


def external_streams(run: Run, on: torch.device) -> bool:
    """Streams made and destroyed in turn: a new one may get the handle, and with it the counters, of an old one."""
    expected, runtime = run(), torch.cuda.cudart()
    for _ in range(40):
        handle = ctypes.c_void_p()
        torch.cuda.check_error(int(runtime.cudaStreamCreate(ctypes.addressof(handle))))
        assert handle.value is not None
        with torch.cuda.stream(torch.cuda.ExternalStream(handle.value, device=on)):
            found = run()
            torch.cuda.current_stream().synchronize()
        equal = same(expected, found)
        torch.cuda.check_error(int(runtime.cudaStreamDestroy(handle.value)))
        if not equal:
            return False
    return True


def _compiled(run: Run, mode: str) -> bool:
    p = run.p
    bank = nk.AdapterBank(p.A, p.Bt, p.offsets)

    def objective(z: Tensor, lam: Tensor, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return nk.merged_lora_nsc(z, bank, lam, base)

    def results(function: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Results:
        z, lam, base = (t.clone().requires_grad_() for t in (p.z, p.lam, p.base))
        outputs = function(z, lam, base)
        torch.autograd.backward(outputs, (p.dy, p.dquad, p.dsqnorm))
        found = dict(zip(("y", "quad", "sqnorm", "dz", "dlam"), (*outputs, z.grad, lam.grad), strict=True))
        return {name: t.detach().clone() for name, t in found.items()}  # the next call writes over a graph's outputs

    torch._dynamo.reset()
    with nk.use_backend(run.name):
        compiled = torch.compile(objective, mode=mode, fullgraph=True)
        found = [results(compiled) for _ in range(5)]  # with CUDA graphs: warm-up, recording, replays
        expected = results(objective)
    return all(same(expected, each) for each in found)


def compiled(run: Run, on: torch.device) -> bool:
    return _compiled(run, "default")


def reduce_overhead(run: Run, on: torch.device) -> bool:
    """With torch's own CUDA graphs, whose warm-up is the first to need counters and tables of owners."""
    from torch._dynamo.utils import counters

    for kept in (counter_pool, columns.owner_table):
        kept.cache_clear()
    counters.clear()
    equal = _compiled(run, "reduce-overhead")
    if counters["inductor"]["cudagraph_skips"]:
        raise RuntimeError("torch did not use CUDA graphs")
    return equal


BITWISE: dict[str, Callable[[Run, torch.device], bool]] = {
    "repeats": repeats,
    "replays": replays,
    "captures": captures,
    "thousand": thousand,
    "streams": streams,
    "two_graphs": two_graphs,
    "compiled": compiled,
    "reduce_overhead": reduce_overhead,
    "external_streams": external_streams,
    "unwarmed": unwarmed,
}
# Nothing promises that these can be done. Where they can, wrong bits are wrong; where they cannot, an error says so.
QUESTIONS = ("external_streams", "unwarmed")
