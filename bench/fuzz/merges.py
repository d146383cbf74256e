"""Random merges of random updates by every method that needs no data, with random options.

Methods that have a definition in a few lines are held to it, in NumPy on dense updates
(:mod:`bench.fuzz.merges_oracle`). All are held to what no method may depend on: how tensors lie in memory, the order of
tasks and of modules, how a product is factored where the method says that it looks at the product, and a factor that
all updates have in common.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.fuzz import merges_oracle as oracle
from bench.fuzz.layouts import STRIDES, laid_out
from bench.fuzz.merges_drawn import Merge, Tasks, draw, updates
from bench.fuzz.trial import Trial
from nsc_merge import merge_factors
from nsc_merge.adapters import Factor
from nsc_merge.methods.registry import METHODS


def trials(seed: int) -> Iterator[Trial]:
    """Endless; the n-th is :func:`trial` of the seed and n."""
    for number in itertools.count():
        yield trial(seed, number)


def trial(seed: int, number: int) -> Trial:
    rng = np.random.default_rng((seed, number))
    problem = draw(seed, number, rng)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = _tried(problem, rng)
    except ValueError as error:
        if _is_fair(problem, str(error)):
            return Trial(str(problem), "refused", str(error))
        found = f"ValueError: {error}"
    except Exception as error:  # whatever it is, no merge of good updates may raise it
        found = f"{type(error).__name__}: {error}"
    return Trial(str(problem), "wrong" if found else "right", found)


def _is_fair(p: Merge, said: str) -> bool:
    """Whether a refusal is for what the documentation says it is."""
    different = any(len({ranks.get(path, 0) for ranks in p.ranks.values()} - {0}) > 1 for path in p.shapes)
    return different and "needs equal ranks" in said and "\n" not in said


def _given(p: Merge, tasks: Tasks) -> dict[str, dict[str, Any]]:
    """What is handed over, each task in its form."""
    made: dict[str, dict[str, Any]] = {}
    for task, row in tasks.items():
        made[task], form = {}, p.forms[task]
        for path, (A, B, s) in row.items():
            whole = (s * B.double() @ A.double()) if form == "matrix" else None
            made[task][path] = Factor(A, B, s) if form == "Factor" else (A, B, s) if whole is None else whole
    return made


def _merged(p: Merge, tasks: Tasks) -> dict[str, np.ndarray]:
    """Path and merged update."""
    found = {}
    rank = {"rank": p.rank} if p.rank is not None else {}
    for path, factor in merge_factors(_given(p, tasks), p.method, **rank, **p.options):
        if factor.A.dtype is not torch.float32 or factor.B.dtype is not torch.float32:
            raise AssertionError(f"{path}: factors of {factor.A.dtype} and {factor.B.dtype}")
        if p.rank is not None and factor.rank > p.rank:
            raise AssertionError(f"{path}: rank {factor.rank}, asked for {p.rank}")
        found[path] = factor.delta().numpy()
    return found


def _tried(p: Merge, rng: np.random.Generator) -> str:
    tasks = updates(p, rng)
    found = _merged(p, tasks)
    paths = list(dict.fromkeys(path for row in tasks.values() for path in row))
    if list(found) != paths:
        return f"paths {list(found)}, expected {paths}"
    kept = {task: {path: (A.clone(), B.clone(), s) for path, (A, B, s) in row.items()} for task, row in tasks.items()}
    expected = _expected(p, tasks)
    if expected is not None:
        sizes = {path: sum(_size(row[path]) for row in tasks.values() if path in row) for path in paths}
        for path in paths:
            want = expected.get(path, np.zeros(p.shapes[path]))
            if p.rank is not None:
                # Singular values may be equal: how near a truncation comes is one number, which truncation it is not.
                best = np.linalg.norm(want - oracle.largest(want, p.rank))
                off = np.linalg.norm(want - found[path]) - best
            else:
                off = np.linalg.norm(found[path] - want)
            if not off <= 1e-5 * sizes[path]:
                return f"{path}: off by {off:.3g} of {np.linalg.norm(want):.3g}"
    if p.method == "dare" and len(tasks) == 1 and (wrong := _dropped(p, tasks, found)):
        return wrong
    for task, row in tasks.items():
        for path, (A, B, _) in row.items():
            if not (torch.equal(A, kept[task][path][0]) and torch.equal(B, kept[task][path][1])):
                return f"{task}, {path}: was written to"
    return _depends(p, tasks, found, rng)


def _dropped(p: Merge, tasks: Tasks, found: Mapping[str, np.ndarray]) -> str:
    """What is wrong with what DARE leaves of one task, or nothing."""
    drop, rescale = p.options.get("drop", 0.9), p.options.get("rescale", "inverse")
    if p.options.get("drop_scope") == "factors" or p.rank is not None:
        return ""
    (row,), weights = tasks.values(), p.options.get("weights") or {}
    times = p.options.get("scale", 1.0) * next(iter(weights.values()), 1.0)
    for path, (A, B, s) in row.items():
        whole, x = s * B.double().numpy() @ A.double().numpy(), found[path] / times
        size = np.abs(whole).max(initial=1e-30)
        stays = np.abs(x) > 1e-6 * size
        left = np.abs(whole[stays]).sum()
        by = {"inverse": 1 / (1 - drop), "none": 1.0, "l1": np.abs(whole).sum() / left if left else 1.0}[rescale]
        off = np.abs(x - by * whole * stays).max(initial=0)
        if not off <= 1e-5 * by * size:
            return f"{path}: what stays of DARE is off by {off:.3g} of {size:.3g}"
        # Six standard deviations.
        entries = int((np.abs(whole) > 1e-5 * size).sum())
        if abs(stays.sum() - (1 - drop) * entries) > 6 * np.sqrt(entries * drop * (1 - drop)) + 1:
            return f"{path}: DARE keeps {stays.sum()} of {entries} with drop {drop}"
    return ""


def _size(update: tuple[Tensor, Tensor, float]) -> float:
    A, B, scaling = update
    return abs(scaling) * float(torch.linalg.norm(A.double()) * torch.linalg.norm(B.double())) + 1e-30


def _depends(p: Merge, tasks: Tasks, found: Mapping[str, np.ndarray], rng: np.random.Generator) -> str:
    """What the merge depends on and may not, or nothing."""

    def changed(change: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor, float]]) -> Tasks:
        return {task: {path: change(*update) for path, update in row.items()} for task, row in tasks.items()}

    def differs(what: str, other: Tasks, times: float, tolerance: float) -> str:
        again = _merged(p, other)
        for path, x in found.items():
            size = sum(_size(row[path]) for row in tasks.values() if path in row)
            off = np.linalg.norm(again[path] / times - x)
            if not off <= tolerance * max(size, float(np.linalg.norm(x))):
                return f"{path}: {what} changes the merge by {off:.3g} of {np.linalg.norm(x):.3g}"
        return ""

    layout = STRIDES[int(rng.integers(len(STRIDES)))]

    def laid(t: Tensor) -> Tensor:
        return laid_out(t.double().numpy(), layout, t.dtype)

    wrong = differs(f"layout {layout!r}", changed(lambda A, B, s: (laid(A), laid(B), s)), 1.0, 1e-6)
    # Equal singular values, as those of Iso-C are, may be truncated in many ways.
    if wrong or p.values == "exact" or p.rank is not None or p.alike:
        return wrong
    way = int(rng.integers(4))
    # Clusters begin anywhere, and rounding may decide whose a unit is; FR brings to one size what
    # passes its filter, and rounding with it where that is little.
    if way == 0 and p.method not in ("lora_lego", "fr"):
        return differs("another order of tasks", dict(reversed(tasks.items())), 1.0, 1e-4)
    if way == 1 and p.options.get("trim_scope") != "global":
        back = {task: dict(reversed(row.items())) for task, row in tasks.items()}
        return differs("another order of modules", back, 1.0, 1e-4)
    method = METHODS[p.method]
    if way == 2 and not method.of_factors_with(method.resolved(p.options, list(tasks))):
        mixed = changed(_refactored(rng))
        return differs("another factoring", mixed, 1.0, 1e-3)
    if way == 3 and not p.method.startswith(("knots", "lora_lego")):
        return differs("half of every update", changed(lambda A, B, s: (A, B, s / 2)), 0.5, 1e-4)
    return ""


def _refactored(rng: np.random.Generator) -> Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor, float]]:
    def change(A: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor, float]:
        M = torch.from_numpy(np.linalg.qr(rng.standard_normal((len(A), len(A))))[0] * rng.uniform(0.5, 2, len(A)))
        return M @ A.double(), scaling * B.double() @ torch.linalg.inv(M), 1.0

    return change


def _expected(p: Merge, tasks: Tasks) -> dict[str, np.ndarray] | None:
    """The merge by definition, where there is one in :mod:`bench.fuzz.merges_oracle`."""
    updates: dict[str, dict[str, np.ndarray]] = {path: {} for row in tasks.values() for path in row}
    for task, row in tasks.items():
        for path, (A, B, s) in row.items():
            if len(A):
                updates[path][task] = s * B.double().numpy() @ A.double().numpy()
    updates = {path: row for path, row in updates.items() if row}
    method = METHODS[p.method]
    resolved = method.resolved(p.options, list(tasks))
    o = {name: getattr(resolved, name) for name in method.option_names}
    weights = dict.fromkeys(tasks, 1.0) | (o.get("weights") or {})
    scale = o.get("scale", 1.0)
    if isinstance(scale, Mapping):
        return oracle.added(updates, scale)
    merged = _BY_ENTRIES[p.method](updates, o, weights) if p.method in _BY_ENTRIES else None
    if p.method == "svd":
        merged = {path: oracle.largest(x, o["rank"]) for path, x in oracle.added(updates, weights).items()}
    if p.method == "iso_c":
        merged = {path: oracle.iso_c(x) for path, x in oracle.added(updates, weights).items()}
    if p.method in ("knots_ties", "knots_dare_ties"):
        merged = oracle.knots(updates, o, weights)
    if p.method == "tsv" and o["room"] == "layer":
        each = {path: oracle.tsv(row, o["share"]) for path, row in updates.items()}
        merged = None if any(x is None for x in each.values()) else each  # type: ignore[assignment]
    return None if merged is None else {path: scale * x for path, x in merged.items()}


def _ties(updates: oracle.Updates, o: Mapping[str, Any], weights: Mapping[str, float]) -> dict[str, np.ndarray]:
    return oracle.elected(oracle.trimmed(updates, o), o, weights)


def _elect(updates: oracle.Updates, o: Mapping[str, Any], weights: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Breadcrumbs and DELLA, which elect as mergekit does or add up."""
    if not o["elect"]:
        return oracle.added(updates, weights)
    return oracle.elected(updates, {**o, "trim_scope": "tensor", "sign": "weighted", "zero": "positive"}, weights)


def _breadcrumbs(updates: oracle.Updates, o: Mapping[str, Any], weights: Mapping[str, float]) -> dict[str, np.ndarray]:
    left = {p: {t: oracle.without_outliers(x, o) for t, x in row.items()} for p, row in updates.items()}
    return _elect(left, o, weights)


def _dare(updates: oracle.Updates, o: Mapping[str, Any], weights: Mapping[str, float]) -> dict[str, np.ndarray] | None:
    return oracle.added(updates, weights) if o["drop"] == 0 and o["drop_scope"] == "update" else None


_BY_ENTRIES: dict[str, Callable[..., dict[str, np.ndarray] | None]] = {
    "task_arithmetic": lambda updates, o, weights: oracle.added(updates, weights),
    "ties": _ties,
    "dare_ties": _ties,
    "dare": _dare,
    "magnitude_prune": lambda updates, o, weights: oracle.added(oracle.trimmed(updates, o), weights),
    "breadcrumbs": _breadcrumbs,
    "della": _elect,
}
