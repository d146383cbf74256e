"""Measure configurations around the formula's and write the table that overrides it for this GPU.

    python bench/gpu_tune.py --out tune.jsonl --table nsc_kernels/triton/tables/nvidia-h200.json [--seconds 300]

For each shape of the benchmark and each direction: the formula's configuration and its neighbours (one size changed at
a time), timed as CUDA graphs over a rotation of inputs. A neighbour enters the table only if it is at least 3 % faster.
A table is part of the source that the ledger hashes: run bench/gpu.sh again after it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from gpu_bench import SHAPES, Data, Shape
from gpu_common import Rows, arguments, captured, device, microseconds, quantiles, synchronize
from nsc_kernels.triton import configs, launch
from nsc_kernels.triton.configs import Config, Problem, bucket, formula, machine, shared_bytes

GAIN = 0.97


def neighbours(on: configs.Machine, problem: Problem, start: Config) -> Iterator[Config]:
    """``start``, then variants with one choice changed, where they fit."""
    changes: list[dict[str, Any]] = [{}]
    changes += [{"block_t": n} for n in (32, 64, 128)] + [{"block_k": n} for n in (32, 64, 128)]
    changes += [{"block_n": n} for n in (32, 64, 128)] + [{"stages": n} for n in (2, 3, 4)] + [{"warps": 4}]
    changes += [{"slices": 0, "out_slices": 1, "rows": 1}]
    most = max(start.slices, 1)
    changes += [{"slices": n, "out_slices": n, "rows": max(start.rows, 4)} for n in (most // 2, most, 2 * most) if n]
    seen = set()
    for change in changes:
        config = replace(start, **change)
        fits = shared_bytes(on, problem, config) <= on.shared
        if config not in seen and fits and config.block_t % config.rows == 0:
            seen.add(config)
            yield config


def call(data: Data, backward: bool, config: Config) -> Any:
    """One direction as the operator runs it, with everything switched on."""
    bank, z, lam = data.bank, data.z.detach(), data.lam.detach()
    if not backward:
        return lambda: launch.forward(z, bank.A, bank.Bt, bank.offsets, lam, data.base, True, True, config)
    u = launch.forward(z, bank.A, bank.Bt, bank.offsets, lam, data.base, False, True)[3]
    dy, dquad, dsqnorm = data.grads
    return lambda: launch.backward(
        dy, dquad, dsqnorm, u, z, bank.A, bank.Bt, bank.offsets, lam, None, True, True, config
    )


def timed(calls: list[Any], on: torch.device, samples: int) -> float:
    """Median microseconds per call of a graph of the calls."""
    run = captured(calls, on)
    run()
    synchronize(on)
    return quantiles([microseconds(run, on) / len(calls) for _ in range(samples)])["p50"]


def tune(shape: Shape, backward: bool, on: torch.device, rows: Rows, dry_run: bool) -> dict[str, Any] | None:
    """The table's row for a problem, or None where the formula stands."""
    widths = (shape.d_out, shape.d_in) if backward else (shape.d_in, shape.d_out)
    problem = Problem(bucket(shape.T), *widths, shape.K * shape.r, "half", backward)
    start = formula(machine(on), problem)
    if start is None:
        return None
    sets = [Data(shape, on, seed) for seed in range(2 if dry_run or shape.T > 4096 else 8)]
    best, least, reference = start, float("inf"), float("inf")
    for config in neighbours(machine(on), problem, start):
        row = {**problem._asdict(), "config": asdict(config), "dry_run": dry_run}
        try:
            spent = timed([call(data, backward, config) for data in sets], on, 2 if dry_run else 15)
        except Exception as error:  # a neighbour may not compile or not fit; the formula's own always does
            rows.write(row | {"error": repr(error)})
            continue
        rows.write(row | {"us_p50": spent})
        reference = spent if config == start else reference
        if spent < least:
            best, least = config, spent
    return {**problem._asdict(), **asdict(best)} if least < GAIN * reference else None


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--table", type=Path, required=True, help="JSON table to write")
    parser.add_argument("--seconds", type=float, default=300, help="start no new problem after this long")
    args = parser.parse_args()
    on = device(args.dry_run)
    rows = Rows(args.out)
    start, table = time.monotonic(), []
    for shape in [Shape("dry run", 5, 24, 40, 2, 4)] if args.dry_run else SHAPES:
        for backward in (False, True):
            if time.monotonic() - start < args.seconds:
                found = tune(shape, backward, on, rows, args.dry_run)
                table += [found] if found else []
                print(f"{shape.name} T={shape.T} {'backward' if backward else 'forward'}: {found or 'the formula'}")
    args.table.parent.mkdir(parents=True, exist_ok=True)
    args.table.write_text(json.dumps(table, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
