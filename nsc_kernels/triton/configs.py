"""Which tiles and which schedule a call runs with: a formula, and a table per GPU that overrides it where it measured.

Nothing is tuned at the first call and T enters by power-of-two buckets only, so a training run with batches of every
length compiles a handful of kernels. Needs no Triton: the compile report asks it about GPUs that are not there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .columns import chunk_size

TABLES = Path(__file__).parent / "tables"
MAX_RANK = 512  # beyond, a shrink of 16 tokens no longer fits the registers of one program
MAX_BUCKET = 1 << 16  # the tile schedule's choices do not change beyond

# Shared memory that one program may ask for, by compute capability.
SHARED = {80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 103: 227 << 10}
SMALLEST_SHARED = 99 << 10
BARRIERS = 256  # bytes: one mbarrier per product and stage on sm_100


@dataclass(frozen=True)
class Config:
    """One compiled variant. All sizes but the numbers of slices are powers of two.

    Attributes:
        chunk: columns of the rank axis per product.
        block_t: tokens per tile.
        block_k: columns of x per step of the shrink.
        block_n: columns of the output per step of the expand.
        warps, stages: per program, and depth of the prefetch.
        slices: 0 for the tile schedule, else the slices of the shrink of one tile.
        out_slices: slices of the expand of one tile.
        rows: tokens per mid unit.
        registers: the most per thread, None for the assembler's own choice.
        expand_stages: depth of the compiler's prefetch of everything that the expand reads; None: of the weights
            only, ``stages`` deep, and the rest one step ahead by hand.
        early: the units of the sliced schedule load what does not depend on other units before they wait for those.
    """

    chunk: int
    block_t: int
    block_k: int
    block_n: int
    warps: int
    stages: int
    slices: int = 0
    out_slices: int = 1
    rows: int = 1
    registers: int | None = None
    expand_stages: int | None = None
    early: bool = False

    def __post_init__(self) -> None:
        if self.early and (not self.slices or self.expand_stages):
            raise ValueError("early is about units that wait, and their expand is prefetched by hand")


class Machine(NamedTuple):
    """What the formula knows about a GPU: 10 * major + minor of its compute capability, processors, shared memory."""

    name: str
    arch: int
    processors: int
    shared: int


class Problem(NamedTuple):
    """What a configuration depends on, the widths as the shrink and the expand of this direction see them.

    ``mode``: "half" (bf16, fp16), or the float32 precision "ieee" or "tf32x3".
    """

    T: int
    d_in: int
    d_out: int
    R: int
    mode: str
    backward: bool = False


@cache
def machine(device: torch.device) -> Machine:
    """The machine behind a device; for a CPU tensor (the interpreter) one that exercises both schedules."""
    if device.type != "cuda":
        return Machine("interpreter", 90, 4, SHARED[90])
    found = torch.cuda.get_device_properties(device)
    arch = 10 * found.major + found.minor
    shared = getattr(found, "shared_memory_per_block_optin", SHARED.get(arch, SMALLEST_SHARED))
    return Machine(found.name, arch, found.multi_processor_count, shared)


def bucket(T: int) -> int:
    """T rounded up to a power of two, from 16 to MAX_BUCKET."""
    return min(max(1 << max(T - 1, 0).bit_length(), 16), MAX_BUCKET)


def mode_of(dtype: torch.dtype, R: int) -> str:
    """How products are taken: float32 follows torch's setting on whether tensor cores may be used.

    Never Triton's default, one TF32 product with 10 bits of mantissa; three of them keep about 21. Beyond 128 columns
    the three parts of c do not fit the registers, and products are exact whatever the setting.
    """
    if dtype is not torch.float32:
        return "half"
    return "tf32x3" if R <= 128 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def shared_bytes(on: Machine, problem: Problem, config: Config) -> int:
    """Shared memory the compiler will ask for: the deeper of the two pipelines, c, and the tile on its way to memory.

    The compile report fails where the compiler asks for more.
    """
    padded = -(-max(problem.R, 1) // config.chunk) * config.chunk
    warpgroup = on.arch >= 90 and problem.mode == "half"
    # Products that read registers free a buffer one step earlier than those that read shared memory.
    held = 0 if warpgroup else 1
    shrink = (config.stages - held) * (config.block_t + padded) * config.block_k
    parts_of_c = 2 if problem.mode == "tf32x3" else 1
    expand = ((config.expand_stages or config.stages) - held) * padded * config.block_n
    expand += config.block_t * (parts_of_c * padded + config.block_n)
    if config.expand_stages:
        # base, and in the backward z: no product reads them.
        expand += (config.expand_stages - 1) * (2 if problem.backward else 1) * config.block_t * config.block_n
    itemsize = 2 if problem.mode == "half" else 4
    return itemsize * max(shrink, expand) + BARRIERS


def _tile(on: Machine, problem: Problem) -> Config:
    """Blocks that compile without spills, by what the compile report showed for sm_80, sm_90 and sm_100.

    ``registers=255`` where the assembler, left alone, aims at 64 or 128 and spills a few to get there.
    """
    R, mode = problem.R, problem.mode
    chunk = chunk_size(R)
    small = R <= 128
    if mode == "ieee":
        # No matrix instructions: operands live in registers, which is what bounds the tile.
        config = Config(min(chunk, 64), 32 if small else 16, 32, 32, warps=8, stages=3 if small else 2)
        if on.arch < 90 and not small:
            config = replace(config, chunk=min(chunk, 128), block_k=16, block_n=16, warps=16, registers=128)
    elif mode == "tf32x3":
        config = Config(min(chunk, 64), 32, 16, 16, warps=8, stages=2)
    elif on.arch < 90:
        # mma.sync keeps its operands in registers too.
        config = Config(chunk, 64 if R <= 256 else 32, 64, 32, warps=8, stages=3 if small else 2)
    else:
        registers = 255 if on.arch >= 100 else None
        config = Config(chunk, 64, 64, 64, warps=8, stages=3 if small else 2, registers=registers)
        if _measured(on, problem):
            config = replace(config, expand_stages=3)
    return config


def _measured(on: Machine, problem: Problem) -> bool:
    """Whether the choice rests on measurements, on an H100 (docs/triton_variants.md), and not on what compiles well."""
    return on.arch // 10 == 9 and problem.mode == "half"


def _shrunk(config: Config) -> Config | None:
    """The next smaller variant in shared memory."""
    if config.expand_stages:
        return replace(config, expand_stages=None)
    if config.stages > 2:
        return replace(config, stages=config.stages - 1)
    if config.block_k > 16 and config.block_k >= config.block_n:
        return replace(config, block_k=config.block_k // 2)
    if config.block_n > 16:
        return replace(config, block_n=config.block_n // 2)
    return replace(config, block_t=config.block_t // 2) if config.block_t > 16 else None


def _power_of_two_below(n: int) -> int:
    return 1 << max(n.bit_length() - 1, 0)


@lru_cache(maxsize=4096)
def formula(on: Machine, problem: Problem) -> Config | None:
    """The configuration for a problem whose T is a bucket; None if nothing fits the machine's shared memory."""
    found: Config | None = _tile(on, problem)
    while found is not None and shared_bytes(on, problem, found) > on.shared:
        found = _shrunk(found)
    if found is None:
        return None
    tiles = problem.T // found.block_t
    resident = 2 if 2 * shared_bytes(on, problem, found) <= on.shared else 1
    # Tiles for three quarters of the programs that can run at a time, or a third less time in slices.
    enough = on.processors * (resident if _measured(on, problem) else 1) * 3 // 4
    # One program holding a whole tile needs accumulators and c at once: from 321 columns on that spills.
    if tiles >= enough and problem.R <= 320:
        if problem.mode == "half" and problem.R <= 128 and on.arch >= 100 and tiles >= 2 * on.processors:
            # Twice the tokens per read of the weights from L2. On sm_90 that was 2 to 8 % slower.
            # In chunks of 64, since 128 columns of unequal ranks spill.
            wide = replace(found, chunk=min(found.chunk, 64), block_t=128, stages=4)
            if shared_bytes(on, problem, wide) <= on.shared:
                return wide
        return found
    # Units enough for two programs per processor where two fit, so that one loads while the other waits.
    per_tile = max(resident * on.processors // max(tiles, 1), 1)

    most = 32 if on.arch >= 90 else 16  # a mid unit has all its partials in flight; more spill

    def slices(d: int, block: int) -> int:
        """At least two steps per slice, to have something to prefetch."""
        return min(_power_of_two_below(per_tile), _power_of_two_below(max(-(-d // block) // 2, 1)), most)

    rows = min(max(_power_of_two_below(problem.T // on.processors), 2), 16, found.block_t)
    return replace(
        found,
        slices=slices(problem.d_in, found.block_k),
        out_slices=slices(problem.d_out, found.block_n),
        rows=rows,
    )


@cache
def table(gpu: str) -> dict[Problem, Config]:
    """Measured choices for a GPU by name: ``tables/<name>.json``, a list of problems with their configuration."""
    path = TABLES / f"{gpu.lower().replace(' ', '-')}.json"
    if not path.is_file():
        return {}
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    names = {field.name for field in fields(Config)}
    return {
        Problem(*(row[name] for name in Problem._fields)): Config(**{k: v for k, v in row.items() if k in names})
        for row in rows
    }


@lru_cache(maxsize=4096)
def choose(on: Machine, problem: Problem) -> Config | None:
    """The table's configuration, else the formula's, for a problem of any T."""
    problem = problem._replace(T=bucket(problem.T))
    return table(on.name).get(problem) or formula(on, problem)
