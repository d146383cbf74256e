"""The ``export`` and ``plot`` commands, which act on a finished merge."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from nsc_merge.commands.terminal import positive, prepare, say
from nsc_merge.utils.errors import UsageError


def add(commands: Any) -> None:
    """Add the commands to a parser's."""
    export = commands.add_parser(
        "export",
        help="write a finished merge in another format, or upload it",
        description="Writes a finished merge in another format. With --push-to-hub what is written is uploaded, too; "
        "without --format and --out, the merge as it is.",
    )
    export.add_argument("result", type=Path, help="folder written by nsc-merge run")
    export.add_argument("--format", choices=("lora", "model", "coefficients"))
    export.add_argument("--out", type=Path, metavar="DIR", help="folder to write")
    export.add_argument("--rank", type=positive, metavar="R", help="truncate lora to this rank")
    export.add_argument("--max-shard-size", metavar="SIZE", help="of model (default: files like the base's)")
    export.add_argument(
        "--dequantize", action="store_true", help="of a quantised base: write model in plain numbers, without it"
    )
    export.add_argument("--head", metavar="TASK", help="put the head of this task into lora or model")
    export.add_argument("--push-to-hub", metavar="REPO", help="upload to owner/name")
    export.add_argument("--private", action="store_true", help="make a repository that there is not yet a private one")
    export.add_argument(
        "--trust-remote-code", action="store_true", help="run the code of the base, where the merge did"
    )
    export.set_defaults(run=_export)
    plot = commands.add_parser("plot", help="draw the coefficients and ratios of a finished merge")
    plot.add_argument("result", type=Path, help="folder written by nsc-merge run")
    plot.add_argument("--out", type=Path, metavar="DIR", help="where to (default: into the result)")
    plot.set_defaults(run=_plot)


def _export(arguments: argparse.Namespace) -> int:
    _check(arguments)
    prepare(local=arguments.push_to_hub is None and _is_offline(arguments.result))
    if arguments.push_to_hub is not None:
        from nsc_merge.recipes.preflight import check_push

        check_push("--push-to-hub")
    if arguments.format is not None:
        _write(arguments)
    if arguments.push_to_hub is not None:
        from nsc_merge.results.hub import push

        url = push(arguments.out or arguments.result, arguments.push_to_hub, private=arguments.private)
        print(f"uploaded to {url}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuse arguments that do not go together."""
    from nsc_merge.utils.option_checks import is_repo, is_size

    if (arguments.format is None) != (arguments.out is None) or (
        arguments.format is None and arguments.push_to_hub is None
    ):
        raise UsageError(
            "--format, --out: expected both, to write the merge in a format, or neither, to upload it as it is with "
            "--push-to-hub"
        )
    if arguments.push_to_hub is not None and not is_repo(arguments.push_to_hub):
        raise UsageError(f"--push-to-hub: expected owner/name, found {arguments.push_to_hub!r:.80}")
    if arguments.private and arguments.push_to_hub is None:
        raise UsageError("--private: expected --push-to-hub owner/name beside it, found none")
    if arguments.rank is not None and arguments.format != "lora":
        raise UsageError("--rank: only --format lora can be truncated")
    for name in ("dequantize", "max_shard_size"):
        if getattr(arguments, name) and arguments.format != "model":
            raise UsageError(f"--{name.replace('_', '-')}: only --format model holds the base's weights")
    if arguments.head is not None and arguments.format not in ("lora", "model"):
        raise UsageError("--head: only --format lora and --format model have a head")
    if arguments.max_shard_size is not None and not is_size(arguments.max_shard_size):
        raise UsageError(
            f"--max-shard-size: expected a size such as 5GB or 500MB, found {arguments.max_shard_size!r:.60}"
        )


def _is_offline(result: Path) -> bool:
    """Whether all that a merge was made of is on disk; what is wrong with its recipe is said when it is read."""
    from nsc_merge.recipes.merge_recipe import load_recipe
    from nsc_merge.results.layout import RECIPE_FILE

    try:
        return load_recipe(result / RECIPE_FILE, [f"output.dir={json.dumps(str(result))}"]).offline
    except (ValueError, OSError):
        return True


def _write(arguments: argparse.Namespace) -> None:
    from nsc_merge.recipes.saved_result import load_result
    from nsc_merge.results.beside.preprocessing import preprocessing_notes
    from nsc_merge.results.beside.serving_notes import serving_notes

    result = load_result(arguments.result, numbers=False, trust_remote_code=arguments.trust_remote_code)
    result.save(
        arguments.out,
        arguments.format,
        rank=arguments.rank,
        max_shard_size=arguments.max_shard_size,
        dequantize=arguments.dequantize,
        head=arguments.head,
        labels=result.inputs.get("labels"),
    )
    say(f"written to {arguments.out}")
    notes = serving_notes(result, arguments.rank) if arguments.format == "lora" else []
    for note in [*notes, *preprocessing_notes(result)]:
        say(note)
    errors = {} if arguments.rank is None else result.rank_errors(arguments.rank)
    # There are none where adapters trained linears in full only.
    if errors:
        print(f"relative error of the truncation, by module (the largest is {max(errors.values()):.3g}):")
        for path, error in errors.items():
            say(f"  {error:.3g}  {path}")


def _plot(arguments: argparse.Namespace) -> int:
    from nsc_merge.recipes.saved_result import read_document
    from nsc_merge.results.beside.plots import draw
    from nsc_merge.utils.atomic_folder import only_writer

    # Before a folder is made for what there is not.
    read_document(arguments.result)
    folder = arguments.out or arguments.result
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out: expected a folder, found the file {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    # Another merge that is saved there meanwhile would have the pictures of this one beside it.
    with only_writer(folder):
        document, history = read_document(arguments.result)
        window = document["objective"].get("batches", 1)
        for file in draw(document["coefficients"], document["dead"], history, folder, window):
            say(str(file))
    return 0
