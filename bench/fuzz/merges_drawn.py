"""What :mod:`bench.fuzz.merges` tries: methods, options and updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nsc_merge.methods.registry import METHODS

WIDTHS = (1, 2, 3, 4, 5, 7, 8, 12, 16, 33)
RANKS = (0, 1, 1, 2, 3, 4, 6)
DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
FORMS = ("factors", "Factor", "matrix")
# That a matrix may be given to without a warning, as they look at the product alone and at no threshold of its entries.
OF_PRODUCTS = ("task_arithmetic", "svd", "tsv", "iso_c", "iso_cts", "wudi", "fr")
# Methods that look at single entries: equal ones must be equal to rounding, as whole numbers are.
OF_ENTRIES = ("task_arithmetic", "ties", "dare_ties", "dare", "magnitude_prune", "breadcrumbs", "della")
_TIES: dict[str, tuple[Any, ...]] = {
    "density": (0.05, 0.2, 0.25, 0.3, 0.5, 0.9, 1.0, 1),
    "trim_scope": ("global", "tensor"),
    "keep": ("next", "floor", "round", "complement"),
    "sign": ("sum", "weighted", "count"),
    "zero": ("majority", "positive", "negative"),
    "aggregate": ("mean", "sum", "weight"),
}
_KNOTS = {**_TIES, "sign": ("sum", "weighted"), "along": ("columns", "rows"), "vectors": ("scaled", "plain")}
_KNOTS |= {"atol": (1e-5, 0.0), "rtol": (0.0, 1e-5)}
# Of each method, values to choose from; what is not here keeps its default.
OPTIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "task_arithmetic": {},
    "ties": _TIES,
    "dare": {"drop": (0, 0.0, 0.5, 0.9), "rescale": ("inverse", "l1", "none"), "drop_scope": ("update", "factors")},
    "dare_ties": {**_TIES, "drop": (0, 0.0), "order": ("drop_first", "trim_first"), "rescale": ("inverse", "l1")},
    "magnitude_prune": {name: _TIES[name] for name in ("density", "trim_scope", "keep")},
    "breadcrumbs": {
        "density": (0.143, 0.5, 0.9, 1.0), "outliers": (0.0, 0.007, 0.1, 1.0), "rescale": ("none", "l1"),
        "elect": (False, True), "aggregate": _TIES["aggregate"],
    },
    "della": {"density": (1.0, 1), "elect": (False, True), "aggregate": _TIES["aggregate"]},
    "svd": {"rank": (None, 1, 2, 5, 99)},
    "linear": {"preset": ("peft", "nsc")},
    "knots_ties": _KNOTS,
    "knots_dare_ties": {**_KNOTS, "drop": (0.0,)},
    "core_space": {
        "merge": ("sum", "ties", "dare"), "bases": ("factors", "updates"), "isotropise": (False, True),
        "density": (0.3, 1.0), "sign": ("sum",), "drop": (0.0,),
    },
    "svd_cur": {
        "alpha": ("magnitude", 0.0, 0.3, 1.0), "svd_density": (0.2, 1.0), "cur_density": (0.2, 1.0),
        "columns": (None, 1, 3), "choice": ("norm", "pivoted"), "rows": (0, 2),
    },
    "lora_lego": {"rank": (None, 1, 2, 99), "rescale": (True, False), "seed": (0, 5)},
    "tsv": {"share": (None, 0.3, 0.5, 1.0), "room": ("layer", "core")},
    "iso_c": {},
    "iso_cts": {"common": (0.0, 0.5, 0.8, 1.0)},
    "wudi": {"ridge": (1e-2, 1.0, 100.0)},
    "fr": {"preset": ("original", "nsc", "shifted")},
    "robustmerge": {"density": (0.2, 0.5, 1.0)},
    "robustmerge_alg1": {"density": (0.2, 0.8, 1.0)},
}  # fmt: skip


@dataclass(frozen=True)
class Merge:
    """What is tried, as it was drawn; ``seed`` and ``number`` draw it and all numbers again."""

    seed: int
    number: int
    method: str
    options: dict[str, Any]
    shapes: dict[str, tuple[int, int]]
    ranks: dict[str, dict[str, int]]  # task -> path -> rank
    values: str  # real | exact: small whole numbers, so that equal entries are equal
    dtype: str
    alike: bool  # the last task has the first one's updates
    forms: dict[str, str]  # task -> factors, Factor, or matrix
    rank: int | None  # the merge is truncated to it


# task -> path -> (A, B, scaling)
Tasks = dict[str, dict[str, tuple[Tensor, Tensor, float]]]


def draw(seed: int, number: int, rng: np.random.Generator) -> Merge:
    def one(choices: Any) -> Any:
        return choices[int(rng.integers(len(choices)))]

    method = one(tuple(OPTIONS))
    tasks = [f"task {k}" for k in range(int(rng.integers(1, 6)))]
    shapes = {f"layers.{k}": (one(WIDTHS), one(WIDTHS)) for k in range(int(rng.integers(1, 4)))}
    same = {path: one(RANKS[1:]) for path in shapes} if rng.random() < 0.5 else {}
    ranks = {task: {path: same.get(path) or one(RANKS) for path in shapes if rng.random() < 0.85} for task in tasks}
    if not ranks[tasks[0]]:
        ranks[tasks[0]] = dict.fromkeys(shapes, 2)
    alike = len(tasks) > 1 and bool(rng.random() < 0.1)
    if alike:
        ranks[tasks[-1]] = ranks[tasks[0]]
    options = {name: one(values) for name, values in OPTIONS[method].items() if rng.random() < 0.6}
    options |= {name: OPTIONS[method][name][0] for name in ("drop", "density") if method in ("della", "dare_ties")
                and name in OPTIONS[method] and len(OPTIONS[method][name]) == 2}  # fmt: skip
    if method.startswith("knots"):
        options |= {"drop": 0.0} if "dare" in method else {}
        options |= {"sign": options.get("sign", "sum")}
    if method == "core_space":
        options["drop"] = 0.0
    known = METHODS[method].option_names
    if "weights" in known and rng.random() < 0.4:
        options["weights"] = {task: one((0.25, 0.5, 1.0, 2.0, -0.5)) for task in tasks}
    if rng.random() < 0.6:
        options["scale"] = one((0.25, 0.5, 1, 2.0, -1.0))
        if method == "task_arithmetic" and rng.random() < 0.5:
            options["scale"] = {task: one((0.25, 0.5, 1.0, -0.5, 0.0)) for task in tasks}
    values = "exact" if method in OF_ENTRIES and rng.random() < 0.5 else "real"
    return Merge(
        seed=seed,
        number=number,
        method=method,
        options=options,
        shapes=shapes,
        ranks=ranks,
        values=values,
        dtype=one(tuple(DTYPES)),
        alike=alike,
        # Of a matrix factors are found, which are off by rounding.
        forms={task: one(FORMS if values == "real" and method in OF_PRODUCTS else FORMS[:2]) for task in tasks},
        rank=int(rng.integers(1, 6)) if "rank" not in known and rng.random() < 0.15 else None,
    )


def updates(p: Merge, rng: np.random.Generator) -> Tasks:
    made: Tasks = {}
    for task, row in p.ranks.items():
        made[task] = {}
        for path, rank in row.items():
            d_out, d_in = p.shapes[path]
            A, B = rng.standard_normal((rank, d_in)), rng.standard_normal((d_out, rank))
            if p.values == "exact":
                A, B = np.rint(1.2 * A), np.rint(1.2 * B)
            scaling = float(2.0 ** rng.integers(-2, 3)) * (-1 if rng.random() < 0.1 else 1)
            dtype = DTYPES["f32" if p.values == "real" and p.dtype in ("bf16", "f16") else p.dtype]
            made[task][path] = torch.from_numpy(A).float().to(dtype), torch.from_numpy(B).float().to(dtype), scaling
    if p.alike:
        first, *_, last = made
        made[last] = dict(made[first])
    return made
