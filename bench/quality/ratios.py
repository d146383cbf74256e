"""Measures null-space ratios: along the training of adapters, and per sample against how good its prediction is.

    python -m bench.quality.ratios --suite vit --seeds 0 1 2

Writes OUT/<suite>-training.jsonl, one line per seed, task and kind of labels (true or permuted), and
OUT/<suite>-samples.jsonl, one line per seed, task and model. Seeds measured again replace their own lines and no
others. Two sets of modules are averaged over: "all" adapted ones, and the "target" of NSC's default.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import nsc_merge
from nsc_merge.adapters import load_adapter
from nsc_merge.analysis.adapter_overlap import describe
from nsc_merge.analysis.quartiles import measured_samples, related
from nsc_merge.analysis.rank_correlation import rank_correlation
from nsc_merge.analysis.tracking import track
from nsc_merge.models.families import family_of, scored_paths
from nsc_merge.utils.progress import Progress

from .records import RESULTS, SUITES, WORK, suite_module, versions
from .suite import Suite
from .suites.kept_adapters import kept_adapters

START = 0.4


def sets_of_modules(model: nn.Module, paths: Sequence[str]) -> dict[str, list[str]]:
    """Name -> paths of the adapted modules that are averaged over."""
    return {
        "all": list(paths),
        "target": scored_paths(family_of(model), model, paths, None, "last_quarter"),
    }


def training_record(suite: Suite, work: Path, task: str, kind: str) -> dict[str, Any]:
    """Ratio of an adapter in its own model, on validation inputs, at every step that was kept; and the Frobenius norm
    of its final update, over all modules.
    """
    inputs = [batch for batch, _ in suite.labelled(task, "val")]
    kept = kept_adapters(work, suite.name, suite.seed, task, kind)
    tracking = track(suite.model, [(int(entry["step"]), folder) for entry, folder in kept], inputs, progress=False)
    curves = {
        name: [statistics.mean(values) for values in zip(*(tracking.omega[path] for path in paths), strict=True)]
        for name, paths in sets_of_modules(suite.model, list(tracking.omega)).items()
    }
    losses = [entry["loss"] for entry, _ in kept]
    return {
        "suite": suite.name,
        "seed": suite.seed,
        "task": task,
        "labels": "permuted" if kind == "permuted" else "true",
        "random": tracking.random,
        "norm": describe(load_adapter(kept[-1][1], task))["norm"],
        "sha256": hashlib.sha256((kept[-1][1] / "adapter_model.safetensors").read_bytes()).hexdigest(),
        "rho": {name: _or_none(rank_correlation(losses, curve)) for name, curve in curves.items()},
        "steps": [
            {**entry, **{name: curve[number] for name, curve in curves.items()}}
            for number, (entry, _) in enumerate(kept)
        ],
        "versions": versions(),
    }


def sample_records(suite: Suite) -> list[dict[str, Any]]:
    """Ratio against quality over test samples, with each adapter alone and with all merged at :data:`START`."""
    records = []
    rows: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("finetuned", "finetuned", {}),
        (f"TA@{START:g}", "task_arithmetic", {"scale": START}),
    )
    for name, method, options in rows:
        result = nsc_merge.merge(suite.model, suite.adapters, method=method, **options)
        # A shared module that is trained in full has no A, and so no ratio.
        low_rank = [
            path
            for path in result.paths
            if any(path in one.factors and one.factors[path].rank for one in result.adapters.values())
        ]
        sets = sets_of_modules(suite.model, low_rank)
        for task in suite.tasks:
            ratios, quality = measured_samples(suite, result, task, modules=low_rank)
            studies = {chosen: related(ratios, quality, task, modules=paths) for chosen, paths in sets.items()}
            records.append(
                {
                    "suite": suite.name,
                    "seed": suite.seed,
                    "task": task,
                    "model": name,
                    "samples": studies["all"]["samples"],
                    "rho": {chosen: _or_none(study["rho"]) for chosen, study in studies.items()},
                    "quality_by_quartile": {chosen: study["mean"] for chosen, study in studies.items()},
                    "versions": versions(),
                }
            )
    return records


def _or_none(value: float) -> float | None:
    """What is not defined, as JSON can hold it."""
    return None if math.isnan(value) else value


def parser() -> argparse.ArgumentParser:
    parsed = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parsed.add_argument("--suite", choices=SUITES, default="vit")
    parsed.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parsed.add_argument("--work", type=Path, default=WORK, help="trained parts (default: %(default)s)")
    parsed.add_argument("--out", type=Path, default=RESULTS)
    parsed.add_argument("--progress", action=argparse.BooleanOptionalAction, help="bars; by default on a terminal")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    torch.set_num_threads(1)
    module = suite_module(given.suite)
    training: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    for seed in given.seeds:
        suite: Suite = module.load(given.work, seed, log=lambda line: print(line, file=sys.stderr))
        samples += sample_records(suite)
        runs = [
            (task, kind)
            for kind in ("adapters", "permuted")
            for task in suite.tasks
            if kept_adapters(given.work, suite.name, seed, task, kind)
        ]
        with Progress(f"{suite.name} seed {seed}: ratios along training", len(runs), given.progress) as bar:
            for task, kind in runs:
                training.append(training_record(suite, given.work, task, kind))
                bar.update(task=f"{task} {kind}")
    given.out.mkdir(parents=True, exist_ok=True)
    for name, records in (("training", training), ("samples", samples)):
        if records:
            replace_seeds(given.out / f"{given.suite}-{name}.jsonl", records, given.seeds)
    return 0


def replace_seeds(path: Path, records: Sequence[dict[str, Any]], seeds: Collection[int]) -> None:
    """Put ``records`` in the place of what a file holds about ``seeds``; other seeds' lines stay."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    kept = [record for record in map(json.loads, lines) if record["seed"] not in seeds]
    together = sorted([*kept, *records], key=lambda record: record["seed"])
    unfinished = path.with_suffix(".part")
    unfinished.write_text("".join(json.dumps(record) + "\n" for record in together), encoding="utf-8")
    os.replace(unfinished, path)


if __name__ == "__main__":
    sys.exit(main())
