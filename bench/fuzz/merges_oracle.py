"""Merge methods in NumPy on dense updates, by their definitions. No code of nsc_merge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
# path -> task -> dense update
Updates = Mapping[str, Mapping[str, Array]]


def trimmed(updates: Updates, o: Mapping[str, Any]) -> dict[str, dict[str, Array]]:
    """What stays of each task, its entries counted in each module or over all; equal ones by their place."""
    kept: dict[str, dict[str, Array]] = {path: dict(row) for path, row in updates.items()}
    if o["density"] >= 1:
        return kept
    for task, group, size, wanted in _counted(updates, o):
        stays = np.zeros(len(size), bool)
        order = np.argsort(-size, kind="stable")
        if o["keep"] in ("floor", "round"):
            stays[order[:wanted]] = True
        elif wanted:
            stays = size >= size[order[wanted - 1]]
        for path in group:
            shape = updates[path][task].shape
            here, stays = stays[: np.prod(shape)], stays[np.prod(shape) :]
            kept[path][task] = updates[path][task] * here.reshape(shape)
    return kept


def _counted(updates: Updates, o: Mapping[str, Any]) -> Iterator[tuple[str, list[str], Array, int]]:
    """Task, the modules that are counted together, the magnitudes of their entries, and how many of these stay."""
    for task in {task for row in updates.values() for task in row}:
        paths = [path for path in updates if task in updates[path]]
        for group in [paths] if o["trim_scope"] == "global" else [[path] for path in paths]:
            size = np.concatenate([np.abs(updates[path][task]).ravel() for path in group])
            yield task, group, size, min(_wanted(len(size), o["density"], o["keep"]), len(size))


def _rounding_trims(updates: Updates, o: Mapping[str, Any]) -> bool:
    """Whether the last entry that stays and the first that goes are one but for rounding, as in singular vectors of few
    entries."""
    return o["density"] < 1 and any(
        0 < wanted < len(size) and np.ptp(np.sort(size)[len(size) - wanted - 1 :][:2]) < 1e-6 * size.max()
        for _, _, size, wanted in _counted(updates, o)
    )


def _wanted(entries: int, density: float, keep: str) -> int:
    if keep == "complement":
        return entries - int((1 - density) * entries) + 1
    if keep == "round":
        return max(1, round(density * entries))
    return int(density * entries) + (keep == "next")


def _rounding_elects(updates: Updates, o: Mapping[str, Any], weights: Mapping[str, float]) -> bool:
    """Whether values other than zero add up to zero but for rounding."""
    for row in updates.values():
        votes = [x * (weights[task] if o["sign"] == "weighted" else 1.0) for task, x in row.items()]
        size = np.sum(np.abs(np.stack(votes)), 0)
        if ((np.abs(np.sum(np.stack(votes), 0)) < 1e-9 * size) & (size > 0)).any():
            return True
    return False


def elected(updates: Updates, o: Mapping[str, Any], weights: Mapping[str, float]) -> dict[str, Array]:
    """The two later steps of TIES."""
    votes = {}
    for path, row in updates.items():
        ballots = {
            task: weights[task] * x if o["sign"] == "weighted" else np.sign(x) if o["sign"] == "count" else x
            for task, x in row.items()
        }
        votes[path] = ballots, np.sign(sum(ballots.values()))
    balance = {path: signs.sum() for path, (_, signs) in votes.items()}
    if o["trim_scope"] == "global":
        balance = dict.fromkeys(balance, sum(balance.values()))
    merged = {}
    for path, (ballots, signs) in votes.items():
        tie = {"positive": 1, "negative": -1, "majority": 1 if balance[path] > 0 else -1}[o["zero"]]
        signs = np.where(signs == 0, tie, signs)
        agree = {task: np.sign(ballot) == signs for task, ballot in ballots.items()}
        total = sum(weights[task] * updates[path][task] * agree[task] for task in agree)
        shares = {task: weights[task] if o["aggregate"] == "weight" else 1.0 for task in agree}
        divisor = sum(shares[task] * agree[task] for task in agree)
        size = sum(abs(shares[task]) * agree[task] for task in agree)
        whole = np.where(np.abs(divisor) <= 1e-8 * size, 1.0, divisor)
        merged[path] = np.asarray(total if o["aggregate"] == "sum" else total / whole)
    return merged


def added(updates: Updates, weights: Mapping[str, float]) -> dict[str, Array]:
    return {path: np.asarray(sum(weights[task] * x for task, x in row.items())) for path, row in updates.items()}


def without_outliers(x: Array, o: Mapping[str, Any]) -> Array:
    """Model Breadcrumbs' mask of one matrix, and its rescaling."""
    if o["density"] >= 1:
        return x
    order = np.argsort(np.abs(x).ravel(), kind="stable")
    kept = int(o["density"] * x.size)
    above = min(int(o["outliers"] * x.size), x.size - kept)
    stays = np.zeros(x.size, bool)
    stays[order[x.size - above - kept : x.size - above]] = True
    left = x * stays.reshape(x.shape)
    total = np.abs(left).sum()
    return left * (np.abs(x).sum() / total if o["rescale"] == "l1" and total > 0 else 1.0)


def largest(x: Array, rank: int | None) -> Array:
    """The best approximation of that rank."""
    left, sigma, right = np.linalg.svd(x, full_matrices=False)
    return (left[:, :rank] * sigma[:rank]) @ right[:rank]


def iso_c(x: Array) -> Array:
    left, sigma, right = np.linalg.svd(x, full_matrices=False)
    rank = int((sigma > 1e-9 * max(sigma[0], 1e-300)).sum())
    return sigma[:rank].mean() * left[:, :rank] @ right[:rank] if rank else np.zeros_like(x)


def tsv(row: Mapping[str, Array], share: float | None) -> Array | None:
    """None where the singular vectors of all tasks depend on one another, so that no one orthonormal set is nearest."""
    room = min(next(iter(row.values())).shape)
    row = {task: x for task, x in row.items() if x.any()} or row
    kept = max(1, room // len(row) if share is None else int(share * room))
    parts = []
    for x in row.values():
        left, sigma, right = np.linalg.svd(x, full_matrices=False)
        rank = min(kept, int((sigma > 1e-9 * max(sigma[0], 1e-300)).sum()))
        if rank < len(sigma) and sigma[rank] > 1e-9 * sigma[0] and sigma[rank] > 0.9999 * sigma[rank - 1]:
            return None
        parts.append((left[:, :rank], sigma[:rank], right[:rank]))
    whole = [np.concatenate([left for left, _, _ in parts], 1), np.concatenate([right for _, _, right in parts]).T]
    near = []
    for vectors in whole:
        left, sigma, right = np.linalg.svd(vectors, full_matrices=False)
        if len(sigma) and (len(sigma) < vectors.shape[1] or sigma[-1] < 1e-3):
            return None
        near.append(left @ right)
    return (near[0] * np.concatenate([sigma for _, sigma, _ in parts])) @ near[1].T


def knots(updates: Updates, o: Mapping[str, Any], weights: Mapping[str, float]) -> dict[str, Array] | None:
    """KnOTS-TIES; None where rounding decides what is a singular value, what trimming leaves, or which sign wins."""
    bases, aligned = {}, {}
    for path, row in updates.items():
        across = o["along"] == "columns"
        stacked = np.concatenate([x if across else x.T for x in row.values()], 1)
        left, sigma, right = np.linalg.svd(stacked, full_matrices=False)
        least = max(o["atol"], o["rtol"] * sigma[0])
        rank = int((sigma > least).sum())
        rounding = 1e-9 * sigma[0]
        if (np.abs(sigma - least) < 0.01 * least).any() or ((sigma < rounding) & (sigma > least / 2)).any():
            return None
        scaled = o["vectors"] == "scaled"
        parts = np.split((sigma[:rank, None] if scaled else 1.0) * right[:rank], len(row), 1)
        bases[path] = left[:, :rank] if scaled else left[:, :rank] * sigma[:rank]
        aligned[path] = dict(zip(row, parts, strict=True))
    stays = trimmed(aligned, o)
    if _rounding_trims(aligned, o) or _rounding_elects(stays, o, weights):
        return None
    merged = elected(stays, o, weights)
    return {
        path: bases[path] @ x if o["along"] == "columns" else (bases[path] @ x).T for path, x in merged.items()
    }
