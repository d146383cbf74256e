"""How many kernels one forward and one backward launch, as the profiler sees them: one each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

import nsc_kernels as nk

from .. import verified_hardware
from ..bench.measuring import synchronize
from ..bench.problem import Problem
from ..bench.shapes import Shape
from ..bench.trials import Trial

# Few tokens, many at a large rank, very many, and the widths of an MLP.
SHAPES = [
    Shape("ViT-B", 6304, 768, 768, 20, 16),
    Shape("LLaMA-3-8B q, o", 256, 4096, 4096, 6, 16),
    Shape("LLaMA-3-8B v, k", 256, 4096, 1024, 6, 16),
    Shape("large T", 16384, 4096, 4096, 8, 16),
    Shape("large T", 16384, 4096, 4096, 1, 16),
    Shape("LLaMA-3-8B gate, up", 256, 4096, 14336, 6, 16),
    Shape("LLaMA-3-8B down", 256, 14336, 4096, 6, 16),
]
DRY_RUN = Shape("dry run", 5, 24, 40, 2, 4)


class What(NamedTuple):
    """The payload of a trial."""

    backend: str
    shape: Shape
    direction: str


def launched(run: Callable[[], Any], on: torch.device) -> list[str]:
    """Names of the kernels, copies and fills on the device's timeline during one warm call."""
    for _ in range(3):
        run()
    synchronize(on)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on.type == "cuda" else [])]
    with profile(activities=activities) as found:
        run()
        synchronize(on)
    kernels = [event.name for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    if on.type == "cuda" and not kernels:
        raise RuntimeError(
            "the profiler saw nothing on this GPU: CUPTI may not be allowed here (a container without the right to it, "
            "another profiler attached); run on a machine where torch.profiler lists kernels"
        )
    return kernels


def run_one(what: What, on: torch.device) -> Iterator[dict[str, Any]]:
    data = Problem(what.shape, on, seed=0)
    with nk.use_backend(what.backend):
        outputs = data.fused()
        kernels = launched(data.fused if what.direction == "forward" else lambda: data.backward(outputs), on)
    facts = {"source": verified_hardware.source(what.backend), "direction": what.direction, **what.shape._asdict()}
    yield facts | {"launches": len(kernels), "kernels": kernels}


def trials(names: Sequence[str], dry_run: bool) -> dict[str, Trial]:
    return {
        f"{backend} {direction} {shape.name} T={shape.T} R={shape.R}": Trial(
            backend, What(backend, shape, direction), limit=30
        )
        for backend in names
        for shape in ([DRY_RUN] if dry_run else SHAPES)
        for direction in ("forward", "backward")
    }
