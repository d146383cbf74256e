"""The ``run`` command."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from nsc_merge.commands.terminal import log, prepare

_RUN = """\
Merges as a YAML recipe says:

  model: base                       # folder, or a hub id (owner/name)
  adapters:                         # task: PEFT folder
    depth: adapters/depth
    edge: adapters/edge
  calibration:                      # task: inputs stacked in one safetensors file, by input
    depth: inputs/depth.safetensors #   name, or a folder whose files are one batch each
    edge: inputs/edge.safetensors
  batch_size: 32                    # rows of a calibration file per batch
  method: nsc                       # see nsc-merge methods
  options: {steps: 100, lr: 1e-3}   # of the method; nsc's defaults depend on the model
  shared_modules: lambda            # or mean, first: modules trained in full, the base's own
  dora: refuse                      # or convert
  dtype: auto                       # or float32, bfloat16, ...
  device: auto                      # or cpu, cuda
  output: {dir: merged, formats: [lora, model], rank: null, max_shard_size: null, plots: true}

Relative paths are relative to the recipe; those in overrides to the working folder.
An override of the method drops the options that the recipe has for its own.
The output folder changes only once everything is written; what an earlier merge left
there goes, other files stay. Nothing but a hub id touches the network.

Method nsc keeps the state of a run beside the output folder, from which --resume goes
on with the same recipe and files.
"""


def add(commands: Any) -> None:
    """Add the command to a parser's."""
    run = commands.add_parser(
        "run",
        help="merge as a recipe says",
        description=_RUN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("recipe", type=Path, help="YAML file")
    run.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value", help="changes to the recipe")
    run.add_argument("--dry-run", action="store_true", help="load, check, estimate; write nothing")
    run.add_argument(
        "--resume", action="store_true", help="go on from the state of an interrupted run (method nsc)"
    )
    run.add_argument("--json", action="store_true", help="print the summary as JSON")
    run.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from nsc_merge.recipes.merge_recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    prepare(local=recipe.local)
    from nsc_merge.methods import method_of
    from nsc_merge.recipes.dry_run import plan, render_plan
    from nsc_merge.recipes.run import run, state_file

    if arguments.dry_run:
        found = plan(recipe, log, resume=arguments.resume)
        print(json.dumps(found) if arguments.json else render_plan(found))
        return 0
    try:
        summary = run(recipe, resume=arguments.resume, log=log)
    except KeyboardInterrupt:
        state = state_file(recipe)
        if method_of(recipe.method).resumable and state.is_file():
            again = shlex.join(["nsc-merge", "run", str(arguments.recipe), *arguments.overrides, "--resume"])
            log(f"the state is in {state}; go on with: {again}")
        raise
    if arguments.json:
        print(json.dumps(summary))
        return 0
    print(f"written to {summary['out']}: {', '.join(summary['files'])}")
    for note in summary.get("serving", ()):
        print(note)
    if "truncation" in summary:
        print(
            f"relative error of the truncation: {summary['truncation']['mean']:.3g} on average, "
            f"{summary['truncation']['max']:.3g} at most"
        )
    return 0
