"""The figures of a merge on its card, as Markdown: coefficients, ratios, norms, errors of truncation, data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from nsc_merge.adapters import Adapter
from nsc_merge.results.beside.norms import Kept, norm_kept
from nsc_merge.results.layout import RECORD, TRUNCATION_FILE
from nsc_merge.results.merged_update import MergedUpdate
from nsc_merge.utils.errors import printable

# Modules of the largest errors that a card lists.
_WORST = 5


def cell(name: str) -> str:
    """What adapters and recipes call something, which may hold anything, in a line or a cell: shown as it is, be it
    HTML, a picture or code in Markdown.
    """
    return re.sub(r"([\\`<|\[])", r"\\\1", " ".join(printable(name).split()))


def tasks_table(result: MergedUpdate) -> list[str]:
    """One row per task: its adapter, its coefficients, and what became of it."""
    kept = None if result.per_task else norm_kept(result)
    names = ["task", "modules", "ranks"]
    rows = [[cell(task), str(len(adapter.factors)), _ranks(adapter)] for task, adapter in result.adapters.items()]
    if result.coefficients:
        names += ["coefficients", "mean"]
        for row, (task, adapter) in zip(rows, result.adapters.items(), strict=True):
            values = [
                result.coefficients[path][task] if factor.fixed is None else factor.fixed
                for path, factor in adapter.factors.items()
            ]
            row += [f"{min(values):.3f} to {max(values):.3f}", f"{sum(values) / len(values):.3f}"]
    both = result.objective.get("tasks", {})
    if set(both) == set(result.tasks):
        names += ["ratio before" if _is_ratio(result) else "loss before", "after"]
        for row, task in zip(rows, result.tasks, strict=True):
            row += [f"{both[task][when]:#.4g}" for when in ("before", "after")]
    if kept is not None:
        names += ["norm", "kept along it"]
        for row, task in zip(rows, result.tasks, strict=True):
            row += [f"{kept.own[task]:#.4g}", f"{kept.along[task]:.1%}"]
    lines = [f"| {' | '.join(line)} |" for line in (names, *rows)]
    return [lines[0], "|---" * len(names) + "|", *lines[1:], *_norms(kept)]


def _ranks(adapter: Adapter) -> str:
    return ", ".join(map(str, sorted({factor.rank for factor in adapter.factors.values() if factor.rank})))


def _is_ratio(result: MergedUpdate) -> bool:
    return bool(result.history) and "omega" in result.history[0]


def _norms(kept: Kept | None) -> list[str]:
    if kept is None:
        return []
    against = ", ".join(
        f"{kept.merged / norm:.1%} of {cell(task)}'s" for task, norm in kept.own.items() if norm > 0
    )
    return [
        "",
        f"Norm kept (Frobenius, over all merged linears): the merged update has norm {kept.merged:#.4g}, "
        f"{kept.total:.1%} of that of all adapters' updates together{f' ({against})' if against else ''}. *Kept along "
        "it* is the share of an adapter's own update that the merge holds: 100% if it is in it as it was trained and "
        "no other touches it.",
    ]


def data_table(result: MergedUpdate) -> list[str]:
    """What the coefficients were found on, where the recipe says it: names of files, no paths."""
    told: Mapping[str, Any] = result.inputs.get("calibration") or {}
    record: Mapping[str, Any] = result.inputs.get(RECORD) or {}
    digests: Mapping[str, Any] = (record.get("sha256") or {}).get("calibration") or {}
    if not told:
        return []
    counts: Mapping[str, Any] = record.get("samples") or {}
    lines = ["", "| task | calibration data | samples | SHA-256 |", "|---|---|---|---|"]
    for task, source in told.items():
        name = source.get("source", "") if isinstance(source, Mapping) else source
        found = digests.get(task) or {}
        digest = found.get("samples") or (next(iter(found.values())) if len(found) == 1 else None)
        shown = f"`{digest[:16]}`" if isinstance(digest, str) else "in `recipe.yaml`" if found else ""
        count = counts[task] if isinstance(counts.get(task), int) else ""
        lines.append(f"| {cell(task)} | {cell(shortened(str(name)))} | {count} | {shown} |")
    return lines


def shortened(name: str) -> str:
    """The last part of a path; anything else, such as a hub id, as it is."""
    return PurePath(name).name if PurePath(name).is_absolute() else name


def truncation_table(rank: int | None, errors: Mapping[str, float]) -> list[str]:
    """The modules that a truncated adapter renders worst."""
    if not errors:
        return []
    worst = sorted(errors, key=lambda path: -errors[path])[:_WORST]
    return [
        "",
        f"Truncated to rank {rank}: relative error of the update {sum(errors.values()) / len(errors):.3g} "
        f"on average, {errors[worst[0]]:.3g} at most (`{worst[0]}`); all in `{TRUNCATION_FILE}`.",
        "",
        "| module | relative error |",
        "|---|---|",
        *(f"| `{path}` | {errors[path]:.3g} |" for path in worst),
    ]
