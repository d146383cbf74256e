"""Measures null-space ratios: along the training of adapters, and per sample against how good its prediction is.

    python bench/quality/ratios.py --suite vit --seeds 0 1 2

Writes OUT/<suite>-training.jsonl, one line per seed, task and kind of labels (true or permuted), for suites that keep
adapters along the way, and OUT/<suite>-samples.jsonl, one line per seed, task and model. Two sets of modules are
averaged over: "all" adapted ones, and the "target" of NSC's default.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from run import HERE, SUITES, versions
from scipy.stats import spearmanr
from suite import Inputs, Suite, predict
from torch import Tensor, nn

from nsc_kernels import null_space_ratio
from nsc_merge.adapters import Adapter, load_adapter
from nsc_merge.attachment import adapted_linears, attach
from nsc_merge.families import family_of, scored_paths
from nsc_merge.progress import Progress
from nsc_merge.remap import fit

SETS = ("all", "target")
START = 0.4


@torch.no_grad()
def sample_ratios(
    model: nn.Module, adapters: Mapping[str, Adapter], scale: float, batches: Sequence[Inputs]
) -> dict[str, Tensor]:
    """Mean null-space ratio per sample of every adapter in ``model`` with all of them merged at ``scale``.

    Returns:
        Name of a set of modules -> ``[N, K]``; positions that the attention mask leaves out do not count.
    """
    family = family_of(model)
    target = set(scored_paths(family, model, list(adapted_linears(model, adapters)), None, "last_quarter"))
    parts: dict[str, list[Tensor]] = {name: [] for name in SETS}
    found: dict[str, Tensor] = {}
    mask: Tensor | None = None

    def record(path: str, quad: Tensor, sqnorm: Tensor) -> None:
        ratio = null_space_ratio(quad, sqnorm)
        weight = torch.ones_like(sqnorm) if mask is None or mask.shape != sqnorm.shape else mask.to(sqnorm)
        positions = tuple(range(1, sqnorm.dim()))
        found[path] = (ratio * weight[..., None]).sum(positions) / weight.sum(positions)[:, None]

    with attach(model, adapters, scale) as merged:
        for module in merged.values():
            module.measure = record if module.bank.R else None
        for batch in batches:
            found.clear()
            mask = batch.get(family.mask) if family.mask else None
            model(**batch)
            parts["all"].append(torch.stack(list(found.values())).mean(0))
            parts["target"].append(torch.stack([found[path] for path in target]).mean(0))
    return {name: torch.cat(values) for name, values in parts.items()}


def training_record(suite: Suite, module: Any, work: Path, task: str, kind: str) -> dict[str, Any]:
    """Ratio of an adapter in its own model, on validation inputs, at every step that was kept."""
    inputs = [batch for batch, _ in suite.labelled(task, "val")]
    entries: list[dict[str, float]] = []
    for entry, folder in module.kept_adapters(work, suite.seed, task, kind):
        adapter = fit({task: load_adapter(folder, task)}, suite.model)
        ratios = sample_ratios(suite.model, adapter, 1.0, inputs)
        entries.append({**entry, **{name: ratios[name].mean().item() for name in SETS}})
    factors = adapter[task].factors.values()
    return {
        "suite": suite.name,
        "seed": suite.seed,
        "task": task,
        "labels": "permuted" if kind == "permuted" else "true",
        "random": sum(math.sqrt(1 - factor.rank / factor.A.shape[1]) for factor in factors) / len(factors),
        "rho": {
            name: rank_correlation([e["loss"] for e in entries], [e[name] for e in entries]) for name in SETS
        },
        "steps": entries,
        "versions": versions(),
    }


def sample_records(suite: Suite) -> list[dict[str, Any]]:
    """Ratio against quality over test samples, with each adapter alone and with all merged at :data:`START`."""
    adapters = fit({task: load_adapter(folder, task) for task, folder in suite.adapters.items()}, suite.model)
    records = []
    for number, task in enumerate(suite.tasks):
        inputs = [batch for batch, _ in suite.labelled(task, "test")]
        for name, merged, scale in (
            ("finetuned", {task: adapters[task]}, 1.0),
            (f"TA@{START:g}", adapters, START),
        ):
            ratios = sample_ratios(suite.model, merged, scale, inputs)
            with attach(suite.model, merged, scale):
                quality = suite.quality(task, *predict(suite, suite.model, "test")[task])
            own = {key: value[:, number if len(merged) > 1 else 0] for key, value in ratios.items()}
            records.append(
                {
                    "suite": suite.name,
                    "seed": suite.seed,
                    "task": task,
                    "model": name,
                    "samples": len(quality),
                    "rho": {
                        key: rank_correlation(value.tolist(), quality.tolist()) for key, value in own.items()
                    },
                    "quality_by_quartile": {
                        key: [part.mean().item() for part in quality[value.argsort()].chunk(4)]
                        for key, value in own.items()
                    },
                    "versions": versions(),
                }
            )
    return records


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rho; None where one side does not vary."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(spearmanr(first, second).statistic)


def parser() -> argparse.ArgumentParser:
    parsed = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parsed.add_argument("--suite", choices=SUITES, default="vit")
    parsed.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parsed.add_argument(
        "--work", type=Path, default=HERE / "work", help="trained parts (default: %(default)s)"
    )
    parsed.add_argument("--out", type=Path, default=HERE.parent / "results" / "quality")
    parsed.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, help="bars; by default on a terminal"
    )
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    torch.set_num_threads(1)
    module = importlib.import_module(given.suite)
    training: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    for seed in given.seeds:
        suite: Suite = module.load(given.work, seed, log=lambda line: print(line, file=sys.stderr))
        samples += sample_records(suite)
        if not hasattr(module, "kept_adapters"):
            continue
        runs = [
            (task, kind)
            for kind in ("adapters", "permuted")
            for task in suite.tasks
            if module.kept_adapters(given.work, seed, task, kind)
        ]
        with Progress(f"{suite.name} seed {seed}: ratios along training", len(runs), given.progress) as bar:
            for task, kind in runs:
                training.append(training_record(suite, module, given.work, task, kind))
                bar.update(task=f"{task} {kind}")
    given.out.mkdir(parents=True, exist_ok=True)
    for name, records in (("training", training), ("samples", samples)):
        if records:
            text = "".join(json.dumps(record) + "\n" for record in records)
            (given.out / f"{given.suite}-{name}.jsonl").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
