"""The ``nsc-merge`` command."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nsc_merge.commands.analyse import add_analyse
from nsc_merge.commands.evaluate import add_eval
from nsc_merge.commands.terminal import log, names, positive, prepare, quieten_libraries
from nsc_merge.recipes.yaml_keys import UsageError

_DESCRIPTION = "Merge LoRA adapters into one model without labels (NSC merging, arXiv 2603.26317)."
_DEMO = """\
Merges the LoRA adapters of six tasks on a small ViT and measures the result, on
images composed from scikit-learn's digits and photographs. Takes under a minute
and no network. Prints a table; writes coefficients, the merged PEFT adapter, the
history and plots."""
_EPILOG = """\
examples:
  nsc-merge run recipe.yaml --dry-run             load, check, and estimate time and memory
  nsc-merge run recipe.yaml options.steps=200     merge; with method nsc, Ctrl-C and --resume at any time
  nsc-merge inspect adapters/* --model base --inputs depth.safetensors
  nsc-merge eval evaluation.yaml                  measure merges on labelled data, side by side
  nsc-merge analyse quartiles evaluation.yaml     null-space ratio of every sample against its quality
  nsc-merge export merged --format lora --rank 16 --out merged-16
  nsc-merge demo                                  merge six adapters of a small ViT and measure the result
  nsc-merge demo --tasks depth,normal,edge,semseg --out dense
  nsc-merge demo --steps 20 --json > summary.json
  nsc-merge demo --retrain --assets my-assets     train base and adapters anew (15-20 minutes)
  nsc-merge demo --assets my-assets               and merge those

exit status: 0 success, 1 failure (one line says why), 2 wrong usage or recipe, 130 interrupted, 141 output closed
"""
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
  shared_modules: lambda            # or mean, first: modules trained in full before the head
  dora: refuse                      # or convert
  dtype: auto                       # or float32, bfloat16, ...
  device: auto                      # or cpu, cuda
  output: {dir: merged, formats: [lora, model], rank: null, max_shard_size: 5GB, plots: true}

Relative paths are relative to the recipe; those in overrides to the working folder.
The output folder changes only once everything is written; what an earlier merge left
there goes, other files stay. Nothing but a hub id touches the network.

Method nsc keeps the state of a run beside the output folder, from which --resume goes
on with the same recipe and files.
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="nsc-merge",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and stop")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_run(commands)
    _add_inspect(commands)
    _add_export(commands)
    _add_plot(commands)
    add_eval(commands)
    add_analyse(commands)
    methods = commands.add_parser("methods", help="list the merge methods and their options")
    methods.add_argument("--json", action="store_true", help="print JSON")
    methods.set_defaults(run=_methods)
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
        "--steps", type=positive, default=100, metavar="N", help="optimisation steps (default: 100)"
    )
    demo.add_argument(
        "--seed", type=int, default=0, help="order of calibration batches, or of --retrain (default: 0)"
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
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


class _Version(argparse.Action):
    """Prints the version, which is not looked up before."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from nsc_kernels import __version__

        print(f"nsc-merge {__version__}")
        parser.exit()


def _add_run(commands: Any) -> None:
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


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser("inspect", help="ranks, modules and overlap of adapters; fit to given inputs")
    inspect.add_argument("adapters", nargs="+", type=Path, metavar="ADAPTER", help="PEFT folder")
    inspect.add_argument("--model", metavar="DIR|ID", help="base model: checks that every module is in it")
    inspect.add_argument(
        "--inputs", type=Path, metavar="FILE|DIR", help="measure null-space ratios on these (needs --model)"
    )
    inspect.add_argument("--batch-size", type=positive, default=32, metavar="N", help="of --inputs (default: 32)")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)


def _add_export(commands: Any) -> None:
    export = commands.add_parser("export", help="write a finished merge in another format")
    export.add_argument("result", type=Path, help="folder written by nsc-merge run")
    export.add_argument("--format", required=True, choices=("lora", "model", "coefficients"))
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    export.add_argument("--rank", type=positive, metavar="R", help="truncate lora to this rank")
    export.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of model (default: 5GB)")
    export.set_defaults(run=_export)


def _add_plot(commands: Any) -> None:
    plot = commands.add_parser("plot", help="draw the coefficients and ratios of a finished merge")
    plot.add_argument("result", type=Path, help="folder written by nsc-merge run")
    plot.add_argument("--out", type=Path, metavar="DIR", help="where to (default: into the result)")
    plot.set_defaults(run=_plot)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    # Idle OpenMP threads spin by default, which makes steps several times slower when other programs want the
    # cores. Read when torch is imported, which is later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes a list of positionals in one place only; overrides may stand among the options.
    if rest and (not hasattr(arguments, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    try:
        status = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Whoever read the output has seen enough; what is left of it must not be written at the end, either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("nsc-merge: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        if arguments.debug:
            raise
        what = str(error)
        if isinstance(error, UnicodeEncodeError):
            what = f"the locale's encoding {error.encoding} has no form of {error.object!r}; expected LC_ALL=C.UTF-8"
        # One line, whatever the library that raised it wrote.
        print(f"nsc-merge: error: {' '.join(what.split())}", file=sys.stderr)
        return getattr(error, "exit_status", 1)
    except Exception as error:
        if arguments.debug:
            raise
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(f"nsc-merge: unexpected error: {what} (--debug shows where)", file=sys.stderr)
        return 1


def _run(arguments: argparse.Namespace) -> int:
    from nsc_merge.recipes.merge_recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    prepare(local=recipe.local)
    from nsc_merge.methods import method_of
    from nsc_merge.recipes import run

    if arguments.dry_run:
        plan = run.plan(recipe, log, resume=arguments.resume)
        print(json.dumps(plan) if arguments.json else run.render_plan(plan))
        return 0
    try:
        summary = run.run(recipe, resume=arguments.resume, log=log)
    except KeyboardInterrupt:
        state = run.state_file(recipe)
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


def _inspect(arguments: argparse.Namespace) -> int:
    from nsc_merge.recipes.yaml_keys import is_hub_id

    if arguments.inputs and not arguments.model:
        raise UsageError("--inputs: needs --model")
    local = not (arguments.model and is_hub_id(arguments.model, Path.cwd()))
    prepare(local=local)
    from nsc_merge.adapters import load_adapter
    from nsc_merge.analysis import adapter_overlap
    from nsc_merge.calibration.batch_files import check_names, read_batches
    from nsc_merge.models.attachment import merged_linears
    from nsc_merge.models.fitting import fit
    from nsc_merge.models.loading import load_model

    called = [folder.name for folder in arguments.adapters]
    if len(set(called)) != len(called):
        called = [str(folder) for folder in arguments.adapters]
    if len(set(called)) != len(called):
        raise UsageError(f"ADAPTER: {max(called, key=called.count)} is given twice")
    adapters = {
        name: load_adapter(folder, name, dora="convert")
        for name, folder in zip(called, arguments.adapters, strict=True)
    }
    document: dict[str, Any] = {}
    if arguments.model:
        model = load_model(arguments.model, local=local)
        adapters = fit(adapters, model)
        merged_linears(model, adapters)
        if arguments.inputs:
            batches = read_batches(arguments.inputs, arguments.batch_size, "--inputs")
            check_names(batches, model, "--inputs")
            document["null_space_ratio"] = adapter_overlap.null_space_ratios(model, adapters, batches)
    document["adapters"] = {name: adapter_overlap.describe(adapter) for name, adapter in adapters.items()}
    document["overlaps"] = adapter_overlap.overlaps(adapters)
    print(json.dumps(document) if arguments.json else adapter_overlap.render(document))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    prepare(local=True)
    from nsc_merge.recipes.saved_result import load_result
    from nsc_merge.results.serving_notes import serving_notes

    if arguments.rank is not None and arguments.format != "lora":
        raise UsageError("--rank: only --format lora can be truncated")
    result = load_result(arguments.result)
    result.save(
        arguments.out, arguments.format, rank=arguments.rank, max_shard_size=arguments.max_shard_size
    )
    print(f"written to {arguments.out}")
    if arguments.format == "lora":
        for note in serving_notes(result, arguments.rank):
            print(note)
    if arguments.rank is not None:
        errors = result.rank_errors(arguments.rank)
        print(f"relative error of the truncation, by module (the largest is {max(errors.values()):.3g}):")
        for path, error in errors.items():
            print(f"  {error:.3g}  {path}")
    return 0


def _plot(arguments: argparse.Namespace) -> int:
    from nsc_merge.recipes.saved_result import read_document
    from nsc_merge.results.plots import draw

    document, history = read_document(arguments.result)
    folder = arguments.out or arguments.result
    folder.mkdir(parents=True, exist_ok=True)
    for file in draw(document["coefficients"], document["dead"], history, folder):
        print(file)
    return 0


def _methods(arguments: argparse.Namespace) -> int:
    from nsc_merge.methods.registry import describe_methods

    methods = describe_methods()
    if arguments.json:
        print(json.dumps(methods))
        return 0
    for name, method in methods.items():
        by_family = {option for recipe in method["recipes"].values() for option in recipe["options"]}
        options = ", ".join(
            f"{option}={'by recipe' if option in by_family else repr(value)}"
            for option, value in method["options"].items()
        )
        lines = [f"  {method['summary']}", f"  {method['paper']}"]
        if method["needs"]:
            lines.append(f"  needs: {', '.join(method['needs'])}")
        if method["tuned"]:
            lines.append(f"  tuned on validation data: {method['tuned']}")
        if options:
            lines += textwrap.wrap(f"options: {options}", 100, initial_indent="  ", subsequent_indent="    ")
        for recipe, its in method["recipes"].items():
            settings = ", ".join(f"{option}={value!r}" for option, value in its["options"].items())
            lines.append(f"  recipe {recipe} ({', '.join(its['families']) or 'on demand'}): {settings}")
        print("\n".join([name, *lines]))
    return 0


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
    from nsc_merge.demo.run import render, run_demo
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
    print(json.dumps(summary) if arguments.json else f"\n{render(summary)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
