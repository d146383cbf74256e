"""The ``init`` command."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nsc_merge.commands.terminal import log, prepare, say
from nsc_merge.utils.errors import UsageError

_INIT = """\
Looks at adapters, base and data, and writes a recipe with comments, which nsc-merge run takes:

  nsc-merge init adapters/* --base base --data prompts.jsonl
  nsc-merge init french=runs/7/adapter legal=runs/9/adapter --base base --data data/
  nsc-merge run recipe.yaml --dry-run

Weights are not read: the base's configuration and the headers of the adapters' files are.
Without --base it is the one that the adapters' configurations name.
Tasks are called like their adapters' folders, unless TASK=FOLDER calls them otherwise.

--data is a file (.jsonl, .json, .csv, .parquet, .txt, or .safetensors of ready inputs), a
folder of images or of files called like the tasks, or the id owner/name of a dataset; with
TASK= in front it is of one task. Without it the recipe's method is one that takes no data.

--test is raw data with labels, a folder for each class, a table, questions with answers, words
with tags or chats, given as --data is; evaluation.yaml beside the recipe then measures merges on it:

  nsc-merge init adapters/* --base base --data photos --test photos-test
  nsc-merge run recipe.yaml && nsc-merge eval evaluation.yaml

--schema writes the JSON schema of recipes beside the recipe, from which editors complete and
check keys; alone it prints the schema, with a FILE it writes it there.
"""
SCHEMA_FILE, EVALUATION_FILE = "recipe.schema.json", "evaluation.yaml"
_BESIDE = object()


def add(commands: Any) -> None:
    """Add the command to a parser's."""
    init = commands.add_parser(
        "init",
        help="write a first recipe for adapters, a base and data",
        description=_INIT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    init.add_argument(
        "adapters",
        nargs="*",
        metavar="[TASK=]ADAPTER",
        help="PEFT folder, or owner/name[@revision] on the hub",
    )
    init.add_argument(
        "--base", metavar="DIR|ID", help="base model: folder, or hub id (owner/name); by default what the adapters name"
    )
    init.add_argument(
        "--data", action="append", default=[], metavar="[TASK=]FILE", help="unlabelled inputs; may be repeated"
    )
    init.add_argument(
        "--test", action="append", default=[], metavar="[TASK=]FILE", help="raw data with labels, for evaluation.yaml"
    )
    init.add_argument("--text", metavar="COLUMN", help=r'column of text or chats in raw data, or texts: "{a}\n{b}"')
    init.add_argument("--labels", metavar="COLUMN", help="column of the labels in --test (default: a usual name)")
    init.add_argument("--revision", metavar="REV", help="of a base on the hub")
    init.add_argument("--method", metavar="NAME", help="how to merge (default: what suits the data)")
    init.add_argument("--out", type=Path, default=Path("recipe.yaml"), help="- prints it (default: recipe.yaml)")
    init.add_argument("--force", action="store_true", help="replace a recipe that is there")
    init.add_argument("--schema", nargs="?", const=_BESIDE, metavar="FILE", help="write the JSON schema of recipes")
    init.add_argument("--json", action="store_true", help="print what was found as JSON")
    init.set_defaults(run=_init)


def _init(arguments: argparse.Namespace) -> int:
    if not arguments.adapters and arguments.schema is not None:
        file = None if arguments.schema is _BESIDE else Path(arguments.schema)
        if file is not None:
            _check_schema(file)
        _write_schema(file)
        return 0
    if not arguments.adapters:
        raise UsageError("ADAPTER: expected one or more folders of adapters, found none")
    out, shown = arguments.out, str(arguments.out) == "-"
    if shown and (arguments.json or arguments.schema is not None or arguments.test):
        raise UsageError("--out: - prints the recipe alone; expected a file with --json, --schema and --test")
    if arguments.text is not None and not (arguments.data or arguments.test):
        raise UsageError("--text: is of raw data, but no --data is given; expected --data FILE beside it, or no --text")
    if arguments.labels is not None and not arguments.test:
        raise UsageError("--labels: is of labelled data, but no --test is given; expected --test FILE beside it")
    from nsc_merge.utils.option_checks import is_hub_id

    places = [one.partition("=")[2] or one for one in (*arguments.adapters, *arguments.data, *arguments.test)]
    places += _named(arguments.adapters) if arguments.base is None else [arguments.base]
    if not shown:
        check_out(out, arguments.force, places)
    measures = out.parent / EVALUATION_FILE if arguments.test else None
    if measures is not None:
        if measures.resolve() == out.resolve():
            raise UsageError(f"--out: {out} is where --test writes the evaluation; expected another name")
        check_out(measures, arguments.force, places, "tasks")
    folder = Path.cwd() if shown else out.resolve().parent
    schema = _schema_path(arguments.schema, folder)
    beside = out.parent / SCHEMA_FILE if arguments.schema is _BESIDE else Path(arguments.schema or "")
    if schema is not None:
        _check_schema(beside, out, places)
    prepare(local=not any(is_hub_id(place.partition("@")[0]) for place in places))
    from nsc_merge.recipes.first.evaluation import evaluation_text, look_at_tests
    from nsc_merge.recipes.first.findings import find
    from nsc_merge.recipes.first.summary import render, summary
    from nsc_merge.recipes.first.text import recipe_text

    # No shell makes a line break of \n in quotes.
    text = None if arguments.text is None else arguments.text.replace(r"\n", "\n")
    found = find(
        arguments.adapters, arguments.base, arguments.data, arguments.method, text=text, revision=arguments.revision
    )
    tests = look_at_tests(arguments.test, found, text, arguments.labels)
    written = recipe_text(found, folder, "recipe.yaml" if shown else out.name, schema)
    if shown:
        print(written, end="")
        for warning in found.warnings:
            log(f"warning: {warning}")
        return 0
    # In front of the recipe, which names it.
    if schema is not None:
        _write_schema(beside)
    write_argument("--out", out, written)
    if measures is not None:
        write_argument("--test", measures, evaluation_text(found, tests, folder, measures.name))
    command = shlex.join(["nsc-merge", "run", str(out), "--dry-run"])
    if arguments.json:
        told = {task: {"source": one.source, "found": one.said} for task, one in tests.items()}
        further = {} if measures is None else {"evaluation": str(measures), "tests": told}
        say(json.dumps({**summary(found, str(out), command), **further}))
        return 0
    say(render(found, str(out), command))
    if measures is not None:
        say(f"and then  {shlex.join(['nsc-merge', 'eval', str(measures)])}")
    return 0


def _named(adapters: Sequence[str]) -> list[str]:
    """The bases that adapters in folders name. What is wrong with their configurations is said later."""
    from nsc_merge.utils.json_text import from_json

    found = []
    for adapter in adapters:
        folder = Path(adapter if Path(adapter).exists() else adapter.partition("=")[2])
        try:
            config = (folder.expanduser() / "adapter_config.json").read_bytes()
            named = from_json(config, "", not_finite=True)["base_model_name_or_path"]
        except (OSError, ValueError, LookupError, TypeError):
            continue
        found += [named] if isinstance(named, str) else []
    return found


def _schema_path(asked: Any, folder: Path) -> str | None:
    """Where the schema is to lie, relative to the recipe."""
    import os

    if asked is None:
        return None
    return SCHEMA_FILE if asked is _BESIDE else Path(os.path.relpath(asked, folder)).as_posix()


def _write_schema(file: Path | None) -> None:
    from nsc_merge.recipes.schema import schema

    text = json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"
    if file is None:
        print(text, end="")
    else:
        write_argument("--schema", file, text)


def check_out(out: Path, force: bool, given: Sequence[str], holds: str = "adapters") -> None:
    """Refuse a recipe in the place of what is not one, or among what it is written from.

    Args:
        out: file to write.
        force: whether a recipe there is to be replaced.
        given: the folders and files that the command takes; what is none is on the hub.
        holds: the key beside ``model`` that such a file does not lack.

    Raises:
        UsageError: naming ``--out``.
    """
    if out.is_dir():
        raise UsageError(f"--out: expected a file to write, found the folder {out}; --out {out / 'recipe.yaml'} is one")
    _refuse_among("--out", out, given)
    if not out.exists():
        return
    if not force:
        raise UsageError(f"--out: {out} is there already; --force replaces it, --out FILE writes another")
    from nsc_merge.utils.yaml_text import read_yaml

    # What reads as one has the keys that no recipe lacks. Nothing is lost with an empty file.
    try:
        is_recipe = out.stat().st_size == 0 or {"model", holds} <= set(read_yaml(out))
    except Exception:
        is_recipe = False
    if not is_recipe:
        raise UsageError(
            f"--out: {out} is there and reads as no recipe (keys model and {holds}), which alone --force replaces; "
            "--out FILE writes another"
        )


def write_argument(argument: str, file: Path, text: str) -> None:
    """Write a file that an argument names.

    Raises:
        UsageError: naming the argument, if it cannot be written.
    """
    from nsc_merge.utils.atomic_file import write_text

    try:
        write_text(file, text)
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"{argument}: {file} cannot be written: {reason}; expected a place that can be") from None


def _refuse_among(argument: str, file: Path, given: Sequence[str]) -> None:
    for text in given:
        place = Path(text).expanduser()
        # Whoever works in the folder of a base or of data wants the recipe there.
        if place.is_dir() and place.resolve() == Path.cwd():
            continue
        if place.exists() and file.resolve().is_relative_to(place.resolve()):
            how = "is" if place.resolve() == file.resolve() else "lies in"
            raise UsageError(f"{argument}: {file} {how} {text}, which the recipe is about; expected a place outside")


def _check_schema(file: Path, out: Path | None = None, given: Sequence[str] = ()) -> None:
    """Refuse a schema in the place of what is not one."""
    if file.is_dir():
        raise UsageError(f"--schema: expected a file to write, found the folder {file}; adapters stand before --schema")
    if out is not None and file.resolve() == out.resolve():
        raise UsageError(f"--schema: {file} is the recipe itself (--out); expected another file")
    _refuse_among("--schema", file, given)
    if not file.exists():
        return
    from nsc_merge.utils.json_text import from_json

    try:
        is_schema = file.stat().st_size == 0 or "$schema" in from_json(file.read_bytes(), "")
    except (OSError, ValueError, TypeError):
        is_schema = False
    if not is_schema:
        raise UsageError(f"--schema: {file} is there and reads as no JSON schema; expected another file")
