"""The merge handlers of KnOTS and Core Space beside ours: seconds, memory, and how far apart the results are.

    KNOTS_REPO=KnOTS CORE_SPACE_REPO=core-space-merging python -m bench.swaps.task_mergers --out bench/results/cpu/swaps
    ... --widths 768 --tasks 6                                                                          quicker

Each checkout's own ``get_merge_handler`` and ours merge the same adapters of rank 16 of one square layer, float32, one
thread, by the calls of its evaluation scripts: a handler is made, ``transform``, ``set_scaling_coeffs`` and ``merge``.
Core Space's needs einops. "theirs" and "ours" are medians of runs that take turns in one process, "ratio" one by the
other; where theirs took more than ten seconds there is one run of it. "again" is one more scale:
``set_scaling_coeffs`` and ``merge`` of the same handler, as a search for the scale repeats them. "differs" is the
relative distance of the merged updates (Frobenius). "peaks", at one width only, are the highest resident sets above
those before, in processes of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor, nn

from bench.merging.cost_rows import environment, write_rows
from bench.swaps.checkouts import checkout, imported_from
from nsc_kernels.bench.resident_memory import peak, reset_peak, resident
from nsc_merge.integrations import task_mergers

RANK, REPEATS, LONG, SCALE = 16, 3, 10.0, 0.3
NAME = "layer.weight"
_TIES = {"merge_method": "ties", "merging_type": "mean", "topK": 20}
# Codebase -> what is merged by it: name, representation, task_merge_config.
CASES: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
    "KNOTS_REPO": [
        ("KnOTS-TIES", "svd-vector", _TIES),
        ("TIES", "vector", _TIES),
        ("task vectors", "vector", {"merge_method": "tv", "merging_type": "sum"}),
    ],
    "CORE_SPACE_REPO": [
        ("Core Space, sum", "matrix_per_layer", {"merge_space": "core", "merge_method": "sum"}),
        ("Core Space, TIES", "matrix_per_layer", {"merge_space": "core", "merge_method": "ties", "topK": 20}),
        ("KnOTS, TIES", "matrix_per_layer", {"merge_space": "knots", "merge_method": "ties", "topK": 20}),
        ("full, TIES", "matrix_per_layer", {"merge_space": "full", "merge_method": "ties", "topK": 20}),
    ],
}


class Layer(nn.Linear):
    """One linear with an adapter in it, under the names that PEFT had when KnOTS was written."""

    def __init__(self, width: int, number: int) -> None:
        super().__init__(width, width, bias=False)
        generator = torch.Generator().manual_seed(number)
        down, up = nn.Linear(width, RANK, bias=False), nn.Linear(RANK, width, bias=False)
        self.lora_A, self.lora_B = nn.ModuleDict({"default": down}), nn.ModuleDict({"default": up})
        with torch.no_grad():
            self.weight.copy_(0.02 * torch.randn(width, width, generator=torch.Generator().manual_seed(0)))
            down.weight.copy_(torch.randn(RANK, width, generator=generator) / width**0.5)
            drawn = 0.02 * torch.randn(width, RANK, generator=generator)
            up.weight.copy_(drawn if number else 0 * drawn)


def model(width: int, number: int) -> nn.Module:
    """The pretrained one is number 0."""
    return nn.ModuleDict({"layer": Layer(width, number)}).requires_grad_(False)


class Run:
    """A codebase's handlers and ours, on the same models."""

    def __init__(self, variable: str, width: int, tasks: int) -> None:
        import ft_handlers
        import task_merger

        handler = ft_handlers.LoRAHandler
        core = variable == "CORE_SPACE_REPO"
        # Core Space's is given the state dictionary, KnOTS' the model.
        self.handler = (lambda held: handler(held.state_dict())) if core else handler
        self.get = {"theirs": task_merger.get_merge_handler, "ours": task_mergers.get_merge_handler}
        self.tasks, self.base = [model(width, number + 1) for number in range(tasks)], model(width, 0)

    def merge(self, whose: str, representation: str, config: dict[str, Any]) -> tuple[Tensor, float, float]:
        """The merged update, seconds, and seconds of one more scale."""
        tasks, base = copy.deepcopy(self.tasks), copy.deepcopy(self.base)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            start = time.perf_counter()
            merger = self.get[whose](representation)(
                tasks, pretrained_model=base, param_handler=self.handler, device="cpu", merge_config=config
            )
            merger.transform(config)
            merger.set_scaling_coeffs(SCALE)
            found = merger.merge(config)
            first = time.perf_counter() - start
            start = time.perf_counter()
            merger.set_scaling_coeffs(2 * SCALE)
            merger.merge(config)
            again = time.perf_counter() - start
        return found.state_dict()[NAME] - self.base.state_dict()[NAME], first, again


@contextlib.contextmanager
def prepared(variable: str, width: int, tasks: int) -> Iterator[Run]:
    repository = checkout(variable)
    assert repository is not None
    torch.set_num_threads(1)
    # Of what is absent they draw data and log.
    with imported_from([repository], ["clip", "wandb"]), torch.no_grad():
        yield Run(variable, width, tasks)


def measure(variable: str, width: int, tasks: int) -> Iterator[dict[str, Any]]:
    """Every case by both, taking turns, in this process."""
    with prepared(variable, width, tasks) as run:
        for name, representation, config in CASES[variable]:
            run.merge("ours", representation, config)
            taken: dict[str, list[tuple[float, float]]] = {"theirs": [], "ours": []}
            updates: dict[str, Tensor] = {}
            for _ in range(REPEATS):
                for whose, row in taken.items():
                    if not row or row[0][0] < LONG:
                        updates[whose], *seconds = run.merge(whose, representation, config)
                        row.append((seconds[0], seconds[1]))
            ours, theirs = updates["ours"].double(), updates["theirs"].double()
            medians = {
                f"{whose}{kind}": statistics.median(pair[place] for pair in row)
                for whose, row in taken.items()
                for place, kind in enumerate(("_seconds", "_again_seconds"))
            }
            yield {
                "op": "task_merger", "code": variable, "case": name, "representation": representation,
                "config": config, "width": width, "rank": RANK, "tasks": tasks, **medians,
                "differs": float((ours - theirs).norm() / theirs.norm()),
                "runs": {whose: len(row) for whose, row in taken.items()}, "load": os.getloadavg()[0],
            }  # fmt: skip


def memory(whose: str, variable: str, case: int, width: int, tasks: int) -> dict[str, Any]:
    """One merge in this process."""
    _, representation, config = CASES[variable][case]
    with prepared(variable, width, tasks) as run:
        before = resident()
        reset_peak()
        run.merge(whose, representation, config)
        return {f"{whose}_peak_bytes": peak() - before}


def child(*arguments: object) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "bench.swaps.task_mergers", "--child", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(row) for row in done.stdout.splitlines()]


def line(row: dict[str, Any]) -> str:
    ratio = row["theirs_seconds"] / row["ours_seconds"]
    held = [row[key] for whose in ("theirs", "ours") if (key := f"{whose}_peak_bytes") in row]
    peaks = " ".join(f"{bytes_ / 1e6:.0f} MB" for bytes_ in held)
    return (
        f"{row['case']:18} {row['width']:5} {row['tasks']:2}  "
        f"{row['theirs_seconds']:9.4f}s {row['ours_seconds']:8.4f}s {ratio:8.1f}x  "
        f"{row['theirs_again_seconds']:9.4f}s {row['ours_again_seconds']:8.4f}s  {row['differs']:.1e}  {peaks}"
    )


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for task_mergers.jsonl")
    parser.add_argument("--widths", type=int, nargs="+", default=[768, 1024, 2048])
    parser.add_argument("--tasks", type=int, nargs="+", default=[8])
    parser.add_argument("--memory-width", type=int, default=1024, help="where peaks are measured, too; 0 for nowhere")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.child:
        kind, variable, *rest = options.child
        numbers = list(map(int, rest))
        for row in measure(variable, *numbers) if kind == "time" else [memory(kind, variable, *numbers)]:
            print(json.dumps(row), flush=True)
        return
    known = [variable for variable in CASES if checkout(variable) is not None]
    if not known:
        parser.error(f"expected a checkout in one of the environment variables {list(CASES)}, found none")
    rows = [environment(threads=1, rank=RANK)]
    print(f"{'':18} width  K     theirs     ours    ratio  theirs again  ours again  differs  peaks")
    for variable in known:
        for width in options.widths:
            for tasks in options.tasks:
                for case, row in enumerate(child("time", variable, width, tasks)):
                    for whose in ("theirs", "ours") if width == options.memory_width else ():
                        row.update(child(whose, variable, case, width, tasks)[0])
                    rows.append(row)
                    print(line(row), flush=True)
    if options.out:
        write_rows(options.out / "task_mergers.jsonl", rows)


if __name__ == "__main__":
    main()
