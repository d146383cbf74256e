"""Speed of the operator on a GPU: the contenders of nsc_kernels.bench on the layers of layers.py, in order of worth.

    python -m bench.hardware.operator_speed --out bench.jsonl [--sets operator whole] [--seconds 500]

A trial is one set of contenders on one shape, with one of our backends among them, in one process. Each is first
compared with float64 at the very size; one that is wrong is named and not timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from nsc_kernels.bench.registry import LINEAR, OPERATOR
from nsc_kernels.bench.rounds import EAGER, GRAPH, WARM, Cell, run_cell
from nsc_kernels.bench.trials import Trial, add_backends, available, supervise, trial_arguments
from nsc_kernels.bench.workers import Meet

from .. import from_tests
from .layers import DRY_RUN, FAMILIES, LARGE, MLP


class Set(NamedTuple):
    """``limit``: seconds that one shape may take, compilation and all."""

    of: str
    names: tuple[str, ...]
    hows: tuple[tuple[str, str], ...]
    limit: float


SETS = {
    "operator": Set(
        OPERATOR, ("fused", "fused_inplace", "concat", "concat_inplace", "loop", "peft"), (GRAPH, EAGER, WARM), 90
    ),
    "whole": Set(
        LINEAR,
        ("fused", "concat", "product_copied", "product_ready", "loop", "peft", "merged", "linear"),
        (GRAPH, EAGER),
        90,
    ),
    "compiled": Set(OPERATOR, ("fused", "compiled"), (GRAPH, EAGER), 150),
    "two_launches": Set(
        OPERATOR, ("fused", "fused_inplace", "two_launches", "two_launches_inplace"), (GRAPH, EAGER), 180
    ),
    "autograd": Set(
        OPERATOR, ("fused_autograd", "concat_autograd", "compiled_autograd", "loop"), (EAGER,), 150
    ),
    "autotuned": Set(OPERATOR, ("fused", "autotuned"), (GRAPH, EAGER), 400),
    "whole_compiled": Set(LINEAR, ("fused", "two_launches", "compiled", "autotuned"), (GRAPH, EAGER), 400),
    "others": Set(OPERATOR, ("fused", "vllm"), (GRAPH, EAGER), 180),
    "whole_others": Set(LINEAR, ("fused", "lorafusion", "unsloth", "unsloth_matmul"), (EAGER,), 180),
}
# In the order of their worth. Each phase is run for all backends before the next; what compiles for long comes last.
PHASES = [
    [("operator", FAMILIES), ("whole", FAMILIES)],
    [
        ("compiled", FAMILIES),
        ("operator", [*LARGE, *MLP]),
        ("two_launches", FAMILIES),
        ("whole", [*MLP, *LARGE]),
        ("autograd", FAMILIES),
        ("compiled", [*LARGE, *MLP]),
        ("two_launches", [*LARGE, *MLP]),
    ],
    [("autotuned", FAMILIES), ("whole_compiled", FAMILIES), ("autotuned", LARGE)],
]


class What(NamedTuple):
    """The payload of a trial; ``set``: a name of :data:`SETS`, which the rows have in place of the command's."""

    set: str
    cell: Cell


def run_trial(what: What, on: torch.device) -> Iterator[dict[str, Any]]:
    for row in run_cell(what.cell, on):
        yield row | {"set": what.set}


def trials(args: argparse.Namespace) -> dict[str, Trial]:
    clocks = args.out.with_name("clocks.jsonl")
    found = {}
    phases = [[(name, [DRY_RUN]) for name in SETS]] if args.dry_run else PHASES
    for i, phase in enumerate(phases):
        for backend in available(args.backends):
            for name, shapes in phase:
                one = SETS[name]
                # The interpreter takes a tenth of a second per call: a dry run goes through each way once.
                hows = one.hows[: None if name == "operator" else 1] if args.dry_run else one.hows
                samples = 1 if args.dry_run else args.samples
                for shape in shapes if name in args.sets else ():
                    key = f"{backend} {name} {shape.name} T={shape.T} {shape.d_in}->{shape.d_out} R={shape.R}"
                    small = int(args.dry_run)  # bytes: two sets then do
                    cell = Cell(one.of, shape, "bf16", one.names, hows, samples, 0.0, 0, backend, clocks, small)
                    found[key] = Trial(f"{backend} phase {i + 1}", What(name, cell), one.limit)
    return found


def main(meet: Meet = from_tests.device) -> int:
    parser = trial_arguments(__doc__)
    parser.add_argument("--samples", type=int, default=15)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    add_backends(parser)
    args = parser.parse_args()
    outcome = supervise(args, trials(args), run_trial, meet)
    print(outcome)
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
