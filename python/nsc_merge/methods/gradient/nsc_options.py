"""Options of NSC merging, and the named defaults for each kind of model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nsc_merge.calibration.modality import MODALITIES
from nsc_merge.descent.options import DescentOptions
from nsc_merge.models.families import Family, check_family
from nsc_merge.utils.option_checks import check_choice

# The paper contradicts itself on vision: Section 4 says AdamW at 1e-3, Section A.3 of the supplement Adam at
# 1e-4.
RECIPES: dict[str, dict[str, Any]] = {
    "vision": {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01, "steps": 100},
    "llm": {"optimizer": "adamw", "lr": 3e-4, "weight_decay": 0.01, "steps": 500},
    "vlm": {"optimizer": "adamw", "lr": 3e-4, "weight_decay": 0.01, "steps": 500},
    "paper-supp": {"optimizer": "adam", "lr": 1e-4, "weight_decay": 0.0, "steps": 100},
}
DEAD_POLICIES = ("init", "tie_previous", "zero")


@dataclass(frozen=True)
class NSCOptions(DescentOptions):
    """Options of ``method="nsc"``.

    Attributes:
        optimizer: as all that follow up to ``resume_from``, in :class:`nsc_merge.descent.options.DescentOptions`.
        lr: see there.
        weight_decay: see there.
        steps: see there.
        schedule: see there.
        early_stop: see there.
        init: see there. Eq. 5 is not convex: the result depends on it.
        seed: see there.
        progress: see there.
        state_to: see there.
        state_every: see there.
        state_of: see there.
        resume_from: see there.
        recipe: named defaults for optimizer, lr, weight_decay and steps; the family's own when None.
        dead: what becomes of coefficients that nothing measured depends on: ``"init"`` keeps their initial
            value, ``"tie_previous"`` takes the task's value in the nearest earlier live module of the same
            name (of any name if there is none), ``"zero"`` drops the adapter there.
        family: what is known of the model, a :class:`nsc_merge.Family` or some of its fields by name; the rest, and all
            when None, is found from the model.
        score_modules: names of the linears whose input is measured; the family's own when None.
        score_blocks: ``"last_quarter"``, how many last blocks, or block numbers.
        include_pad: average over padding as well, as the paper's public code does.
        modality: for models that read images and text: ``"joint"`` measures both; ``"text"`` takes the images
            and their tokens out of every batch before the model sees it, ``"image"`` the text but for a start
            token in front (Table 9).
        batch_tasks: run the batches of all tasks as one pass where their shapes agree, with a little padding
            where only their lengths differ; None does so where memory allows and pads small batches only, for
            which it is faster. The gradient is the same.
        checkpointing: keep no activations of the blocks but compute them twice, one block at a time. None does so in
            blocks whose weights are offloaded (``device_map``), which would otherwise all stay until the backward.
        fold: add the adapters to the weights of linears that are not measured once per step, instead of applying
            them to every token: half of their arithmetic, for a copy of those weights. The same to rounding. None
            does so on a CPU in float32 and float64, up to 1 GiB of copies, for each linear in those steps whose
            tokens repay it: of a square one, from about a third to a half of its width on, in all batches of a step
            together. True folds in every step.
        compile: ``torch.compile`` the blocks before the measured ones: True, or the name of a backend. The first
            step takes a minute or so longer.
        early_exit: end the forward at the last measured input. Off only to measure what it saves.
        cache_prefix: keep the outputs of a frozen vision tower per batch, up to 2 GiB.
    """

    recipe: str | None = None
    dead: str = "init"
    family: Family | Mapping[str, Any] | None = None
    score_modules: Sequence[str] | None = None
    score_blocks: str | int | Sequence[int] = "last_quarter"
    include_pad: bool = False
    modality: str = "joint"
    batch_tasks: bool | None = None
    checkpointing: bool | None = None
    fold: bool | None = None
    compile: bool | str = False
    early_exit: bool = True
    cache_prefix: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (
            ("dead", DEAD_POLICIES),
            ("include_pad", (True, False)),
            ("modality", MODALITIES),
            ("batch_tasks", (True, False, None)),
            ("checkpointing", (True, False, None)),
            ("fold", (True, False, None)),
            ("early_exit", (True, False)),
            ("cache_prefix", (True, False)),
        ):
            check_choice(name, getattr(self, name), choices)
        if not isinstance(self.compile, bool) and self.compile not in torch.compiler.list_backends(exclude_tags=()):
            usual = torch.compiler.list_backends()
            raise ValueError(f"compile: expected True, False or one of {usual}, found {self.compile!r}")
        check_family(self.family)


def resolve_options(family: Family, tasks: Sequence[str], options: Mapping[str, Any]) -> NSCOptions:
    """Check ``options`` and fill in the recipe.

    Raises:
        ValueError: naming the option, what was found and what was expected.
    """
    recipe = options.get("recipe")
    recipe = family.recipe if recipe is None else recipe
    check_choice("recipe", recipe, sorted(RECIPES))
    chosen = NSCOptions(**{**RECIPES[recipe], **options, "recipe": recipe})
    chosen.check_tasks(tasks)
    return chosen
