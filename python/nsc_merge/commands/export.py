"""The ``export`` and ``plot`` commands, which act on a finished merge."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nsc_merge.commands.terminal import positive, prepare
from nsc_merge.utils.errors import UsageError


def add(commands: Any) -> None:
    """Add the commands to a parser's."""
    export = commands.add_parser("export", help="write a finished merge in another format")
    export.add_argument("result", type=Path, help="folder written by nsc-merge run")
    export.add_argument("--format", required=True, choices=("lora", "model", "coefficients"))
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    export.add_argument("--rank", type=positive, metavar="R", help="truncate lora to this rank")
    export.add_argument("--max-shard-size", metavar="SIZE", help="of model (default: files like the base's)")
    export.set_defaults(run=_export)
    plot = commands.add_parser("plot", help="draw the coefficients and ratios of a finished merge")
    plot.add_argument("result", type=Path, help="folder written by nsc-merge run")
    plot.add_argument("--out", type=Path, metavar="DIR", help="where to (default: into the result)")
    plot.set_defaults(run=_plot)


def _export(arguments: argparse.Namespace) -> int:
    prepare(local=True)
    from nsc_merge.recipes.merge_recipe import is_size
    from nsc_merge.recipes.saved_result import load_result
    from nsc_merge.results.beside.serving_notes import serving_notes

    if arguments.rank is not None and arguments.format != "lora":
        raise UsageError("--rank: only --format lora can be truncated")
    if arguments.max_shard_size is not None and not is_size(arguments.max_shard_size):
        raise UsageError(
            f"--max-shard-size: expected a size such as 5GB or 500MB, found {arguments.max_shard_size!r:.60}"
        )
    result = load_result(arguments.result, numbers=False)
    result.save(
        arguments.out, arguments.format, rank=arguments.rank, max_shard_size=arguments.max_shard_size
    )
    print(f"written to {arguments.out}")
    if arguments.format == "lora":
        for note in serving_notes(result, arguments.rank):
            print(note)
    errors = {} if arguments.rank is None else result.rank_errors(arguments.rank)
    # There are none where adapters trained linears in full only.
    if errors:
        print(f"relative error of the truncation, by module (the largest is {max(errors.values()):.3g}):")
        for path, error in errors.items():
            print(f"  {error:.3g}  {path}")
    return 0


def _plot(arguments: argparse.Namespace) -> int:
    from nsc_merge.recipes.saved_result import read_document
    from nsc_merge.results.beside.plots import draw

    document, history = read_document(arguments.result)
    folder = arguments.out or arguments.result
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out: expected a folder, found the file {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    window = document["objective"].get("batches", 1)
    for file in draw(document["coefficients"], document["dead"], history, folder, window):
        print(file)
    return 0
