"""The ``demo`` command."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from nsc_merge.commands.terminal import EXAMPLES, log, names, positive, quieten_libraries, say, seed
from nsc_merge.utils.errors import UsageError

_DEMO = """\
Merges the LoRA adapters of six tasks on a small ViT by NSC, match and distill and
measures the results, on images composed from scikit-learn's digits and
photographs. Takes a minute or two and no network. Prints a table and which method
when; writes NSC's coefficients, merged PEFT adapter, history and plots."""


def add(commands: Any) -> None:
    """Add the command to a parser's."""
    demo = commands.add_parser(
        "demo",
        help="merge real adapters on real images and compare with task arithmetic",
        description=_DEMO,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_argument(
        "--out", type=Path, default=Path("nsc-demo"), metavar="DIR", help="results (default: nsc-demo)"
    )
    demo.add_argument(
        "--steps",
        type=positive,
        default=100,
        metavar="N",
        help="steps of NSC (default: 100); match and distill take at most 30",
    )
    demo.add_argument(
        "--seed", type=seed, default=0, help="order of calibration batches, or of --retrain (default: 0)"
    )
    demo.add_argument("--tasks", type=names, metavar="A,B,...", help="subset of tasks (default: all six)")
    demo.add_argument(
        "--assets", type=Path, metavar="DIR", help="trained parts (default: those of the package)"
    )
    demo.add_argument(
        "--retrain", action="store_true", help="train base, adapters and heads into --assets and stop"
    )
    demo.add_argument("--json", action="store_true", help="print the summary as JSON instead of a table")
    demo.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    if arguments.retrain and arguments.assets is None:
        raise UsageError("--retrain: say where to write with --assets DIR")
    quieten_libraries()
    import torch

    # The matrices are so small that a second thread gains little, and on a busy machine it stalls.
    torch.set_num_threads(1)
    if arguments.retrain:
        from nsc_merge.demo.train import retrain

        retrain(arguments.assets, seed=arguments.seed, log=log)
        return 0
    from nsc_merge.demo.report import render
    from nsc_merge.demo.run import run_demo
    from nsc_merge.demo.tasks import TASKS

    tasks = arguments.tasks or list(TASKS)
    if not set(tasks) <= set(TASKS) or len(tasks) < 2 or len(set(tasks)) != len(tasks):
        raise UsageError(f"--tasks: expected two or more different ones of {list(TASKS)}, found {tasks}")
    summary = run_demo(
        arguments.out,
        assets=arguments.assets,
        tasks=tasks,
        steps=arguments.steps,
        seed=arguments.seed,
        log=log,
    )
    say(json.dumps(summary) if arguments.json else f"\n{render(summary)}")
    return 0
