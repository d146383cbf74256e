"""The ``nsc-merge`` command."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

_DESCRIPTION = "Merge LoRA adapters into one model without labels (NSC merging, arXiv 2603.26317)."
_DEMO = """\
Merges the LoRA adapters of six tasks on a small ViT and measures the result, on
images composed from scikit-learn's digits and photographs. Takes under a minute
and no network. Prints a table; writes coefficients, the merged PEFT adapter, the
history and plots."""
_EPILOG = """\
examples:
  nsc-merge demo                                  merge six adapters of a small ViT and measure the result
  nsc-merge demo --tasks depth,normal,edge,semseg --out dense
  nsc-merge demo --steps 20 --json > summary.json
  nsc-merge demo --retrain --assets my-assets     train base and adapters anew (15-20 minutes)
  nsc-merge demo --assets my-assets               and merge those

exit status: 0 success, 1 failure (one line says why), 2 wrong usage, 130 interrupted
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="nsc-merge",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="merge real adapters on real images and compare with task arithmetic",
        description=_DEMO,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_argument(
        "--out", type=Path, default=Path("nsc-demo"), metavar="DIR", help="results (default: nsc-demo)"
    )
    demo.add_argument(
        "--steps", type=_positive, default=100, metavar="N", help="optimisation steps (default: 100)"
    )
    demo.add_argument(
        "--seed", type=int, default=0, help="order of calibration batches, or of --retrain (default: 0)"
    )
    demo.add_argument("--tasks", type=_names, metavar="A,B,...", help="subset of tasks (default: all six)")
    demo.add_argument(
        "--assets", type=Path, metavar="DIR", help="trained parts (default: those of the package)"
    )
    demo.add_argument(
        "--retrain", action="store_true", help="train base, adapters and heads into --assets and stop"
    )
    demo.add_argument("--json", action="store_true", help="print the summary as JSON instead of a table")
    demo.set_defaults(run=_demo)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("nsc-merge: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        if os.environ.get("NSC_MERGE_TRACEBACK"):
            raise
        print(f"nsc-merge: error: {error}", file=sys.stderr)
        return 1


def _demo(arguments: argparse.Namespace) -> int:
    if arguments.retrain and arguments.assets is None:
        raise ValueError("--retrain: say where to write with --assets DIR")
    _quieten_libraries()
    import torch

    # The matrices are so small that a second thread gains little, and on a busy machine it stalls.
    torch.set_num_threads(1)
    if arguments.retrain:
        from nsc_merge.demo.train import retrain

        retrain(arguments.assets, seed=arguments.seed, log=_log)
        return 0
    from nsc_merge.demo.run import render, run_demo
    from nsc_merge.demo.tasks import TASKS

    summary = run_demo(
        arguments.out,
        assets=arguments.assets,
        tasks=arguments.tasks or list(TASKS),
        steps=arguments.steps,
        seed=arguments.seed,
        log=_log,
    )
    print(json.dumps(summary) if arguments.json else f"\n{render(summary)}")
    return 0


def _quieten_libraries() -> None:
    """Keep transformers' own bars and deprecation notices out of the demo's output."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text}")
    return value


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


if __name__ == "__main__":
    sys.exit(main())
