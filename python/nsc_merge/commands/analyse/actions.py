"""What the ``analyse`` commands do; imported when one of them runs."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from nsc_merge.adapters import load_adapter
from nsc_merge.analysis.bound import check_bound, summary
from nsc_merge.analysis.plots import draw_bound, draw_quartiles, draw_tracking
from nsc_merge.analysis.quartiles import sample_study
from nsc_merge.analysis.tracking import find_checkpoints, find_log, read_log, track
from nsc_merge.api import merge
from nsc_merge.calibration.batch_files import Batches, inputs_for, read_batches
from nsc_merge.commands.terminal import log, prepare, say
from nsc_merge.evaluation.candidates import candidate_of
from nsc_merge.evaluation.eval_recipe_reader import load_eval_recipe
from nsc_merge.evaluation.rows.saved_base import check_base
from nsc_merge.evaluation.scoring import Candidate
from nsc_merge.evaluation.suite import RecipeSuite
from nsc_merge.methods import METHODS
from nsc_merge.models.bases.loading import load_model
from nsc_merge.recipes.saved_result import load_result
from nsc_merge.results.layout import COEFFICIENTS_FILE
from nsc_merge.results.result import MergeResult
from nsc_merge.utils.atomic_file import write_text
from nsc_merge.utils.errors import UsageError
from nsc_merge.utils.json_text import finite_or_none
from nsc_merge.utils.option_checks import is_hub_id


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


def tracking(arguments: argparse.Namespace) -> int:
    """``nsc-merge analyse tracking``."""
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
        found_ratios = track(
            model,
            found,
            list(batches),
            columns=columns,
            modules=arguments.modules,
            blocks=arguments.blocks,
            dora=arguments.dora,
        )
    usable = [name for name in columns if len(found_ratios.shared(name)) > 2]
    document = {**found_ratios.document(), "correlations": {name: found_ratios.correlations(name) for name in usable}}

    def pictures(folder: Path) -> Iterator[Path]:
        yield draw_tracking(found_ratios, usable[0] if usable else None, folder / "tracking.png")

    mean = found_ratios.mean()
    lines = [
        f"{len(found_ratios.steps)} checkpoints, steps {found_ratios.steps[0]} to {found_ratios.steps[-1]}, "
        f"{len(found_ratios.omega)} modules",
        f"mean ratio  {mean[0]:.4f} -> {mean[-1]:.4f}  (a random A: {found_ratios.random:.4f})",
        *_aligned("block", found_ratios.by_block()),
        *_aligned("module", found_ratios.by_name()),
    ]
    for name, found_rho in document["correlations"].items():
        lines += [
            f"rho with {name} over {found_rho['steps']} steps  all {_signed(found_rho['all'])}  "
            f"changes {_signed(found_rho['changes'])}",
            *(
                f"  by {group[:-1]}  "
                + "  ".join(f"{key} {_signed(rho)}" for key, rho in found_rho[group].items())
                for group in ("blocks", "names")
            ),
        ]
    return _finish(arguments, "tracking", document, lines, pictures)


def quartiles(arguments: argparse.Namespace) -> int:
    """``nsc-merge analyse quartiles``."""
    recipe = load_eval_recipe(arguments.recipe, arguments.overrides)
    if not recipe.labelled:
        raise UsageError("tasks: expected some with test data, found those of the lm-evaluation-harness alone")
    for task in arguments.tasks or ():
        if task not in recipe.labelled:
            raise UsageError(f"--tasks: expected some of {list(recipe.labelled)}, found {task!r}")
    rows = [row for row in recipe.rows if row.name == arguments.row]
    if not rows:
        raise UsageError(
            f"--row: expected one of {[row.name for row in recipe.rows]}, found {arguments.row!r}"
        )
    if rows[0].tune is not None:
        raise UsageError(
            f"--row: {arguments.row!r} is tuned; give the scale that was found as options.scale instead"
        )
    if rows[0].method in METHODS and METHODS[rows[0].method].averages_outputs:
        raise UsageError("--row: an ensemble is no single model, so that its modules see no single input")
    seeds = recipe.seeds or (0,)
    seed = seeds[0] if arguments.seed is None else arguments.seed
    prepare(local=recipe.local)

    here = recipe.at(seed)
    log(f"loading {here.model}" + ("" if recipe.local else " from the hub"))
    suite = RecipeSuite(here, shuffle=seed if recipe.seeds else None)
    row = next(row for row in here.rows if row.name == arguments.row)
    if row.folder is not None and (row.folder / COEFFICIENTS_FILE).is_file():
        # What else lies there no longer says which adapters it was made of.
        check_base(row.folder, here.model)
        merged: Candidate = load_result(row.folder, numbers=False)
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
        labels = {name: suite.metric(name).quality_label for name in suite.tasks}
        yield draw_quartiles(studies, labels, f"in the model of {row.name}", folder / "quartiles.png")

    width = max(len("task"), *(len(task) for task in studies))
    lines = [
        f"{'task':<{width}}  {'rho':>6}  {'others':>6}  quality by share, lowest ratio first",
        *(
            f"{task:<{width}}  {_signed(study['rho']):>6}  {_signed(study['rho_others']):>6}  "
            + "  ".join(f"{mean:.4g}" for mean in study["mean"])
            for task, study in studies.items()
        ),
    ]
    known = [study["rho"] for study in studies.values() if not math.isnan(study["rho"])]
    if known:
        lines.append(f"{'mean':<{width}}  {sum(known) / len(known):>+6.2f}")
    return _finish(arguments, "quartiles", document, lines, pictures)


def bound(arguments: argparse.Namespace) -> int:
    """``nsc-merge analyse bound``."""
    model, batches = _model_and_inputs(arguments)

    name = Path(arguments.adapter).name
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
    local = not is_hub_id(arguments.model)
    adapter = getattr(arguments, "adapter", "").partition("@")[0]
    prepare(local=local and not is_hub_id(adapter))

    read = read_batches(arguments.inputs, arguments.batch_size, "--inputs")
    log(f"loading {arguments.model}" + ("" if local else " from the hub"))
    model = load_model(arguments.model, local=local)
    return model, inputs_for(model, read, "--inputs")


def _finish(
    arguments: argparse.Namespace, name: str, document: Mapping[str, Any], lines: list[str], pictures: Any
) -> int:

    text = json.dumps(finite_or_none(document), indent=None if arguments.out is None else 1, allow_nan=False)
    if arguments.out is not None:
        write_text(arguments.out / f"{name}.json", text + "\n")
        written = [arguments.out / f"{name}.json", *pictures(arguments.out)]
        lines = [*lines, f"written: {', '.join(map(str, written))}"]
    say(text if arguments.json else "\n".join(lines))
    return 0


def _aligned(label: str, groups: Mapping[str, list[float]]) -> list[str]:
    width = max(map(len, groups))
    return [
        f"  {label} {name:<{width}}  {values[0]:.4f} -> {values[-1]:.4f}" for name, values in groups.items()
    ]


def _signed(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:+.2f}"
