"""``nsc-merge inspect``: what adapters hold, how much they overlap, and how well they fit given inputs."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nsc_kernels import AdapterBank, null_space_ratio
from nsc_merge.adapters import Adapter, Factor
from nsc_merge.adapters.adapter import name_of
from nsc_merge.calibration.batches import naming_inputs
from nsc_merge.models.attachment import attach
from nsc_merge.models.bases.stored_weights import input_device
from nsc_merge.models.real_tokens import RealTokens


def describe(adapter: Adapter) -> dict[str, Any]:
    """Ranks, scalings, modules and modules trained in full of one adapter."""
    low_rank = {path: factor for path, factor in adapter.factors.items() if factor.rank}
    kinds: dict[str, int] = {}
    for path in low_rank:
        kinds[name_of(path)] = kinds.get(name_of(path), 0) + 1
    return {
        "base_model": adapter.base_model,
        "modules": kinds,
        "ranks": sorted({factor.rank for factor in low_rank.values()}),
        "scaling": sorted({round(factor.scaling, 6) for factor in low_rank.values()}),
        "bias": any(factor.bias is not None for factor in low_rank.values()),
        "dora": any(factor.magnitude is not None for factor in low_rank.values()),
        "trained": sorted(adapter.trained),
        "shared": sorted(path for path, factor in adapter.factors.items() if factor.dense is not None),
        "parameters": sum(factor.A.numel() + factor.B.numel() for factor in low_rank.values()),
        "norm": math.sqrt(sum(_inner(factor, factor) for factor in low_rank.values())),
        "notes": list(adapter.notes),
    }


def overlaps(adapters: Mapping[str, Adapter]) -> list[dict[str, Any]]:
    """For every two adapters, over the modules that both touch:

    * ``modules``: how many there are, and ``union``: how many either touches;
    * ``inputs``: mean share of the smaller row space of A that lies in the other's, 0 to 1. 1 means that
      both read the same directions (also if A is shared, as in LoRA-FA, where the null-space ratio cannot
      tell the adapters apart). None where no A that both touch has a row space;
    * ``cosine``: of the two updates, all modules together.
    """
    found = []
    for one, two in itertools.combinations(adapters, 2):
        first, second = adapters[one].factors, adapters[two].factors
        both = [
            path
            for path in first
            if path in second
            and first[path].rank
            and second[path].rank
            and first[path].A.shape[1] == second[path].A.shape[1]
            and first[path].B.shape[0] == second[path].B.shape[0]
        ]
        norms = [math.sqrt(sum(_inner(side[path], side[path]) for path in both)) for side in (first, second)]
        product = sum(_inner(first[path], second[path]) for path in both)
        shares = [share for path in both if (share := _row_overlap(first[path], second[path])) is not None]
        found.append(
            {
                "tasks": [one, two],
                "modules": len(both),
                "union": len(set(first) | set(second)),
                "inputs": statistics.mean(shares) if shares else None,
                "cosine": product / (norms[0] * norms[1]) if all(norms) else None,
            }
        )
    return found


def _inner(one: Factor, two: Factor) -> float:
    """Frobenius inner product of two updates, from their factors: trace((A2 A1^T)(B1^T B2))."""
    inputs = two.A.double() @ one.A.double().t()
    outputs = one.B.double().t() @ two.B.double()
    return float(one.scaling * two.scaling * (inputs * outputs.t()).sum())


def _row_overlap(one: Factor, two: Factor) -> float | None:
    # The bank's rows are orthonormal and as many as the numerical rank: rows of 0, or twice the same, add no direction.
    first, second = (
        AdapterBank.from_factors([factor.A], [factor.B], dtype=torch.float64, device="cpu").A for factor in (one, two)
    )
    least = min(len(first), len(second))
    return float((first @ second.t()).square().sum()) / least if least else None


@torch.no_grad()
def null_space_ratios(
    model: nn.Module, adapters: Mapping[str, Adapter], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, dict[str, float]]:
    """Mean null-space ratio (Eq. 4) of every adapter on inputs of the base model: over the tokens of all batches, then
    over all its modules.

    Padding is left out where the family of the model knows a mask and the batch holds it.

    Args:
        model: the base model.
        adapters: as fitted to it.
        batches: model inputs.

    Returns:
        Task -> ``measured``, and ``random``: ``sqrt(1 - r / d_in)``, what a random A of that rank gives, over the same
        modules: those that the forward reaches.

    Raises:
        RuntimeError: if the forward reaches no module of an adapter.
    """
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    real_tokens = RealTokens(model)
    inputs: dict[str, Tensor] = {}

    def record(path: str, quad: Tensor, sqnorm: Tensor) -> None:
        ratio = null_space_ratio(quad, sqnorm)
        real = real_tokens.of(path, sqnorm, inputs)
        kept = ratio.flatten(0, -2) if real is None else ratio[real]
        sums[path] = sums.get(path, 0.0) + kept.cpu().double().sum(0)
        tokens[path] = tokens.get(path, 0) + len(kept)

    device = input_device(model)
    with attach(model, adapters, 0.0) as merged:
        for module in merged.values():
            # A layer that no adapter touches at low rank has no null space to speak of.
            module.measure = record if module.bank.R else None
        for batch in batches:
            inputs = {name: value.to(device) for name, value in batch.items()}
            with naming_inputs("inputs", inputs):
                model(**inputs)
    reached = {
        task: [path for path, factor in adapter.factors.items() if factor.rank and tokens.get(path)]
        for task, adapter in adapters.items()
    }
    silent = [task for task, paths in reached.items() if not paths]
    if silent:
        raise RuntimeError(f"inputs: the forward reaches no module of {silent}")
    return {
        task: {
            "measured": statistics.mean(float(sums[path][column]) / tokens[path] for path in paths),
            "random": statistics.mean(
                math.sqrt(max(0.0, 1 - factor.rank / factor.A.shape[1]))
                for factor in map(adapters[task].factors.__getitem__, paths)
            ),
        }
        for column, (task, paths) in enumerate(reached.items())
    }


def render(document: Mapping[str, Any]) -> str:
    """The findings for a terminal."""
    lines = []
    for task, adapter in document["adapters"].items():
        kinds = ", ".join(f"{name} x{count}" for name, count in adapter["modules"].items())
        lines += [
            f"{task}",
            f"  modules   {kinds}",
            f"  ranks     {', '.join(map(str, adapter['ranks']))}"
            f"   scaling {', '.join(f'{value:g}' for value in adapter['scaling'])}"
            f"   parameters {adapter['parameters']:,}   norm of the update {adapter['norm']:.4g}",
        ]
        if adapter["base_model"]:
            lines.append(f"  base      {adapter['base_model']}")
        extras = [name for name in ("bias", "dora") if adapter[name]]
        if extras:
            lines.append(f"  with      {', '.join(extras)}")
        for label, names in (("shared", adapter["shared"]), ("in full", adapter["trained"])):
            if names:
                lines.append(f"  {label:<9} {', '.join(names)}")
        ratio = (document.get("null_space_ratio") or {}).get(task)
        if ratio:
            lines.append(
                f"  ratio     {ratio['measured']:.4f} on the given inputs (a random A: {ratio['random']:.4f})"
            )
        lines += [f"  note      {note}" for note in adapter["notes"]]
    if document["overlaps"]:
        width = max(len(" + ".join(pair["tasks"])) for pair in document["overlaps"])
        lines.append(f"\n{'overlap':<{width}}  modules  row spaces of A  cosine of updates")
        for pair in document["overlaps"]:
            cells = [f"{pair[key]:.3f}" if pair[key] is not None else "-" for key in ("inputs", "cosine")]
            lines.append(
                f"{' + '.join(pair['tasks']):<{width}}  {pair['modules']:>3}/{pair['union']:<3}"
                f"  {cells[0]:>15}  {cells[1]:>17}"
            )
    return "\n".join(lines)
