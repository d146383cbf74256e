"""Whether samples that an adapter sees more of are predicted better (Fig. 2 of arXiv 2603.26317)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nsc_merge.analysis.null_space_ratios import Ratios, per_sample_ratios
from nsc_merge.analysis.rank_correlation import rank_correlation
from nsc_merge.evaluation.scoring import predict
from nsc_merge.evaluation.suite import Suite
from nsc_merge.results.result import MergeResult


def by_quantile(ratios: Tensor, quality: Tensor, bins: int = 4) -> dict[str, Any]:
    """Quality within equal shares of the samples, from the lowest ratios to the highest.

    Args:
        ratios: ``[N]``.
        quality: ``[N]``, higher is better.
        bins: how many shares.

    Returns:
        ``rho`` (Spearman over the samples; negative where a lower ratio goes with better predictions), and for
        every share ``mean``, ``error`` (standard error of the mean), ``count``, and ``ratio`` (mean).

    Raises:
        ValueError: for other shapes, or fewer samples than twice the shares.
    """
    if ratios.dim() != 1 or quality.shape != ratios.shape:
        raise ValueError(
            f"quality: expected [N] as the ratios, found {list(quality.shape)} and {list(ratios.shape)}"
        )
    if bins < 1 or len(ratios) < 2 * bins:
        raise ValueError(f"bins: expected at least two samples in each, found {len(ratios)} for {bins}")
    order = ratios.argsort(stable=True)
    # As even as can be: the first shares take what is left over.
    parts = torch.tensor_split(order, bins)
    return {
        "rho": rank_correlation(ratios.tolist(), quality.tolist()),
        "mean": [quality[part].double().mean().item() for part in parts],
        "error": [quality[part].double().std().item() / math.sqrt(len(part)) for part in parts],
        "count": [len(part) for part in parts],
        "ratio": [ratios[part].double().mean().item() for part in parts],
    }


def sample_study(
    suite: Suite,
    result: MergeResult,
    tasks: Sequence[str] | None = None,
    *,
    split: str = "test",
    modules: Sequence[str] | None = None,
    blocks: str | int | Sequence[int] | None = None,
    bins: int = 4,
) -> dict[str, dict[str, Any]]:
    """Every task's own null-space ratio per sample against the quality of its prediction, in the merged model.

    Args:
        suite: with the data.
        result: of :func:`nsc_merge.merge` on ``suite.model``; of ``method="finetuned"`` each task is studied in its
            own model.
        tasks: all when None.
        split: of the data.
        modules, blocks: whose ratios are averaged; as in :func:`nsc_merge.analysis.per_sample_ratios`.
        bins: shares of the samples.

    Returns:
        Task -> what :func:`by_quantile` returns, ``samples``, and ``rho_others``: the mean rho of the other tasks'
        adapters on the same samples. Where it is like ``rho``, the ratio says how hard a sample is, and nothing
        about the task's own adapter. None where there is no other adapter.
    """
    found = {}
    for task in tasks if tasks is not None else list(suite.tasks):
        ratios, quality = measured_samples(suite, result, task, split=split, modules=modules, blocks=blocks)
        found[task] = related(ratios, quality, task, bins=bins)
    return found


def measured_samples(
    suite: Suite,
    result: MergeResult,
    task: str,
    *,
    split: str = "test",
    modules: Sequence[str] | None = None,
    blocks: str | int | Sequence[int] | None = None,
) -> tuple[Ratios, Tensor]:
    """The null-space ratios of a task's samples, and the quality of their predictions, ``[N]``."""
    own = result.for_task(task)
    # First, as what fails there is told with the task.
    outputs, labels = predict(suite, own, split, [task])[task]
    held = suite.labelled(task, split)
    for inputs, label in held:
        if (rows := {len(value) for value in inputs.values()}) and min(rows) > len(label):
            raise ValueError(
                f"tasks.{task}: its samples are several texts each, found {min(rows)} of {len(label)} samples in a "
                "batch; expected a task with one text a sample"
            )
    batches: list[Mapping[str, Tensor]] = [inputs for inputs, _ in held]
    ratios = per_sample_ratios(suite.model, own, batches, modules=modules, blocks=blocks)
    return ratios, suite.quality(task, outputs, labels).double()


def related(
    ratios: Ratios, quality: Tensor, task: str, *, modules: Sequence[str] | None = None, bins: int = 4
) -> dict[str, Any]:
    """What :func:`sample_study` returns of a task, of what :func:`measured_samples` found; ``modules``: of these."""
    known = ~quality.isnan()
    rows = {name: ratios.of(name, modules)[known] for name in ratios.tasks}
    others = [
        rank_correlation(values.tolist(), quality[known].tolist()) for name, values in rows.items() if name != task
    ]
    return {
        **by_quantile(rows[task], quality[known], bins),
        "samples": int(known.sum()),
        "rho_others": sum(others) / len(others) if others else None,
    }
