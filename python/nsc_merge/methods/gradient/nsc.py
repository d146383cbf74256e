"""NSC merging: Algorithm 1 of arXiv 2603.26317 on the fused operator."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from nsc_merge.adapters import Adapter
from nsc_merge.adapters.row_spaces import signal_notes
from nsc_merge.calibration.forward_passes import FEW, Calibration, Padding, streams
from nsc_merge.calibration.modality import MODALITIES, filler_of, restriction
from nsc_merge.descent.checkpoint import State, problem_of
from nsc_merge.descent.null_space_objective import Objective
from nsc_merge.descent.optimisation import Optimisation, Settings, by_path, tasks_where
from nsc_merge.descent.options import DescentOptions
from nsc_merge.models.attachment import adapted_linears, attach, presence
from nsc_merge.models.families import Family, family_of, frozen_tower, scored_paths
from nsc_merge.models.folded_linear import should_fold
from nsc_merge.models.forward_contexts import evaluating
from nsc_merge.results.result import MergeResult
from nsc_merge.utils.option_checks import check_choice, check_count, check_plain

logger = logging.getLogger("nsc_merge")

# The paper contradicts itself on vision: Section 4 says AdamW at 1e-3, Section A.3 of the supplement Adam at
# 1e-4.
RECIPES: dict[str, dict[str, Any]] = {
    "vision": {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01, "steps": 100},
    "llm": {"optimizer": "adamw", "lr": 3e-4, "weight_decay": 0.01, "steps": 500},
    "vlm": {"optimizer": "adamw", "lr": 3e-4, "weight_decay": 0.01, "steps": 500},
    "paper-supp": {"optimizer": "adam", "lr": 1e-4, "weight_decay": 0.0, "steps": 100},
}
DEAD_POLICIES = ("init", "tie_previous", "zero")
# Options that say how a run is watched and kept, and nothing about its outcome.
_OF_THE_STATE = ("state_to", "state_every", "state_of", "resume_from")
_BESIDE_THE_PROBLEM = ("progress", *_OF_THE_STATE)


@dataclass(frozen=True)
class NSCOptions(DescentOptions):
    """Options of ``method="nsc"``.

    Attributes:
        optimizer: as all that follow up to ``progress``, in :class:`nsc_merge.descent.options.DescentOptions`.
        lr: see there.
        weight_decay: see there.
        steps: see there.
        schedule: see there.
        early_stop: see there.
        init: see there. Eq. 5 is not convex: the result depends on it.
        seed: see there.
        progress: see there.
        recipe: named defaults for optimizer, lr, weight_decay and steps; the family's own when None.
        dead: what becomes of coefficients that nothing measured depends on: ``"init"`` keeps their initial
            value, ``"tie_previous"`` takes the task's value in the nearest earlier live module of the same
            name (of any name if there is none), ``"zero"`` drops the adapter there.
        score_modules: names of the linears whose input is measured; the family's own when None.
        score_blocks: ``"last_quarter"``, how many last blocks, or block numbers.
        include_pad: average over padding as well, as the paper's public code does.
        modality: for models that read images and text: ``"joint"`` measures both; ``"text"`` takes the images
            and their tokens out of every batch before the model sees it, ``"image"`` the text but for a start
            token in front (Table 9).
        batch_tasks: run the batches of all tasks as one pass where their shapes agree, with a little padding
            where only their lengths differ; None does so where memory allows and pads small batches only, for
            which it is faster. The gradient is the same.
        checkpointing: keep no activations of the blocks before the measured ones but compute them twice.
        fold: add the adapters to the weights of linears that are not measured once per step, instead of applying
            them to every token: half of their arithmetic, for a copy of those weights. The same to rounding. None
            does so on a CPU in float32 and float64, up to 1 GiB of copies.
        compile: ``torch.compile`` the blocks before the measured ones: True, or the name of a backend. The first
            step takes a minute or so longer.
        early_exit: end the forward at the last measured input. Off only to measure what it saves.
        cache_prefix: keep the outputs of a frozen vision tower per batch, up to 2 GiB.
        state_to: file that the state of the optimisation is saved to, every ``state_every`` steps, at the end
            and on Ctrl-C.
        state_every: steps between two saved states.
        state_of: what a saved state belongs to besides the adapters and options, such as hashes of the base model and
            of the calibration data: names to values that JSON can hold. Resuming with others, or without, is refused.
        resume_from: file written through ``state_to``. The run goes on from there as if it had never stopped,
            to the bit, if the iterables of ``calibration`` give the same batches again.
    """

    recipe: str | None = None
    dead: str = "init"
    score_modules: Sequence[str] | None = None
    score_blocks: str | int | Sequence[int] = "last_quarter"
    include_pad: bool = False
    modality: str = "joint"
    batch_tasks: bool | None = None
    checkpointing: bool = False
    fold: bool | None = None
    compile: bool | str = False
    early_exit: bool = True
    cache_prefix: bool = True
    state_to: str | os.PathLike[str] | None = None
    state_every: int = 50
    state_of: Mapping[str, Any] | None = None
    resume_from: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (
            ("dead", DEAD_POLICIES),
            ("include_pad", (True, False)),
            ("modality", MODALITIES),
            ("batch_tasks", (True, False, None)),
            ("checkpointing", (True, False)),
            ("fold", (True, False, None)),
            ("early_exit", (True, False)),
            ("cache_prefix", (True, False)),
        ):
            check_choice(name, getattr(self, name), choices)
        if not isinstance(self.compile, bool) and self.compile not in torch.compiler.list_backends(exclude_tags=()):
            usual = torch.compiler.list_backends()
            raise ValueError(f"compile: expected True, False or one of {usual}, found {self.compile!r}")
        check_count("state_every", self.state_every)
        if self.state_of is not None:
            check_plain("state_of", self.state_of)


def resolve_options(family: Family, tasks: Sequence[str], options: Mapping[str, Any]) -> NSCOptions:
    """Check ``options`` and fill in the recipe.

    Raises:
        ValueError: naming the option, what was found and what was expected.
    """
    recipe = options.get("recipe") or family.recipe
    check_choice("recipe", recipe, sorted(RECIPES))
    chosen = NSCOptions(**{**RECIPES[recipe], **options, "recipe": recipe})
    chosen.check_tasks(tasks)
    return chosen


def merge_nsc(
    model: nn.Module,
    adapters: Mapping[str, Adapter],
    calibration: Calibration | None,
    options: Mapping[str, Any],
) -> MergeResult:
    """Learn one coefficient per task and adapted linear by minimising the mean null-space ratio (Eq. 5).

    Each step runs one batch of every task through the merged model, scores it by that task's own adapter
    only, averages over tokens, modules and tasks, and updates all coefficients once. Forward and backward run
    one batch at a time, so that memory holds one graph, or all at once (``batch_tasks``); tasks that get the
    very same batch object share a pass. Arguments and errors as :func:`nsc_merge.merge`.
    """
    tasks = list(adapters)
    family = family_of(model)
    chosen = resolve_options(family, tasks, options)
    paths = list(adapted_linears(model, adapters))
    scored = scored_paths(family, model, paths, chosen.score_modules, chosen.score_blocks)
    drawn = streams(calibration, tasks)
    for note in signal_notes(adapters, scored):
        logger.warning(note)
    problem, resumed = {}, None
    if chosen.state_to is not None or chosen.resume_from is not None:
        kept = {name: value for name, value in _plain(chosen).items() if name not in _BESIDE_THE_PROBLEM}
        problem = problem_of(adapters, kept, paths, scored, chosen.state_of or {})
    if chosen.resume_from is not None:
        resumed = State.load(chosen.resume_from, problem)
    present = presence(paths, adapters)
    device = next(model.parameters()).device
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        objective_of(model, adapters, family, scored, chosen) as objective,
    ):
        torch.manual_seed(chosen.seed)
        settings = Settings(**{field.name: getattr(chosen, field.name) for field in fields(Settings)})
        loop = Optimisation(objective, tasks, present, list(drawn.values()), settings, problem, resumed)

        def report() -> None:
            dead = tasks_where(loop.dead & present.to(loop.dead.device), paths, tasks)
            if dead:
                logger.info(
                    "coefficients that nothing measured depends on, in %d of %d modules: %s (dead=%r)",
                    len(dead),
                    len(paths),
                    ", ".join(dead),
                    chosen.dead,
                )

        loop.run(report)
        dead = loop.dead.cpu() & present
        lam = _with_policy(chosen.dead, objective.coefficients.flat.detach().cpu(), dead, present, paths)
    return MergeResult(
        method="nsc",
        coefficients=by_path(lam, paths, tasks),
        history=loop.history,
        adapters=dict(adapters),
        options={**{k: v for k, v in _plain(chosen).items() if k not in _OF_THE_STATE}, "scored": scored},
        dead=tasks_where(dead, paths, tasks),
        model=model,
    )


@contextmanager
def objective_of(
    model: nn.Module,
    adapters: Mapping[str, Adapter],
    family: Family,
    scored: Sequence[str],
    options: NSCOptions,
) -> Iterator[Objective]:
    """The objective of a merge, with ``adapters`` attached to ``model`` and evaluation mode for as long.

    Raises:
        ValueError: if a task's adapter touches none of the measured modules ``scored``, if the models of the
            family have only one kind of input for ``options.modality`` to choose from, or if ``options.fold`` asks
            for what the model's dtype cannot hold.
    """
    tasks = list(adapters)
    touched = dict(zip(scored, presence(scored, adapters).tolist(), strict=True))
    counts = [sum(column) for column in zip(*touched.values(), strict=True)]
    unscored = [task for task, count in zip(tasks, counts, strict=True) if not count]
    if unscored:
        names = [{path.rsplit(".", 1)[-1] for path in adapter.factors} for adapter in adapters.values()]
        raise ValueError(
            f"score_modules: the adapters of {unscored} touch none of the measured modules {list(scored)}; expected "
            f"modules that all adapters touch, found {sorted(set.intersection(*names)) or 'none'}"
        )
    shares = {
        path: [is_in / count for is_in, count in zip(row, counts, strict=True)]
        for path, row in touched.items()
    }
    restrict = restriction(options.modality, family, model)
    padding = None
    if family.tokens is not None and family.mask is not None:
        most = FEW if options.batch_tasks is None else None
        padding = Padding(family.tokens, family.mask, filler_of(model), most)
    linears = adapted_linears(model, adapters)
    fold = should_fold(options.fold, [linear.weight for path, linear in linears.items() if path not in scored])
    with evaluating(model), attach(model, adapters, options.init) as merged:
        tower = frozen_tower(family, model, merged) if options.cache_prefix else None
        with Objective(
            model,
            merged,
            shares,
            mask=None if options.include_pad else family.mask,
            padding=padding,
            restrict=restrict,
            tower=tower,
            block=family.block,
            batch_tasks=options.batch_tasks,
            checkpointing=options.checkpointing,
            fold=fold,
            compiler="inductor" if options.compile is True else options.compile or None,
            early_exit=options.early_exit,
        ) as objective:
            yield objective


def _plain(options: NSCOptions) -> dict[str, Any]:
    """As values that JSON and YAML can hold."""
    return {
        name: os.fspath(value) if isinstance(value, os.PathLike) else value
        for name, value in asdict(options).items()
    }


def _with_policy(policy: str, lam: Tensor, dead: Tensor, present: Tensor, paths: Sequence[str]) -> Tensor:
    """``lam [modules, K]`` with ``policy`` applied to the dead ones; the objective does not change."""
    lam = lam.clone()
    if policy == "zero":
        lam[dead] = 0
    elif policy == "tie_previous":
        names = [path.rsplit(".", 1)[-1] for path in paths]
        for row, task in dead.nonzero().tolist():
            live = [i for i in range(row) if present[i, task] and not dead[i, task]]
            same = [i for i in live if names[i] == names[row]]
            if live:
                lam[row, task] = lam[(same or live)[-1], task]
    return lam
