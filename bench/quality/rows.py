"""The rows of the quality tables: which method, with which options, and how its scale is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nsc_merge.methods import METHODS
from nsc_merge.methods.scale_tuning import COARSE

from .controls import CONTROLS


@dataclass(frozen=True)
class Extent:
    """How much is measured on a suite.

    Attributes:
        batch: rows of a calibration batch: the ViT study's, and fewer for language (the paper's are two, row "LLM").
        rank: of the suite's adapters.
        coarse: scales that are tried.
        beyond: scales that are tried where the last of them is the best; from there on up to twice the last, as often
            as that is the best.
        fine_step: between scales around the best, in the end;
        fine_steps: how many of those to each side.
        oracle: options of the row of that name, besides its own.
    """

    batch: int
    rank: int = 8
    coarse: tuple[float, ...] = COARSE
    beyond: tuple[float, ...] = tuple(round(1 + 0.2 * step, 1) for step in range(1, 11))
    fine_step: float = 0.02
    fine_steps: int = 4
    oracle: Mapping[str, Any] = field(default_factory=dict)


EXTENTS = {
    "vit": Extent(32),
    "siglip": Extent(32),
    "llama": Extent(8),
    "llava": Extent(8),
    # A forward takes a hundred times as long as those of the others.
    "smollm2": Extent(
        4,
        rank=16,
        coarse=(0.2, 0.4, 0.6, 0.8, 1.0),
        beyond=(1.4, 1.8, 2.2),
        fine_step=0.1,
        fine_steps=1,
        oracle={"batch": 4, "steps": 100},
    ),
}
LANGUAGE = ("llama", "llava", "smollm2")
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
        options: of the method; ``"1/K"`` stands for one over the number of tasks, ``"r"`` for the adapters' rank.
        tuned: how the scale is chosen on labelled validation data: ``"metric"``, the normalised average;
            ``"loss"``, the sum of the raw losses; None keeps the options.
        batch: rows of a calibration batch; the suite's own when None.
        batches: how many different batches there are, taken in turn; one for every step when None.
        suites: where the row applies; everywhere when empty.
    """

    name: str
    group: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    tuned: str | None = None
    batch: int | None = None
    batches: int | None = None
    suites: tuple[str, ...] = ()

    @property
    def available(self) -> bool:
        return self.method in METHODS or self.method in CONTROLS or self.method == SHUFFLED

    def resolved(self, tasks: int, rank: int) -> dict[str, Any]:
        known = {"1/K": 1 / tasks, "r": rank}
        return {
            name: known.get(value, value) if isinstance(value, str) else value for name, value in self.options.items()
        }


_START = {"lr": 1e-3, "steps": GRADIENT_STEPS, "optimizer": "adamw", "weight_decay": 0.01, "init": 0.4}
_MATCH = {"lr": 1e-2, "steps": GRADIENT_STEPS, "init": 0.4, "normalise": "none", "positions": "all"}
_DISTILL = {"lr": 1e-2, "init": 0.4, "normalise": "variance", "distance": "divergence"}

ROWS = (
    Row("zero_shot", REFERENCE, "zero_shot"),
    Row("finetuned", REFERENCE, "finetuned"),
    Row("TA@1/K", GRADIENT_FREE, "task_arithmetic", {"scale": "1/K"}),
    Row("TA@0.4", GRADIENT_FREE, "task_arithmetic", {"scale": 0.4}),
    Row("TA", GRADIENT_FREE, "task_arithmetic", {"scale": 1.0}, tuned="metric"),
    Row("TA (by loss)", GRADIENT_FREE, "task_arithmetic", {"scale": 1.0}, tuned="loss"),
    Row("TIES", GRADIENT_FREE, "ties", {"scale": 1.0}, tuned="metric"),
    Row("TIES (sum)", GRADIENT_FREE, "ties", {"preset": "adamerging", "scale": 1.0}, tuned="metric"),
    Row("DARE", GRADIENT_FREE, "dare", {"scale": 1.0}, tuned="metric"),
    Row("DARE-TIES", GRADIENT_FREE, "dare_ties", {"scale": 1.0}, tuned="metric"),
    Row("Breadcrumbs", GRADIENT_FREE, "breadcrumbs", {"scale": 1.0}, tuned="metric"),
    Row("DELLA", GRADIENT_FREE, "della", {"scale": 1.0}, tuned="metric"),
    Row("EMR unified", GRADIENT_FREE, "emr_unified", {"scale": 1.0}, tuned="metric"),
    Row("FR", GRADIENT_FREE, "fr", {"scale": 1.0}, tuned="metric"),
    Row("FR (NSC's)", GRADIENT_FREE, "fr", {"preset": "nsc", "scale": 1.0}, tuned="metric"),
    Row("SVD", GRADIENT_FREE, "svd", {"scale": 1.0, "rank": "r"}, tuned="metric"),
    Row("linear", GRADIENT_FREE, "linear", {"scale": 1.0}, tuned="metric"),
    Row("KnOTS-TIES", GRADIENT_FREE, "knots_ties", {"scale": 1.0}, tuned="metric"),
    Row("KnOTS-DARE-TIES", GRADIENT_FREE, "knots_dare_ties", {"scale": 1.0}, tuned="metric"),
    Row("Core Space", GRADIENT_FREE, "core_space", {"scale": 1.0, "merge": "sum"}, tuned="metric"),
    Row("Core Space TIES", GRADIENT_FREE, "core_space", {"scale": 1.0, "merge": "ties"}, tuned="metric"),
    Row("SVD+CUR", GRADIENT_FREE, "svd_cur", {"scale": 1.0}, tuned="metric"),
    Row("LoRA-LEGO", GRADIENT_FREE, "lora_lego", {"scale": 1.0}, tuned="metric"),
    Row("RobustMerge", GRADIENT_FREE, "robustmerge", {"scale": 1.0}, tuned="metric"),
    Row("RobustMerge Alg. 1", GRADIENT_FREE, "robustmerge_alg1", {"scale": 1.0}, tuned="metric"),
    Row("TSV", GRADIENT_FREE, "tsv", {"scale": 1.0}, tuned="metric"),
    Row("Iso-C", GRADIENT_FREE, "iso_c", {"scale": 1.0}, tuned="metric"),
    Row("Iso-CTS", GRADIENT_FREE, "iso_cts", {"scale": 1.0}, tuned="metric"),
    Row("WUDI", GRADIENT_FREE, "wudi", {"scale": 1.0}, tuned="metric"),
    Row("EMR", PER_TASK, "emr"),
    Row("RegMean", CLOSED_FORM, "regmean"),
    Row("RegMean (tuned)", CLOSED_FORM, "regmean", {"scale": 1.0}, tuned="metric"),
    Row("Fisher", CLOSED_FORM, "fisher"),
    Row("Fisher (tuned)", CLOSED_FORM, "fisher", {"scale": 1.0}, tuned="metric"),
    Row("AdaMerging", LEARNT, "adamerging", {"lr": 1e-3, "init": 0.4}),
    Row("AdaMerging lr1e-2", LEARNT, "adamerging", {"lr": 1e-2, "init": 0.4}),
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
        suites=LANGUAGE,
    ),
    *(
        Row(f"NSC {name}", LEARNT, "nsc_descended", {**_START, **options}, suites=("smollm2",))
        for name, options in (
            ("by block", {"share": "block"}),
            ("by task", {"share": "task"}),
            ("plain descent", {"descent": "plain"}),
            ("bounded", {"descent": "bounded"}),
        )
    ),
    Row("NSC more data", LEARNT, "nsc", _START, batch=16, suites=("smollm2",)),
    # The single models' features are kept per batch, so batches come again: eight are all of ViT's validation scenes.
    Row("match", LEARNT, "match", _MATCH, batches=8),
    Row("match lr1e-3", LEARNT, "match", {**_MATCH, "lr": 1e-3}, batches=8),
    Row("match init1/K", LEARNT, "match", {**_MATCH, "init": "1/K"}, batches=8),
    Row("match init by match", LEARNT, "match", {**_MATCH, "init": "match"}, batches=8),
    Row("match by scale", LEARNT, "match", {**_MATCH, "normalise": "scale"}, batches=8),
    Row("match by task", LEARNT, "match", {**_MATCH, "normalise": "task"}, batches=8),
    Row("match, one per task", LEARNT, "match", {**_MATCH, "share": "task"}, batches=8),
    Row("match last", LEARNT, "match", {**_MATCH, "positions": "last"}, batches=8, suites=LANGUAGE),
    Row(
        "match last by task",
        LEARNT,
        "match",
        {**_MATCH, "positions": "last", "normalise": "task"},
        batches=8,
        suites=LANGUAGE,
    ),
    Row("distill", LEARNT, "distill", _DISTILL, batches=8),
    Row("distill bounded", LEARNT, "distill", {**_DISTILL, "distance": "bounded"}, batches=8),
    Row(
        "distill answers",
        LEARNT,
        "distill",
        {**_DISTILL, "distance": "bounded", "new_tokens": 8},
        batches=8,
        suites=("llava", "smollm2"),
    ),
    Row(
        "distill regmean",
        LEARNT,
        "distill",
        {**_DISTILL, "distance": "bounded", "regmean": True},
        batches=8,
        suites=("vit", "siglip", "llama"),
    ),
    Row(
        "distill answers regmean",
        LEARNT,
        "distill",
        {**_DISTILL, "distance": "bounded", "new_tokens": 8, "regmean": True},
        batches=8,
        suites=("llava", "smollm2"),
    ),
    Row("distill init1/K", LEARNT, "distill", {**_DISTILL, "init": "1/K"}, batches=8),
    Row("distill by task", LEARNT, "distill", {**_DISTILL, "normalise": "task"}, batches=8),
    # The same as "distill" where no task predicts values.
    Row(
        "distill unscaled",
        LEARNT,
        "distill",
        {**_DISTILL, "normalise": "none"},
        batches=8,
        suites=("vit", "siglip", "llama", "smollm2"),
    ),
    Row("anti-NSC", CONTROL, "anti_nsc", _START),
    *(Row(f"shuffled NSC#{n}", CONTROL, SHUFFLED, {**_START, "shuffle": n}) for n in range(3)),
    Row("oracle", LABELLED, "oracle"),
)
