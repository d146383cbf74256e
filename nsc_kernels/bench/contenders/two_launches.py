"""Adapters in two Triton launches, shrink and expand: how kernels that serve many LoRA adapters are built.

The design is that of Punica (arXiv 2310.18547) and S-LoRA (arXiv 2311.03285), with what one merged layer allows: all
adapters are one product in each launch. The shrink cuts d into ``splits``, so that few tokens fill the GPU, and leaves
a partial sum per split. Each program of the expand adds the partials of its tokens, which are in L2, applies the
diagonal, and multiplies its share of the output's columns. The statistics cost no third launch: the shrink sums the
squares of z as it reads it, and the programs of the first share of columns write quad, sqnorm, u and dlam.

For bfloat16 and adapters of one rank, a power of two. :func:`tune` tries several tile sizes on the device at hand.
"""

# mypy: disable-error-code="assignment"
# Triton's language grows tuples in unrolled loops, which Python's types cannot say.

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from ..measuring import captured, microseconds, quantiles
from ..problem import Problem
from ..registry import LINEAR, OPERATOR, Contender, Gradients, Pair, Result, register
from ..shapes import Shape


@triton.jit
def shrink_kernel(
    x, w, parts, norms, dlam, T, R, K, D, stride_x,
    BT: tl.constexpr, BK: tl.constexpr, N: tl.constexpr, C: tl.constexpr, KP: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """``parts[s, t] = x[t, share s] @ w[:, share s]^T``; ``norms`` likewise; program 0 clears dlam for the expand."""
    s = tl.program_id(1)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    if dlam is not None:
        adapter = tl.arange(0, KP)
        cleared = tl.where(tl.program_id(0) + s == 0, K, 0)
        tl.store(dlam + adapter, tl.zeros((KP,), tl.float32), mask=adapter < cleared)
    share = tl.cdiv(tl.cdiv(D, BK), SPLITS) * BK
    j = tl.arange(0, C)
    accs = ()
    for _ in tl.static_range(N):
        accs = accs + (tl.zeros((BT, C), tl.float32),)
    squares = tl.zeros((BT, BK), tl.float32)
    rows = x + t.to(tl.int64)[:, None] * stride_x
    for k0 in range(s * share, tl.minimum((s + 1) * share, D), BK):
        k = k0 + tl.arange(0, BK)
        tile = tl.load(rows + k[None, :], mask=(t < T)[:, None] & (k < D)[None, :], other=0.0)
        if norms is not None:
            squares += tile.to(tl.float32) * tile.to(tl.float32)
            tile = tl.where((k < D)[None, :], tile, 0.0)  # into registers: see nsc_kernels/triton/steps.py, shrink
        added = ()
        for i in tl.static_range(N):
            inside = (k < D)[:, None] & (i * C + j < R)[None, :]
            weights = tl.load(w + (i * C + j)[None, :] * D + k[:, None], mask=inside, other=0.0)
            added = added + (tl.dot(tile, weights, accs[i]),)
        accs = added
    at = s.to(tl.int64) * T + t
    for i in tl.static_range(N):
        inside = (t < T)[:, None] & (i * C + j < R)[None, :]
        tl.store(parts + at[:, None] * R + (i * C + j)[None, :], accs[i], mask=inside)
    if norms is not None:
        tl.store(norms + at, tl.sum(squares, 1), mask=t < T)


@triton.jit
def expand_kernel(
    parts, norms, w, base, out, u, lam, quad, sqnorm, dlam, z, T, R, K, D, shares,
    BT: tl.constexpr, BN: tl.constexpr, N: tl.constexpr, C: tl.constexpr, G: tl.constexpr, SPLITS: tl.constexpr,
    STAGES: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """``out = base + c @ w``; quad and sqnorm are the statistics in the forward and their gradients in the backward."""
    GROUPS: tl.constexpr = C // G
    first = tl.program_id(1) == 0
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    j = tl.arange(0, C)
    cs = ()
    for i in tl.static_range(N):
        inside = (t < T)[:, None] & (i * C + j < R)[None, :]
        columns = t.to(tl.int64)[:, None] * R + (i * C + j)[None, :]
        acc = tl.zeros((BT, C), tl.float32)
        for s in tl.static_range(SPLITS):
            acc += tl.load(parts + s * tl.cast(T, tl.int64) * R + columns, mask=inside, other=0.0)
        k = i * GROUPS + tl.arange(0, GROUPS)
        per_adapter = t.to(tl.int64)[:, None] * K + k[None, :]
        used = (t < T)[:, None] & (k < K)[None, :]
        grouped = tl.reshape(acc, (BT, GROUPS, G))
        c = grouped * tl.load(lam + k, mask=k < K, other=0.0)[None, :, None]
        if BACKWARD:
            saved = tl.reshape(tl.load(u + columns, mask=inside, other=0.0).to(tl.float32), (BT, GROUPS, G))
            c += saved * (2.0 * tl.load(quad + per_adapter, mask=used, other=0.0))[:, :, None]
            if first:
                tl.atomic_add(dlam + k, tl.sum(tl.sum(saved * grouped, 2), 0), mask=k < K, sem="relaxed")
        elif first:
            tl.store(u + columns, acc.to(u.dtype.element_ty), mask=inside)
            tl.store(quad + per_adapter, tl.sum(grouped * grouped, 2), mask=used)
        cs = cs + (tl.reshape(c, (BT, C)).to(w.dtype.element_ty),)
    scale = tl.zeros((BT,), tl.float32)
    if BACKWARD:
        scale += 2.0 * tl.load(sqnorm + t, mask=t < T, other=0.0)
    elif first:
        for s in tl.static_range(SPLITS):
            scale += tl.load(norms + s * tl.cast(T, tl.int64) + t, mask=t < T, other=0.0)
        tl.store(sqnorm + t, scale, mask=t < T)
    share = tl.cdiv(tl.cdiv(D, BN), shares) * BN
    begin = tl.program_id(1) * share
    rows = t.to(tl.int64)[:, None] * D
    # Stages by name, so that base and z are prefetched too and not only what a product reads.
    for n0 in tl.range(begin, tl.minimum(begin + share, D), BN, num_stages=STAGES):
        n = n0 + tl.arange(0, BN)
        here = (t < T)[:, None] & (n < D)[None, :]
        tile = tl.zeros((BT, BN), tl.float32)
        if base is not None:
            tile += tl.load(base + rows + n[None, :], mask=here, other=0.0).to(tl.float32)
        if BACKWARD:
            tile += scale[:, None] * tl.load(z + rows + n[None, :], mask=here, other=0.0).to(tl.float32)
        for i in tl.static_range(N):
            in_chunk = (i * C + j < R)[:, None] & (n < D)[None, :]
            weights = tl.load(w + (i * C + j).to(tl.int64)[:, None] * D + n[None, :], mask=in_chunk, other=0.0)
            tile = tl.dot(cs[i], weights, tile)
        tl.store(out + rows + n[None, :], tile.to(out.dtype.element_ty), mask=here)


class Tiles(NamedTuple):
    """Tokens and columns per program and step, and into how many programs the columns are cut; of both launches."""

    shrink_t: int
    shrink_k: int
    splits: int
    expand_t: int
    expand_n: int
    shares: int
    warps: int
    stages: int


Key = tuple[int, int, int, int, bool]  # T, d_in, d_out, R, backward
_chosen: dict[Key, Tiles] = {}


def power_of_two(n: float, most: int) -> int:
    """The largest one at most ``n``, between 1 and ``most``."""
    return min(1 << max(int(n).bit_length() - 1, 0), most)


def tiles(key: Key, processors: int, shrink_t: int, expand_t: int, per_processor: int) -> Tiles:
    """Enough programs for each processor to have some; a share of d is at least two steps."""
    T, d_in, d_out, R, _ = key
    shrink_k, expand_n = (128 if shrink_t <= 32 else 64), (128 if expand_t <= 64 and R <= 128 else 64)
    wanted = per_processor * processors
    return Tiles(
        shrink_t,
        shrink_k,
        power_of_two(min(wanted / -(-T // shrink_t), d_in / shrink_k / 2), 16),
        expand_t,
        expand_n,
        power_of_two(min(wanted / -(-T // expand_t), d_out / expand_n), 64),
        warps=8 if max(shrink_t, expand_t) >= 64 else 4,
        stages=3,
    )


def default(key: Key, processors: int) -> Tiles:
    block = 16 if key[0] <= 128 else 32 if key[0] <= 512 else 64
    return tiles(key, processors, block, block, 2)


def candidates(key: Key, processors: int) -> Iterator[Tiles]:
    """The default first, then other tiles of tokens for either launch, fewer programs, fewer partials to add."""
    first = default(key, processors)
    yield first
    for block in (first.shrink_t // 2, 2 * first.shrink_t):
        yield tiles(key, processors, block, first.expand_t, 2)
        yield tiles(key, processors, first.shrink_t, block, 2)
    yield tiles(key, processors, first.shrink_t, first.expand_t, 1)
    yield first._replace(splits=max(first.splits // 2, 1))
    yield first._replace(splits=max(first.splits // 4, 1))
    yield first._replace(stages=4)


def run(
    x: Tensor, w_in: Tensor, w_out: Tensor, lam: Tensor, base: Tensor | None, out: Tensor, u: Tensor, quad: Tensor,
    sqnorm: Tensor, dlam: Tensor | None, z: Tensor | None,
) -> None:  # fmt: skip
    """Both launches of one direction; what is None is not read and not written."""
    (T, d_in), (R, d_out), K, backward = x.shape, w_out.shape, lam.shape[0], dlam is not None
    key = (T, d_in, d_out, R, backward)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4
    how = _chosen.get(key) or default(key, processors)
    group = R // K
    # Chunks of a power of two that waste no column; a rank of 16 and below is one chunk, the least of a product.
    chunk = max(min(R & -R, 128), 16)
    chunks = -(-R // chunk)
    parts = torch.empty(how.splits, T, R, dtype=torch.float32, device=x.device)
    norms = None if backward else torch.empty(how.splits, T, dtype=torch.float32, device=x.device)
    options = {"num_warps": how.warps, "num_stages": how.stages}
    shrink_kernel[(-(-T // how.shrink_t), how.splits)](
        x, w_in, parts, norms, dlam, T, R, K, d_in, x.stride(0),
        BT=how.shrink_t, BK=how.shrink_k, N=chunks, C=chunk, KP=triton.next_power_of_2(K), SPLITS=how.splits,
        **options,
    )  # fmt: skip
    expand_kernel[(-(-T // how.expand_t), how.shares)](
        parts, norms, w_out, base, out, u, lam, quad, sqnorm, dlam, z, T, R, K, d_out, how.shares,
        BT=how.expand_t, BN=how.expand_n, N=chunks, C=chunk, G=group, SPLITS=how.splits,
        STAGES=how.stages, BACKWARD=backward, **options,
    )  # fmt: skip


def forward(
    z: Tensor, A: Tensor, Bt: Tensor, offsets: tuple[int, ...], lam: Tensor, base: Tensor, inplace: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`nsc_kernels.reference.forward`, with a base and the statistics."""
    T, K = z.shape[0], lam.shape[0]
    y = base if inplace else torch.empty_like(base)
    quad, sqnorm = lam.new_empty(T, K), lam.new_empty(T)
    u = z.new_empty(T, A.shape[0])
    run(z, A, Bt, lam, base, y, u, quad, sqnorm, None, None)
    return y, quad, sqnorm, u


def backward(
    dy: Tensor, dquad: Tensor, dsqnorm: Tensor, u: Tensor, z: Tensor, A: Tensor, Bt: Tensor,
    offsets: tuple[int, ...], lam: Tensor, dz_base: Tensor | None, inplace: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As :func:`nsc_kernels.reference.backward`, with every gradient given and needed."""
    dz = dz_base if inplace and dz_base is not None else torch.empty_like(z)
    dlam = torch.empty_like(lam)
    run(dy, Bt, A, lam, dz_base, dz, u, dquad, dsqnorm, dlam, z)
    return dz, dlam


def tune(sets: list[Problem]) -> None:
    """Choose the tiles of both directions for the sets' shape: the fastest over a graph of a call per set."""
    shape, on = sets[0].shape, sets[0].z.device
    if on.type != "cuda":
        return
    processors = torch.cuda.get_device_properties(on).multi_processor_count
    us = [p.z @ p.A.t() for p in sets]
    calls: dict[Key, list[Callable[[], Any]]] = {
        (shape.T, shape.d_in, shape.d_out, shape.R, False): [
            partial(forward, p.z, *p.factors, p.base, True) for p in sets
        ],
        (shape.T, shape.d_out, shape.d_in, shape.R, True): [
            partial(backward, p.dy, p.dquad, p.dsqnorm, u, p.z, *p.factors, p.dz_base, True)
            for p, u in zip(sets, us, strict=True)
        ],
    }
    for key in calls.keys() - _chosen.keys():
        times: dict[Tiles, float] = {}
        for how in dict.fromkeys(candidates(key, processors)):
            _chosen[key] = how
            try:
                replay = captured(calls[key], on)
                replay()
                times[how] = quantiles([microseconds(replay, on) for _ in range(7)])["p50"]
            except (OutOfResources, CompilationError):  # too large for this device
                pass
        del _chosen[key]
        if times:
            _chosen[key] = min(times, key=lambda how: times[how])


def not_here(device: torch.device, dtype: torch.dtype, shape: Shape) -> str | None:
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        return "is of Triton kernels, which run on a GPU"
    if dtype is not torch.bfloat16:
        return "computes in bfloat16"
    return None if shape.r & (shape.r - 1) == 0 else f"needs a rank that is a power of two, found {shape.r}"


def pair(p: Problem, inplace: bool) -> Pair:
    def ahead() -> Result:
        return Result(*forward(p.z, *p.factors, p.y0(), inplace or p.whole))

    def back(u: Tensor) -> Gradients:
        return backward(p.dy, p.dquad, p.dsqnorm, u, p.z, *p.factors, p.dz0(inplace), inplace or p.whole)

    return ahead, back


for of, inplace in ((OPERATOR, False), (OPERATOR, True), (LINEAR, False)):
    name = "two_launches_inplace" if inplace else "two_launches"
    make = partial(pair, inplace=inplace)
    group = "inplace" if inplace else "compiles"
    register(Contender(name, make, of, inplace=inplace, group=group, unavailable=not_here, prepare=tune))
