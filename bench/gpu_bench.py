"""Speed of the operator on a GPU against what people run today.

    python bench/gpu_bench.py --out bench.jsonl

Providers, all differentiable and all returning y, quad and sqnorm:

    loop      one adapter after another, as PEFT applies several active adapters
    concat    the adapters concatenated along the rank: two GEMMs, and the statistics, eager
    compiled  the same under torch.compile
    triton, cuda   nsc_kernels

Each row is the median over samples that interleave the providers in changing order. A sample is the mean of a run of
calls between two events. "eager" launches from Python, "graph" replays a CUDA graph of the calls. "cold" rotates among
enough input sets that each finds L2 full of others, "warm" uses one set. Bytes are the least a call must move: each
input read once, each output written once. All adapters have rank 16; K = 6 for the language models.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import nsc_kernels as nk
from gpu_common import Rows, arguments, captured, device, microseconds, quantiles, synchronize


class Shape(NamedTuple):
    """One adapted linear layer: K adapters of rank r."""

    name: str
    T: int
    d_in: int
    d_out: int
    K: int
    r: int


# In the order they are run: the three model families first, so that a run that is cut short has them.
SHAPES = [
    Shape("ViT-B", 6304, 768, 768, 20, 16),
    Shape("LLaMA-3-8B q", 256, 4096, 4096, 6, 16),
    Shape("LLaMA-3-8B v", 256, 4096, 1024, 6, 16),
    Shape("LLaVA-7B", 640, 4096, 4096, 6, 16),
    Shape("LLaMA-3-8B q", 1536, 4096, 4096, 6, 16),
    Shape("LLaMA-3-8B v", 1536, 4096, 1024, 6, 16),
    Shape("LLaVA-7B", 3840, 4096, 4096, 6, 16),
    Shape("large T", 16384, 4096, 4096, 8, 16),
    Shape("large T", 16384, 4096, 4096, 1, 16),
    Shape("large T", 8192, 8192, 8192, 8, 16),
]


def merged(z: Tensor, A: Tensor, Bt: Tensor, lam: Tensor, base: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The concatenated adapters: two GEMMs and the statistics, as a careful user would write them in PyTorch."""
    u = z @ A.t()
    wide = u.float().unflatten(-1, (-1, r))
    c = (wide * lam[:, None]).flatten(-2).to(z.dtype)
    return torch.addmm(base, c, Bt), wide.square().sum(-1), z.float().square().sum(-1)


class Data:
    """One set of inputs of a layer, and one call of each provider on it."""

    def __init__(self, shape: Shape, on: torch.device, seed: int, compiled: Callable[..., Any] = merged):
        source = torch.Generator(on).manual_seed(seed)
        R = shape.K * shape.r

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(size, generator=source, device=on) * scale).bfloat16()

        self.shape, self._compiled = shape, compiled
        offsets = list(range(0, R + 1, shape.r))
        self.bank = nk.AdapterBank(normal(R, shape.d_in, scale=shape.d_in**-0.5), normal(R, shape.d_out), offsets)
        self.z = normal(shape.T, shape.d_in).requires_grad_()
        self.base = normal(shape.T, shape.d_out)
        self.lam = torch.rand(shape.K, generator=source, device=on).requires_grad_()
        f32 = {"device": on, "dtype": torch.float32, "generator": source}
        self.grads = (
            normal(shape.T, shape.d_out),
            torch.randn(shape.T, shape.K, **f32),
            torch.randn(shape.T, **f32),
        )

    @property
    def bytes(self) -> int:
        """Of z, base, dy and the weights: what a rotation has to push out of L2."""
        tensors = (self.z, self.base, self.bank.A, self.bank.Bt, self.grads[0])
        return sum(t.nbytes for t in tensors)

    def fused(self) -> tuple[Tensor, ...]:
        return nk.merged_lora_nsc(self.z, self.bank, self.lam, self.base)

    def concat(self) -> tuple[Tensor, ...]:
        return merged(self.z, self.bank.A, self.bank.Bt, self.lam, self.base, self.shape.r)

    def compiled(self) -> tuple[Tensor, ...]:
        return self._compiled(self.z, self.bank.A, self.bank.Bt, self.lam, self.base, self.shape.r)

    def loop(self) -> tuple[Tensor, ...]:
        y, quad, r = self.base, [], self.shape.r
        for k in range(self.shape.K):
            u = self.z @ self.bank.A[k * r : (k + 1) * r].t()
            y = y + (u @ self.bank.Bt[k * r : (k + 1) * r]) * self.lam[k].to(y.dtype)
            quad.append(u.float().square().sum(-1))
        return y, torch.stack(quad, -1), self.z.float().square().sum(-1)

    def backward(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, (self.z, self.lam), self.grads, retain_graph=True)


def least_bytes(shape: Shape, direction: str) -> int:
    """Each input once, each output once; u is written by the forward and read by the backward."""
    T, R = shape.T, shape.K * shape.r
    weights = 2 * R * (shape.d_in + shape.d_out)
    small = 2 * T * R + 4 * T * (shape.K + 1)
    if direction == "forward":
        return weights + small + 2 * T * (shape.d_in + 2 * shape.d_out)
    return weights + small + 2 * T * (shape.d_out + 2 * shape.d_in)


def operations(shape: Shape) -> int:
    """Floating-point operations of the two products of one direction."""
    return 2 * shape.T * shape.K * shape.r * (shape.d_in + shape.d_out)


Sampler = Callable[[], float]


def samplers(name: str, call: str, direction: str, how: str, data: list[Data], on: torch.device, calls: int) -> Sampler:
    """Microseconds per call: one sample of a provider in one direction."""
    backend = name if call == "fused" else "auto"

    def one(d: Data) -> Callable[[], Any]:
        forward = getattr(d, call)
        if direction == "forward":
            return forward
        outputs = forward()
        return lambda: d.backward(outputs)

    with nk.use_backend(backend):
        sets = [one(d) for d in data]
        # At least as many calls as sets, or the last ones would never be in the rotation.
        turns = [sets[i % len(sets)] for i in range(max(calls, len(sets)))]
        for turn in sets:
            turn()
        synchronize(on)
        if how == "graph":
            replay = captured(turns, on)
            replay()
            synchronize(on)
            return lambda: microseconds(replay, on) / len(turns)

    def eager() -> None:
        for turn in turns:
            turn()

    def sample() -> float:
        with nk.use_backend(backend):
            return microseconds(eager, on) / len(turns)

    return sample


def providers() -> list[tuple[str, str]]:
    """(name in the rows, method of Data)."""
    ours = [(name, "fused") for name in ("triton", "cuda") if nk.available_backends()[name] is True]
    return [("loop", "loop"), ("concat", "concat"), ("compiled", "compiled"), *ours]


def attempt(prepare: Callable[[], Sampler]) -> Sampler | str:
    """What ``prepare`` returns, or why it cannot: one provider that fails does not stop the others."""
    try:
        return prepare()
    except Exception as error:
        return repr(error)


def measure(shape: Shape, on: torch.device, rows: Rows, samples: int, dry_run: bool) -> None:
    torch._dynamo.reset()
    compiled = merged if dry_run else torch.compile(merged, dynamic=False)
    l2 = torch.cuda.get_device_properties(on).L2_cache_size if on.type == "cuda" else 1
    first = Data(shape, on, 0, compiled)
    rotation = min(max(2, -(-3 * l2 // first.bytes)), 24)
    data = [first, *(Data(shape, on, seed, compiled) for seed in range(1, rotation))]
    calls = 1 if dry_run else 8
    for direction, cache, how in itertools.product(("forward", "backward"), ("cold", "warm"), ("eager", "graph")):
        inputs = data if cache == "cold" else data[:1]
        found: dict[str, Sampler] = {}
        for name, call in providers():
            prepared = attempt(partial(samplers, name, call, direction, how, inputs, on, calls))
            if isinstance(prepared, str):
                rows.write({"provider": name, "direction": direction, **shape._asdict(), "error": prepared})
            else:
                found[name] = prepared
        times: dict[str, list[float]] = {name: [] for name in found}
        order = list(found)
        for _ in range(samples):
            random.shuffle(order)
            for name in order:
                times[name].append(found[name]())
        for name, values in times.items():
            result = quantiles(values)
            moved = least_bytes(shape, direction)
            rows.write(
                {
                    "provider": name,
                    "direction": direction,
                    "cache": cache,
                    "how": how,
                    **shape._asdict(),
                    **{f"us_{key}" if key != "samples" else key: value for key, value in result.items()},
                    "least_bytes": moved,
                    "tb_per_s": moved / result["p50"] / 1e6,
                    "tflop_per_s": operations(shape) / result["p50"] / 1e6,
                    "dry_run": dry_run,
                }
            )


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--samples", type=int, default=15)
    args = parser.parse_args()
    on = device(args.dry_run)
    random.seed(0)
    rows = Rows(args.out)
    shapes = [Shape("dry run", 5, 24, 40, 2, 4)] if args.dry_run else SHAPES
    for shape in shapes:
        measure(shape, on, rows, 2 if args.dry_run else args.samples, args.dry_run)
        print(f"{shape.name} T={shape.T}: {rows.count} rows", flush=True)
    return int(not rows.count)


if __name__ == "__main__":
    sys.exit(main())
