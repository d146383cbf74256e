"""When folding the adapters into a weight pays: whole linears' steps, folded, fused and by the rule.

    python -m bench.merging.fold_costs --out bench/results/cpu     a table, and fold-costs.jsonl

A step is the forward and backward of one merged linear, its weight's product included, with gradients for its input and
the coefficients: so much less than what differs is a share of a merge's step. Contenders are interleaved in one process
and compared by medians of processor time, which a busy machine disturbs less than wall time. The rule decides by
itself, as in a merge. Its loss is its time to the better of the other two, less one; as it runs the very same code as
one of them, the loss is taken from that one's time, and the time of the rule's own runs is kept beside it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import nn

import nsc_kernels as nk
from bench.merging.cost_rows import environment, write_rows
from nsc_kernels.bench.timing import keep_freed_memory
from nsc_merge.models.merged.folded_linear import Folded
from nsc_merge.models.merged.measured_linear import MeasuredLoRALinear

# (d_in, d_out): square, and up and down of an MLP.
SHAPES = [
    *((d, d) for d in (512, 1024, 2048, 4096)),
    *((d, 4 * d) for d in (512, 1024, 2048)),
    *((4 * d, d) for d in (512, 1024, 2048)),
]
TOKENS = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
TASKS = (2, 6, 12)
# Multiply-adds of the weight's own product above which a step takes seconds, and folding has long paid.
MOST_WORK = 2**35
Step = Callable[[], object]


def contenders(d_in: int, d_out: int, tasks: int, rank: int, tokens: int, passes: int) -> tuple[dict[str, Step], bool]:
    """Name -> one step; and whether the rule folds."""
    linear = nn.Linear(d_in, d_out, bias=False).requires_grad_(False)
    bank = nk.AdapterBank.from_factors(
        [torch.randn(rank, d_in) / d_in**0.5 for _ in range(tasks)], [torch.randn(d_out, rank) for _ in range(tasks)]
    )
    inputs = [part.clone().requires_grad_() for part in torch.randn(tokens, d_in).chunk(passes)]
    gradients = [torch.randn(len(part), d_out) for part in inputs]

    def step_of(folded: Folded | None) -> Step:
        module = MeasuredLoRALinear(linear, bank, nn.Parameter(torch.full((tasks,), 0.3)))
        module.folded = folded

        def step() -> None:
            module.lam.grad = None
            if folded is not None:
                folded.begin(module.lam)
            for z, dy in zip(inputs, gradients, strict=True):
                z.grad = None
                if folded is not None:
                    folded.share = len(z) / tokens
                module(z).backward(dy)

        return step

    rule = Folded(linear, bank)
    steps = {"fused": step_of(None), "folded": step_of(Folded(linear, bank, always=True)), "rule": step_of(rule)}
    rule.begin(torch.zeros(tasks))
    return steps, rule.pays(torch.empty(tokens, 0))


def times(steps: dict[str, Step], seconds: float, rounds: int) -> dict[str, list[float]]:
    """Name -> processor seconds of a step in every round."""
    calls = {}
    for name, step in steps.items():
        step()
        start = time.process_time()
        step()
        calls[name] = max(1, int(seconds / rounds / max(time.process_time() - start, 1e-6)))
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        # In turn forwards and backwards, so that nobody always follows the same one.
        for name, step in list(steps.items())[:: -1 if number % 2 else 1]:
            start = time.process_time()
            for _ in range(calls[name]):
                step()
            taken[name].append((time.process_time() - start) / calls[name])
    return taken


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for d_in, d_out in arguments.shapes:
        for tasks in arguments.tasks:
            for tokens in arguments.tokens:
                if tokens * d_in * d_out > MOST_WORK:
                    continue
                kept, folds = contenders(d_in, d_out, tasks, arguments.rank, tokens, arguments.passes)
                taken = times(kept, arguments.seconds, arguments.rounds)
                medians = {name: statistics.median(values) for name, values in taken.items()}
                pairs = zip(taken["folded"], taken["fused"], strict=True)
                # Of the same round, so that slow spells of the machine cancel.
                ratio = statistics.median(folded / fused for folded, fused in pairs)
                yield {
                    "op": "fold",
                    "d_in": d_in,
                    "d_out": d_out,
                    "K": tasks,
                    "R": tasks * arguments.rank,
                    "tokens": tokens,
                    "passes": arguments.passes,
                    "cpu_seconds": medians,
                    "folded_to_fused": ratio,
                    "rule_folds": folds,
                    "loss": max(0.0, (ratio if folds else 1 / ratio) - 1),
                }


def line(row: dict[str, Any]) -> str:
    milliseconds = "  ".join(f"{name} {1e3 * used:9.3f}" for name, used in row["cpu_seconds"].items())
    return (
        f"{row['d_in']:5} -> {row['d_out']:5}  R={row['R']:<4} tokens={row['tokens']:<5} {milliseconds} ms"
        f"  folded/fused {row['folded_to_fused']:5.3f}  {'folds' if row['rule_folds'] else 'fused'}"
        f"  loss {100 * row['loss']:4.1f} %"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for fold-costs.jsonl")
    parser.add_argument("--seconds", type=float, default=0.6, help="per contender and case (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16, help="of every adapter (default %(default)s)")
    parser.add_argument("--passes", type=int, default=1, help="that a step's tokens are shared out to")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--tasks", type=int, nargs="+", default=list(TASKS))
    parser.add_argument("--shapes", type=_shape, nargs="+", default=SHAPES, metavar="IN:OUT")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    rows = [environment(threads=arguments.threads, rank=arguments.rank, load=os.getloadavg()[0])]
    for row in measure(arguments):
        rows.append(row)
        print(line(row), flush=True)
    worst = max(rows[1:], key=lambda row: row["loss"])
    print(f"the rule's worst loss: {100 * worst['loss']:.1f} %, at\n{line(worst)}")
    if arguments.out:
        write_rows(arguments.out / "fold-costs.jsonl", rows)
        print(f"wrote {arguments.out / 'fold-costs.jsonl'}", file=sys.stderr)
    return 0


def _shape(text: str) -> tuple[int, int]:
    d_in, d_out = map(int, text.split(":"))
    return d_in, d_out


if __name__ == "__main__":
    raise SystemExit(main())
