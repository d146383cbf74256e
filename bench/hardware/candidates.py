"""Configurations worth timing beside the formula's: prepared variants of the kernel, and neighbours that matter.

``tune.py`` times them, ``triton_compile_report.py --variants`` compiles them for GPUs that are not here. Needs no
Triton.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nsc_kernels.triton.configs import Config, Machine, Problem, shared_bytes

MOST = 10  # per problem: each is a compilation of 1 to 10 seconds

Change = dict[str, Any]


def _fewer(start: Config, slices: int, **more: Any) -> Change:
    """Another number of slices, with as many slices of the expand and mid units that are not tiny."""
    out_slices = min(slices, start.out_slices) if start.slices else slices
    rows = max(start.rows, 4) if start.slices else 16
    return {"slices": slices, "out_slices": out_slices, "rows": rows, **more}


EARLY: Change = {"early": True, "expand_stages": None}  # whose expand is prefetched by hand


def _of_sliced(start: Config) -> list[Change]:
    """Small T, latency: load before waiting, and fewer slices, whose partials take less time to write and to read."""
    n = start.slices
    changes: list[Change] = [EARLY, {"expand_stages": None if start.expand_stages else 3}]
    for slices in (n // 2, n // 4):
        if slices:
            changes += [_fewer(start, slices), _fewer(start, slices, **EARLY)]
    changes += [{"block_n": 128}, {"block_n": 128, "expand_stages": None}, _fewer(start, 2 * n)]
    changes += [_fewer(start, n // 8)] if n >= 8 else []
    changes += [{"slices": 0, "out_slices": 1, "rows": 1, "expand_stages": 3}] if n <= 8 else []
    return [*changes, {"warps": 4}]


def _of_tiles(start: Config) -> list[Change]:
    """Large T, up to 128 columns: more loads in flight, and weights read half as often from L2."""
    wide: Change = {"block_t": 128, "stages": 3}
    changes: list[Change] = [{"expand_stages": 3}, {"expand_stages": None}, {**wide, "expand_stages": 3}]
    changes += [{**wide, "stages": 4}, {**wide, "warps": 16, "expand_stages": 3}, {"expand_stages": 2}]
    changes += [{"block_n": 128, "expand_stages": 2}, _fewer(start, 2), _fewer(start, 2, expand_stages=3)]
    changes += [_fewer(start, 2, **wide), {"stages": 4}]
    return changes


def _of_wide_tiles(start: Config, backward: bool) -> list[Change]:
    """More than 128 columns: units that fill all processors, and 128 tokens where they do not spill."""
    plain: Change = {"expand_stages": None}
    changes: list[Change] = [_fewer(start, 4), plain, {"expand_stages": 3}, _fewer(start, 4, expand_stages=2)]
    changes += [_fewer(start, 4, block_t=128, **plain), _fewer(start, 3), _fewer(start, 2)]
    changes += [_fewer(start, 4, block_t=128, warps=16, block_k=32, block_n=32, **plain), _fewer(start, 4, **EARLY)]
    changes += [{"block_t": 32}, {"expand_stages": 2} if backward else {"block_t": 128, **plain}]
    return changes


def candidates(on: Machine, problem: Problem, start: Config) -> dict[str, Config]:
    """What differs from ``start`` in words, and the configuration; the most promising first, at most MOST."""
    if start.slices:
        changes = _of_sliced(start)
    elif problem.R <= 128:
        changes = _of_tiles(start)
    else:
        changes = _of_wide_tiles(start, problem.backward)
    found: dict[str, Config] = {}
    for change in changes:
        config = replace(start, **change)
        differs = {key: value for key, value in vars(config).items() if value != getattr(start, key)}
        fits = shared_bytes(on, problem, config) <= on.shared and config.slices <= 32
        if differs and fits and config not in found.values() and len(found) < MOST:
            found[" ".join(f"{key}={value}" for key, value in differs.items())] = config
    return found
