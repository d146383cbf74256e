"""The ``analyse`` commands: their texts and parsers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nsc_merge.commands.terminal import names, positive, seed

_ANALYSE = """\
Measures the phenomena that NSC builds on, on your own models and adapters.

  tracking   the null-space ratio over the training of an adapter, beside its validation loss
  quartiles  the ratio of every sample against how well it is predicted
  bound      the lower bound on an adapter's effect (Proposition 1), at every input

examples:
  nsc-merge analyse tracking runs/depth --model base --inputs depth-val.safetensors --out analysis
  nsc-merge analyse quartiles evaluation.yaml --row finetuned --out analysis
  nsc-merge analyse bound adapters/depth --model base --inputs depth-val.safetensors
"""
_TRACKING = """\
Measures the null-space ratio of an adapter at every checkpoint, each in the model of its own step, and Spearman's rho
with what was logged: 'all' is over the mean of all modules; 'changes', between the differences of successive
checkpoints, cannot come from both merely falling over time. A falling ratio alone does not show that a task is being
learnt: it also falls on permuted labels.

RUN holds PEFT folders whose names end in the step (checkpoint-500, steps/0024), and perhaps a log: steps.jsonl (JSON
lines with a step and numbers), or the trainer_state.json of transformers.

example:
  nsc-merge analyse tracking runs/depth --model base --inputs depth-val.safetensors --column loss --out analysis
"""
_QUARTILES = """\
Splits the test samples of every task into equal shares by the null-space ratio of the task's own adapter, and shows
the mean quality in each: accuracy, intersection over union, or the negative error. 'others' is the same correlation
for the other tasks' adapters: where it is alike, the ratio tells how hard a sample is, and nothing about the adapter.

RECIPE is that of nsc-merge eval; --row is a row of it by its name: a method, or a folder written by nsc-merge run, of
which the coefficients are taken. With finetuned every task is studied in its own model.

example:
  nsc-merge analyse quartiles evaluation.yaml --row "TA 0.4" --blocks last_quarter --modules o_proj
"""
_BOUND = """\
Checks ||s B A z|| >= s sigma_min(B) sigma_min(A) sqrt(1 - w(z)^2) ||z||, Proposition 1 of arXiv 2603.26317, in float64
at every input z of every adapted module. It is a theorem; what is measured besides is how far above the bound the
effect lies, and whether inputs of a lower ratio w have a larger effect.

example:
  nsc-merge analyse bound adapters/depth --model base --inputs depth-val.safetensors --json
"""


def add(commands: Any) -> None:
    """Add the commands to a parser's."""
    raw = argparse.RawDescriptionHelpFormatter
    analyse = commands.add_parser(
        "analyse",
        help="null-space ratios over training, per sample, and the bound on an adapter's effect",
        description=_ANALYSE,
        formatter_class=raw,
    )
    analyse.set_defaults(run=_run)
    kinds = analyse.add_subparsers(dest="analysis", required=True, metavar="ANALYSIS")
    tracking = kinds.add_parser(
        "tracking", help="ratios over training", description=_TRACKING, formatter_class=raw
    )
    tracking.add_argument("folder", type=Path, metavar="RUN", help="folder of checkpoints")
    _add_inputs(tracking)
    tracking.add_argument("--log", type=Path, metavar="FILE", help="what was logged (default: found in RUN)")
    tracking.add_argument(
        "--column", action="append", metavar="NAME", help="of the log; repeatable (default: all)"
    )
    quartiles = kinds.add_parser(
        "quartiles", help="ratios per sample", description=_QUARTILES, formatter_class=raw
    )
    quartiles.add_argument("recipe", type=Path, help="YAML file of nsc-merge eval")
    quartiles.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value", help="changes to the recipe")
    quartiles.add_argument("--row", default="finetuned", help="of the recipe (default: finetuned)")
    quartiles.add_argument("--tasks", type=names, metavar="A,B,...", help="of the recipe (default: all)")
    quartiles.add_argument("--seed", type=seed, help="of the recipe (default: its first)")
    quartiles.add_argument("--bins", type=positive, default=4, metavar="N", help="shares (default: 4)")
    bound = kinds.add_parser("bound", help="Proposition 1", description=_BOUND, formatter_class=raw)
    bound.add_argument("adapter", metavar="ADAPTER", help="PEFT folder, or owner/name on the hub")
    _add_inputs(bound)
    bound.add_argument(
        "--at",
        choices=("adapter", "base"),
        default="adapter",
        help="inputs in the model with the adapter, or in the base (default: adapter)",
    )
    for kind in (tracking, bound):
        kind.add_argument(
            "--dora",
            choices=("refuse", "convert"),
            default="refuse",
            help="refuse DoRA, or convert it to a LoRA update of the same rank (default: refuse)",
        )
    for kind in kinds.choices.values():
        kind.add_argument(
            "--modules", type=names, metavar="A,B,...", help="names such as o_proj (default: all)"
        )
        kind.add_argument(
            "--blocks",
            type=_blocks,
            metavar="N|A,B,...",
            help="last_quarter, how many last blocks, or block numbers with a comma (default: all)",
        )
        kind.add_argument("--out", type=Path, metavar="DIR", help="write JSON and a picture there")
        kind.add_argument("--json", action="store_true", help="print JSON")
        kind.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR|ID", help="base model")
    parser.add_argument(
        "--inputs", required=True, type=Path, metavar="FILE|DIR", help="safetensors of model inputs"
    )
    parser.add_argument(
        "--batch-size", type=positive, default=32, metavar="N", help="of --inputs (default: 32)"
    )


def _run(arguments: argparse.Namespace) -> int:
    from nsc_merge.commands.analyse import actions

    run = {"tracking": actions.tracking, "quartiles": actions.quartiles, "bound": actions.bound}
    return run[arguments.analysis](arguments)


def _blocks(text: str) -> str | int | list[int]:
    if text == "last_quarter":
        return text
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers:
        raise argparse.ArgumentTypeError(
            f"expected last_quarter, a number, or numbers with commas, found {text!r:.60}"
        )
    return numbers if "," in text else numbers[0]
