"""The rows of the quality tables: which method, with which options, and how its scale is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from controls import CONTROLS

from nsc_merge.methods import METHODS

# Rows of a batch: the ViT study's, and per task 8 for language (the paper's two are the rows "LLM").
BATCH = {"vit": 32, "llama": 8, "llava": 8}
GRADIENT_STEPS = 100
# The merge of method "nsc" with its changes of the coefficients permuted.
SHUFFLED = "shuffled_nsc"

REFERENCE, GRADIENT_FREE, PER_TASK, CLOSED_FORM, LEARNT, CONTROL, LABELLED = GROUPS = (
    "references",
    "gradient-free",
    "one model per task",
    "from data, in closed form",
    "learnt without labels",
    "controls",
    "learnt from labels",
)


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        name: of the row.
        group: one of :data:`GROUPS`, the part of the table that it stands in.
        method: of :data:`nsc_merge.methods.METHODS`, or of :data:`controls.CONTROLS`.
        options: of the method; ``"1/K"`` stands for one over the number of tasks.
        tuned: how the scale is chosen on labelled validation data: ``"metric"``, the normalised average;
            ``"loss"``, the sum of the raw losses; None keeps the options.
        batch: rows of a calibration batch; the suite's own when None.
        suites: where the row applies; everywhere when empty.
    """

    name: str
    group: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    tuned: str | None = None
    batch: int | None = None
    suites: tuple[str, ...] = ()

    @property
    def available(self) -> bool:
        return self.method in METHODS or self.method in CONTROLS or self.method == SHUFFLED

    def resolved(self, tasks: int) -> dict[str, Any]:
        return {name: 1 / tasks if value == "1/K" else value for name, value in self.options.items()}


_START = {"lr": 1e-3, "steps": GRADIENT_STEPS, "optimizer": "adamw", "weight_decay": 0.01, "init": 0.4}

ROWS = (
    Row("zero_shot", REFERENCE, "zero_shot"),
    Row("finetuned", REFERENCE, "finetuned"),
    Row("TA@1/K", GRADIENT_FREE, "task_arithmetic", {"scale": "1/K"}),
    Row("TA@0.4", GRADIENT_FREE, "task_arithmetic", {"scale": 0.4}),
    Row("TA", GRADIENT_FREE, "task_arithmetic", {"scale": 1.0}, tuned="metric"),
    Row("TA (by loss)", GRADIENT_FREE, "task_arithmetic", {"scale": 1.0}, tuned="loss"),
    Row("NSC", LEARNT, "nsc", _START),
    Row("NSC lr1e-4", LEARNT, "nsc", {**_START, "lr": 1e-4}),
    Row("NSC lr1e-2", LEARNT, "nsc", {**_START, "lr": 1e-2}),
    Row("NSC init1/K", LEARNT, "nsc", {**_START, "init": "1/K"}),
    Row(
        "NSC paper LLM",
        LEARNT,
        "nsc",
        {**_START, "lr": 3e-4, "steps": 500},
        batch=2,
        suites=("llama", "llava"),
    ),
    Row("anti-NSC", CONTROL, "anti_nsc", _START),
    *(Row(f"shuffled NSC#{n}", CONTROL, SHUFFLED, {**_START, "shuffle": n}) for n in range(3)),
    Row("oracle", LABELLED, "oracle"),
)
