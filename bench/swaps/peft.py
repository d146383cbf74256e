"""PEFT's add_weighted_adapter and nsc_merge.integrations.peft.merge: every combination_type.

    python -m bench.swaps.peft --out bench/results/cpu/swaps
    python -m bench.swaps.peft --width 256 --types ties ties_svd           quicker

Six rank-16 adapters with random factors on q (2048 x 2048) and v (512 x 2048) of two layers, float32, on one thread;
density 0.5, weights from 0.2 to 0.7, and rank 16 after truncation. Seconds are medians of processor time of rounds in
which both take turns in one process; "ratio" is theirs by ours. "differs" is how far apart both updates are (Frobenius,
relative, over all modules); where entries are dropped at random, with density 1. "error" is that of either's
truncation: PEFT decomposes whole, ours a wide update of full rank by block Krylov iteration. "peak" is the highest
resident set of a process that does nothing else, over that before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import peft
import torch
from torch import Tensor, nn

from bench.merging.cost_rows import environment, write_rows
from nsc_kernels.bench.resident_memory import peak, reset_peak, resident
from nsc_merge.integrations.combinations import COMBINATIONS
from nsc_merge.integrations.peft import merge

TASKS, RANK, LAYERS, DENSITY = 6, 16, 2, 0.5
NAMES = [f"task{k}" for k in range(TASKS)]
WEIGHTS = [0.2 + 0.1 * k for k in range(TASKS)]


def model_of(width: int) -> Any:
    """The adapted linears, without the rest of a model."""
    torch.manual_seed(0)
    base = nn.Module()
    base.layers = nn.ModuleList(
        nn.ModuleDict({"q": nn.Linear(width, width, bias=False), "v": nn.Linear(width, width // 4, bias=False)})
        for _ in range(LAYERS)
    )
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q", "v"], init_lora_weights=False)
    model = peft.get_peft_model(base, config, NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "lora_" in key:
                value.copy_(torch.randn(value.shape, generator=generator) / width**0.5)
    return model


def arguments_of(kind: str, density: float = DENSITY) -> dict[str, Any]:
    thinned = {"density": density} if COMBINATIONS[kind].density else {}
    return {"combination_type": kind, **thinned, **({"svd_rank": RANK} if kind.endswith("svd") else {})}


def callers(model: Any) -> dict[str, Callable[..., Any]]:
    return {
        "theirs": lambda **arguments: model.add_weighted_adapter(NAMES, WEIGHTS, "theirs", **arguments),
        "ours": lambda **arguments: merge(model, NAMES, WEIGHTS, "ours", **arguments),
    }


def updates(model: Any, name: str) -> dict[str, Tensor]:
    layers = model.get_base_model().named_modules()
    return {
        path: layer.get_delta_weight(name).detach().double()
        for path, layer in layers
        if isinstance(layer, peft.tuners.lora.Linear)
    }


def relative(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    square = sum(float((found[path] - value).norm() ** 2) for path, value in wanted.items())
    return float(square / sum(float(value.norm() ** 2) for value in wanted.values())) ** 0.5


def compare(kind: str, width: int, rounds: int) -> dict[str, Any]:
    """One way of combining, both in turn."""
    model = model_of(width)
    by = callers(model)
    taken: dict[str, list[float]] = {who: [] for who in by}
    merged: Any = None
    for _ in range(rounds):
        for who, call in by.items():
            if who in model.peft_config:
                model.delete_adapter(who)
            begin = time.process_time()
            merged = call(**arguments_of(kind))
            taken[who].append(time.process_time() - begin)
    drops = COMBINATIONS[kind].density == "drop"
    if drops:
        for who, call in by.items():
            model.delete_adapter(who)
            merged = call(**arguments_of(kind, 1.0))
    seconds = {who: statistics.median(values) for who, values in taken.items()}
    found = {who: updates(model, who) for who in by}
    row = {
        "op": "add_weighted_adapter",
        "combination_type": kind,
        "rounds": rounds,
        "seconds": seconds,
        "ratio": statistics.median(a / b for a, b in zip(taken["theirs"], taken["ours"], strict=True)),
        "relative_difference": relative(found["ours"], found["theirs"]),
        "density": 1.0 if drops else DENSITY,
    }
    if kind.endswith("svd"):
        whole = {path: merged.result.delta(path) for path in merged.errors}
        row["error"] = {who: relative(found[who], whole) for who in by}
    return row


def measure(kind: str, who: str, width: int) -> dict[str, Any]:
    """The memory that one of them takes, in this process."""
    model = model_of(width)
    before = resident()
    reset_peak()
    callers(model)[who](**arguments_of(kind))
    return {"added_bytes": peak() - before}


def child(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.swaps.peft", *arguments]
    found: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for peft.jsonl")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--types", nargs="+", choices=COMBINATIONS, default=list(COMBINATIONS), metavar="TYPE")
    parser.add_argument("--rounds", type=int, default=5, help="of those without an SVD; these take one")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    # That nothing is pruned at density 1.
    warnings.filterwarnings("ignore", "The density")
    if arguments.measure:
        kind, who = arguments.measure
        print(json.dumps(measure(kind, who, arguments.width)))
        return 0
    rows = [
        environment(
            threads=1, tasks=TASKS, rank=RANK, layers=LAYERS, width=arguments.width, peft=peft.__version__,
            weights=WEIGHTS,
        )
    ]
    print(f"{'':20} {'theirs':>9} {'ours':>9} {'ratio':>8} {'differs':>9} {'peak':>10} {'ours':>10} errors")
    for kind in arguments.types:
        row = compare(kind, arguments.width, 1 if kind.endswith("svd") else arguments.rounds)
        row["added_bytes"] = {
            who: child("--measure", kind, who, "--width", str(arguments.width))["added_bytes"]
            for who in ("theirs", "ours")
        }
        rows.append(row)
        errors = " ".join(f"{value:.4f}" for value in row.get("error", {}).values())
        peaks = {who: f"{value / 1e6:7.0f} MB" for who, value in row["added_bytes"].items()}
        print(
            f"{kind:20} {row['seconds']['theirs']:8.3f}s {row['seconds']['ours']:8.3f}s {row['ratio']:7.1f}x "
            f"{row['relative_difference']:9.1e} {peaks['theirs']:>10} {peaks['ours']:>10} {errors}",
            flush=True,
        )
    if arguments.out:
        write_rows(arguments.out / "peft.jsonl", rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
