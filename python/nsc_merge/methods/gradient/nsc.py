"""NSC merging: Algorithm 1 of arXiv 2603.26317 on the fused operator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nsc_merge.adapters import Adapter
from nsc_merge.adapters.algebra.row_spaces import signal_notes
from nsc_merge.calibration.batches import streams
from nsc_merge.calibration.forward_passes import FEW, Padding
from nsc_merge.calibration.modality import filler_of, restriction
from nsc_merge.descent.checkpoint import State, problem_of
from nsc_merge.descent.coefficients import by_path, tasks_where
from nsc_merge.descent.null_space_objective import Objective
from nsc_merge.descent.optimisation import Optimisation
from nsc_merge.descent.options import BESIDE_THE_PROBLEM, OF_THE_STATE
from nsc_merge.methods.gradient.nsc_options import RECIPES, NSCOptions, resolve_options
from nsc_merge.methods.method import Method, Problem
from nsc_merge.methods.task_outputs import plain_options
from nsc_merge.models.attachment import adapted_linears, attach, measurable, presence
from nsc_merge.models.bases.quantised import check_gradients, is_quantised
from nsc_merge.models.bases.stored_weights import input_device
from nsc_merge.models.families import FAMILIES, Family, family_of, frozen_tower, scored_paths
from nsc_merge.models.forward_contexts import evaluating
from nsc_merge.models.merged.folded_linear import should_fold
from nsc_merge.models.merged.whole import Site
from nsc_merge.results.result import MergeResult
from nsc_merge.utils.errors import logger


def merge_nsc(problem: Problem, given: Mapping[str, Any]) -> MergeResult:
    """Learn one coefficient per task and adapted linear by minimising the mean null-space ratio (Eq. 5).

    Each step runs one batch of every task through the merged model, scores it by that task's own adapter
    only, averages over tokens, modules and tasks, and updates all coefficients once. Forward and backward run
    one batch at a time, so that memory holds one graph, or all at once (``batch_tasks``); tasks that get the
    very same batch object share a pass. Errors as :func:`nsc_merge.merge`.
    """
    model, adapters, tasks = problem.model, problem.adapters, problem.tasks
    linears = adapted_linears(model, adapters)
    paths = list(linears)
    measured = measurable(linears, adapters)
    family = family_of(model, measured, given.get("family"))
    chosen = resolve_options(family, tasks, given)
    scored = scored_paths(family, model, measured, chosen.score_modules, chosen.score_blocks)
    drawn = streams(problem.calibration, tasks)
    for note in signal_notes(adapters, scored):
        logger.warning(note)
    state, resumed = {}, None
    if chosen.state_to is not None or chosen.resume_from is not None:
        kept = {name: value for name, value in plain_options(chosen).items() if name not in BESIDE_THE_PROBLEM}
        if kept["family"] is None:
            # States of releases without the option go on.
            del kept["family"]
        state = problem_of(adapters, kept, paths, scored, chosen.state_of or {})
    if chosen.resume_from is not None:
        resumed = State.load(chosen.resume_from, state)
    present = presence(paths, adapters)
    device = input_device(model)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        objective_of(model, adapters, family, scored, chosen) as objective,
    ):
        torch.manual_seed(chosen.seed)
        loop = Optimisation(objective, tasks, present, list(drawn.values()), chosen, state, resumed)

        def report() -> None:
            dead = tasks_where(loop.dead & present.to(loop.dead.device), paths, tasks)
            if dead:
                logger.info(
                    "coefficients that nothing measured depends on, in %d of %d modules: %s (so far; dead=%r)",
                    len(dead),
                    len(paths),
                    ", ".join(dead),
                    chosen.dead,
                )

        loop.run(report)
        moved = loop.comparison()
        dead = loop.dead.cpu() & present
        lam = _with_policy(chosen.dead, objective.coefficients.flat.detach().cpu(), dead, present, paths)
    return MergeResult(
        method="nsc",
        coefficients=by_path(lam, paths, tasks),
        history=loop.history,
        adapters=adapters,
        options={**{k: v for k, v in plain_options(chosen).items() if k not in OF_THE_STATE}, "scored": scored},
        dead=tasks_where(dead, paths, tasks),
        model=model,
        objective=moved,
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
            "names (score_modules) and blocks (score_blocks) of which every adapter touches some, found names that all "
            f"adapters touch somewhere: {sorted(set.intersection(*names)) or 'none'}"
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
    foldable = {path: linear for path, linear in linears.items() if not isinstance(linear, Site)}
    plain = {path: linear for path, linear in foldable.items() if not is_quantised(linear)}
    fold = should_fold(options.fold, [linear.weight for path, linear in plain.items() if path not in scored])
    with evaluating(model), attach(model, adapters, options.init) as merged:
        check_gradients(model)
        tower = frozen_tower(family, model, merged) if options.cache_prefix else None
        with Objective(
            model,
            merged,
            shares,
            mask=None if options.include_pad else family.mask,
            padding=padding,
            restrict=restrict,
            tower=tower,
            unmasked=family.unmasked,
            block=family.block,
            batch_tasks=options.batch_tasks,
            checkpointing=options.checkpointing,
            fold=fold,
            compiler="inductor" if options.compile is True else options.compile or None,
            early_exit=options.early_exit,
        ) as objective:
            yield objective


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


def _resolve(model: nn.Module | None, tasks: Sequence[str], given: Mapping[str, Any]) -> NSCOptions:
    # The family only chooses defaults: to check what was given, any will do.
    family = FAMILIES[0] if model is None else family_of(model, None, given.get("family"))
    return resolve_options(family, tasks, given)


METHODS = (
    Method(
        "nsc",
        "learns a coefficient per task and module by minimising the null-space ratio (no labels)",
        "NSC Merging, arXiv 2603.26317",
        NSCOptions,
        merge_nsc,
        needs=frozenset({"data", "gradients"}),
        gives="coefficients",
        about="The coefficients were found by null-space compression ([arXiv 2603.26317]"
        "(https://arxiv.org/abs/2603.26317)) on unlabelled inputs: no labels and no task metric were used. "
        "All settings, versions and hashes of the inputs are in `recipe.yaml`.",
        recipes=RECIPES,
        resolve=_resolve,
        weighted="init",
    ),
)
