"""The ``analyse`` commands."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsc_merge.commands.terminal import log, names, positive, prepare
from nsc_merge.recipes.yaml_keys import UsageError, is_hub_id

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nsc_merge.calibration.batch_files import Batches
    from nsc_merge.evaluation.scoring import Candidate

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

RECIPE is that of nsc-merge eval; --row is one of its methods, or a folder written by nsc-merge run, of which the
coefficients are taken. With finetuned every task is studied in its own model.

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


def add_analyse(commands: Any) -> None:
    """Add the commands to a parser's."""
    raw = argparse.RawDescriptionHelpFormatter
    analyse = commands.add_parser(
        "analyse",
        help="null-space ratios over training, per sample, and the bound on an adapter's effect",
        description=_ANALYSE,
        formatter_class=raw,
    )
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
    tracking.set_defaults(run=_tracking)
    quartiles = kinds.add_parser(
        "quartiles", help="ratios per sample", description=_QUARTILES, formatter_class=raw
    )
    quartiles.add_argument("recipe", type=Path, help="YAML file of nsc-merge eval")
    quartiles.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value", help="changes to the recipe")
    quartiles.add_argument("--row", default="finetuned", help="of the recipe (default: finetuned)")
    quartiles.add_argument("--tasks", type=names, metavar="A,B,...", help="of the recipe (default: all)")
    quartiles.add_argument("--seed", type=int, help="of the recipe (default: its first)")
    quartiles.add_argument("--bins", type=positive, default=4, metavar="N", help="shares (default: 4)")
    quartiles.set_defaults(run=_quartiles)
    bound = kinds.add_parser("bound", help="Proposition 1", description=_BOUND, formatter_class=raw)
    bound.add_argument("adapter", type=Path, metavar="ADAPTER", help="PEFT folder")
    _add_inputs(bound)
    bound.add_argument(
        "--at",
        choices=("adapter", "base"),
        default="adapter",
        help="inputs in the model with the adapter, or in the base (default: adapter)",
    )
    bound.set_defaults(run=_bound)
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


@contextmanager
def _arguments_at_fault() -> Iterator[None]:
    """Make errors that name what --blocks and --modules are called inside name these."""
    try:
        yield
    except ValueError as error:
        name, _, rest = str(error).partition(":")
        argument = {"score_blocks": "--blocks", "score_modules": "--modules", "modules": "--modules"}.get(name)
        if argument is None:
            raise
        raise UsageError(f"{argument}:{rest}") from error


def _tracking(arguments: argparse.Namespace) -> int:
    from nsc_merge.analysis.tracking import find_checkpoints, find_log, read_log, track

    found = find_checkpoints(arguments.folder)
    file = arguments.log or find_log(arguments.folder)
    columns = read_log(file) if file is not None else {}
    if arguments.column:
        unknown = [name for name in arguments.column if name not in columns]
        if unknown:
            raise UsageError(f"--column: expected some of {list(columns)}, found {unknown[0]!r}")
        columns = {name: columns[name] for name in arguments.column}
    model, batches = _model_and_inputs(arguments)
    with _arguments_at_fault():
        tracking = track(
            model,
            found,
            list(batches),
            columns=columns,
            modules=arguments.modules,
            blocks=arguments.blocks,
            dora=arguments.dora,
        )
    usable = [name for name, column in columns.items() if len(set(column) & set(tracking.steps)) > 2]
    document = {**tracking.document(), "correlations": {name: tracking.correlations(name) for name in usable}}

    def pictures(folder: Path) -> Iterator[Path]:
        from nsc_merge.analysis.plots import draw_tracking

        yield draw_tracking(tracking, usable[0] if usable else None, folder / "tracking.png")

    mean = tracking.mean()
    lines = [
        f"{len(tracking.steps)} checkpoints, steps {tracking.steps[0]} to {tracking.steps[-1]}, "
        f"{len(tracking.omega)} modules",
        f"mean ratio  {mean[0]:.4f} -> {mean[-1]:.4f}  (a random A: {tracking.random:.4f})",
        *_aligned("block", tracking.by_block()),
        *_aligned("module", tracking.by_name()),
    ]
    for name, found_rho in document["correlations"].items():
        lines += [
            f"rho with {name} over {found_rho['steps']} steps  all {found_rho['all']:+.2f}  "
            f"changes {found_rho['changes']:+.2f}",
            *(
                f"  by {group[:-1]}  "
                + "  ".join(f"{key} {rho:+.2f}" for key, rho in found_rho[group].items())
                for group in ("blocks", "names")
            ),
        ]
    return _finish(arguments, "tracking", document, lines, pictures)


def _quartiles(arguments: argparse.Namespace) -> int:
    from nsc_merge.evaluation.eval_recipe_reader import load_eval_recipe

    recipe = load_eval_recipe(arguments.recipe, arguments.overrides)
    for task in arguments.tasks or ():
        if task not in recipe.tasks:
            raise UsageError(f"--tasks: expected some of {list(recipe.tasks)}, found {task!r}")
    rows = [row for row in recipe.rows if row.name == arguments.row]
    if not rows:
        raise UsageError(
            f"--row: expected one of {[row.name for row in recipe.rows]}, found {arguments.row!r}"
        )
    if rows[0].tune is not None:
        raise UsageError(
            f"--row: {arguments.row!r} is tuned; give the scale that was found as options.scale instead"
        )
    if rows[0].method == "ensemble":
        raise UsageError("--row: an ensemble is no single model, so that its modules see no single input")
    seeds = recipe.seeds or (0,)
    seed = seeds[0] if arguments.seed is None else arguments.seed
    prepare(local=recipe.local)
    from nsc_merge.analysis.quartiles import sample_study
    from nsc_merge.evaluation.run import candidate_of
    from nsc_merge.evaluation.suite import RecipeSuite
    from nsc_merge.recipes.saved_result import load_result
    from nsc_merge.results.layout import COEFFICIENTS_FILE
    from nsc_merge.results.result import MergeResult

    here = recipe.at(seed)
    log(f"loading {here.model}" + ("" if recipe.local else " from the hub"))
    suite = RecipeSuite(here, shuffle=seed if recipe.seeds else None)
    row = next(row for row in here.rows if row.name == arguments.row)
    if row.folder is not None and (row.folder / COEFFICIENTS_FILE).is_file():
        # What else lies there no longer says which adapters it was made of.
        merged: Candidate = load_result(row.folder)
    else:
        merged = candidate_of(suite, here, row, seed)
    if not isinstance(merged, MergeResult) or set(merged.adapters) != set(suite.tasks):
        raise UsageError(
            f"--row: {row.folder} does not say what was merged; expected a method, or saved coefficients"
        )
    with _arguments_at_fault():
        studies = sample_study(
            suite,
            merged,
            arguments.tasks,
            modules=arguments.modules,
            blocks=arguments.blocks,
            bins=arguments.bins,
        )
    document = {"row": row.name, "seed": seed, "bins": arguments.bins, "tasks": studies}

    def pictures(folder: Path) -> Iterator[Path]:
        from nsc_merge.analysis.plots import draw_quartiles

        labels = {
            name: f"-{task.metric}" if task.lower_is_better else task.metric
            for name, task in suite.tasks.items()
        }
        yield draw_quartiles(studies, labels, f"in the model of {row.name}", folder / "quartiles.png")

    width = max(len("task"), *(len(task) for task in studies))
    lines = [
        f"{'task':<{width}}  {'rho':>6}  {'others':>6}  quality by share, lowest ratio first",
        *(
            f"{task:<{width}}  {study['rho']:>+6.2f}  {_signed(study['rho_others']):>6}  "
            + "  ".join(f"{mean:.4g}" for mean in study["mean"])
            for task, study in studies.items()
        ),
    ]
    known = [study["rho"] for study in studies.values() if not math.isnan(study["rho"])]
    if known:
        lines.append(f"{'mean':<{width}}  {sum(known) / len(known):>+6.2f}")
    return _finish(arguments, "quartiles", document, lines, pictures)


def _bound(arguments: argparse.Namespace) -> int:
    model, batches = _model_and_inputs(arguments)
    from nsc_merge.adapters import load_adapter
    from nsc_merge.analysis.bound import check_bound, summary
    from nsc_merge.api import merge

    name = arguments.adapter.name
    adapters = {name: load_adapter(arguments.adapter, name, dora=arguments.dora)}
    whole = merge(model, adapters, method="task_arithmetic", scale=1.0)
    with _arguments_at_fault():
        checks = check_bound(
            model,
            whole if arguments.at == "adapter" else adapters,
            batches,
            modules=arguments.modules,
            blocks=arguments.blocks,
        )
    whole_summary = summary(checks)
    document = {"at": arguments.at, "summary": whole_summary, "modules": checks}

    def pictures(folder: Path) -> Iterator[Path]:
        from nsc_merge.analysis.plots import draw_bound

        yield draw_bound(checks, folder / "bound.png")

    verdict = "held at all" if whole_summary["held"] else f"was VIOLATED at {whole_summary['violations']} of"
    lines = [
        "checked  ||s B A z|| >= s sigma_min(B) sigma_min(A) sqrt(1 - w^2) ||z||, in float64",
        f"result   {verdict} {whole_summary['inputs']:,} inputs of {whole_summary['modules']} modules",
    ]
    if whole_summary["trivial"]:
        lines.append(
            f"trivial  the bound is 0 in {whole_summary['trivial']} modules, whose B has no full rank"
        )
    if whole_summary["tightness"] is not None:
        lines.append(
            f"loose    the effect is {whole_summary['tightness']:.3g} times the bound (median over modules)"
        )
    if whole_summary["rho"] is not None:
        lines.append(
            f"rho      {whole_summary['rho']:+.2f} between the ratio and ||s B A z|| / ||z|| (median over modules; "
            "negative: a lower ratio, a larger effect)"
        )
    return _finish(arguments, "bound", document, lines, pictures) or int(not whole_summary["held"])


def _model_and_inputs(arguments: argparse.Namespace) -> tuple[nn.Module, Batches]:
    local = not is_hub_id(arguments.model, Path.cwd())
    prepare(local=local)
    from nsc_merge.calibration.batch_files import Batches, check_names, read_batches
    from nsc_merge.models.loading import load_model

    read = read_batches(arguments.inputs, arguments.batch_size, "--inputs")
    log(f"loading {arguments.model}" + ("" if local else " from the hub"))
    model = load_model(arguments.model, local=local)
    # The files of nsc-merge eval hold labels beside the inputs.
    inputs: list[Mapping[str, Tensor]] = [
        {name: value for name, value in batch.items() if name != "labels"} for batch in read
    ]
    batches = Batches(inputs).to(next(model.parameters()).dtype)
    check_names(batches, model, "--inputs")
    return model, batches


def _finish(
    arguments: argparse.Namespace, name: str, document: Mapping[str, Any], lines: list[str], pictures: Any
) -> int:
    from nsc_merge.utils.atomic_file import write_text
    from nsc_merge.utils.plain_values import without_nan

    text = json.dumps(without_nan(document), indent=None if arguments.out is None else 1, allow_nan=False)
    if arguments.out is not None:
        write_text(arguments.out / f"{name}.json", text + "\n")
        written = [arguments.out / f"{name}.json", *pictures(arguments.out)]
        lines = [*lines, f"written: {', '.join(map(str, written))}"]
    print(text if arguments.json else "\n".join(lines))
    return 0


def _aligned(label: str, groups: Mapping[str, list[float]]) -> list[str]:
    width = max(map(len, groups))
    return [
        f"  {label} {name:<{width}}  {values[0]:.4f} -> {values[-1]:.4f}" for name, values in groups.items()
    ]


def _signed(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:+.2f}"


def _blocks(text: str) -> str | int | list[int]:
    if text == "last_quarter":
        return text
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected last_quarter, a number, or numbers with commas, found {text!r}"
        ) from None
    return numbers if "," in text else numbers[0]
