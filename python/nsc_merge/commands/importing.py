"""The ``import`` command."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from nsc_merge.commands.init import check_out, write_argument
from nsc_merge.commands.terminal import log, prepare, say
from nsc_merge.utils.errors import UsageError

_IMPORT = """\
Makes a recipe of a configuration of mergekit whose models are LoRA adapters on one base:

  nsc-merge import mergekit.yaml
  nsc-merge import mergekit.yaml --out recipe.yaml --force
  nsc-merge run recipe.yaml

  merge_method: ties                            # linear, task_arithmetic, ties, dare_linear, dare_ties;
  base_model: owner/base                        #   breadcrumbs, della; nsc_ and any method of
  models:                                       #   nsc-merge methods that needs no data
    - model: owner/base+owner/french            # base+adapter, as mergekit has it, or a PEFT folder
      parameters: {weight: 0.6, density: 0.5}
    - model: owner/base+owner/legal
      parameters: {weight: 0.4, density: 0.5}
  dtype: bfloat16

The recipe computes what mergekit does (what is dropped at random is drawn otherwise), from the
adapters' factors: no checkpoint is made of each, differences are not taken between rounded
weights, and the result is an adapter, too, where the method's update is one.

What a recipe has no place for is refused by name: slices, modules, values that change with
layers or names of tensors, densities that differ, tokenizers other than the base's.
python -m nsc_merge.integrations.mergekit mergekit.yaml OUT merges such a file in mergekit.

Paths in the configuration are relative to the working folder, as for mergekit.
"""


def add(commands: Any) -> None:
    """Add the command to a parser's."""
    command = commands.add_parser(
        "import",
        help="make a recipe of a configuration of mergekit",
        description=_IMPORT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("config", type=Path, help="YAML file of mergekit")
    command.add_argument("--out", type=Path, default=Path("recipe.yaml"), help="- prints it (default: recipe.yaml)")
    command.add_argument("--force", action="store_true", help="replace a recipe that is there")
    command.add_argument("--json", action="store_true", help="print what was imported as JSON")
    command.set_defaults(run=_import)


def _import(arguments: argparse.Namespace) -> int:
    out, printed = arguments.out, str(arguments.out) == "-"
    if not printed and out.resolve() == arguments.config.resolve():
        raise UsageError(f"--out: {out} is the configuration itself; expected another file")
    if not printed:
        check_out(out, arguments.force, ())
    if printed and arguments.json:
        raise UsageError("--out: - prints the recipe alone; expected a file with --json")
    # Of adapters on the hub the headers are read.
    prepare(local=False)
    from nsc_merge.recipes.first.mergekit.configurations import from_mergekit
    from nsc_merge.recipes.first.mergekit.text import import_said, import_summary, imported_text

    found = from_mergekit(arguments.config)
    written = imported_text(found, Path.cwd() if printed else out.resolve().parent, out.name)
    if printed:
        print(written, end="")
        for note in found.notes:
            log(f"note: {note}")
        return 0
    write_argument("--out", out, written)
    command = shlex.join(["nsc-merge", "run", str(out), "--dry-run"])
    told = import_summary(found, str(out), command) if arguments.json else import_said(found, str(out), command)
    say(json.dumps(told) if isinstance(told, dict) else told)
    return 0
