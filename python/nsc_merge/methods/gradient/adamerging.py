"""AdaMerging (arXiv 2310.02575): coefficients that minimise the entropy of the tasks' predictions, on factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nsc_merge.calibration.batches import Batch
from nsc_merge.calibration.forward_passes import Pass
from nsc_merge.descent.coefficients import BoundedCoefficients
from nsc_merge.descent.mean_loss import Loss, backward_of
from nsc_merge.descent.options import SharedDescentOptions
from nsc_merge.methods.gradient.learned_coefficients import descend
from nsc_merge.methods.gradient.own_answers import Growing, Writing, writing_after
from nsc_merge.methods.likelihoods import check_classes, check_one_class
from nsc_merge.methods.method import Method, Problem
from nsc_merge.methods.shared_options import fill
from nsc_merge.methods.task_outputs import (
    Outputs,
    check_outputs,
    last_token,
    mask_of_outputs,
    output_of,
    predicts_next,
    real_positions,
    share_of,
    with_heads,
)
from nsc_merge.models.families import find_family
from nsc_merge.models.forward_contexts import shared_forward
from nsc_merge.processes.group import current
from nsc_merge.results.result import MergeResult
from nsc_merge.utils.option_checks import check_choice, check_count

TOKENS = ("class", "single", "full")
PRESETS: dict[str, dict[str, Any]] = {
    "nsc": {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01, "steps": 100, "init": 0.4, "clamp": ()},
    "original": {"optimizer": "adam", "lr": 1e-3, "weight_decay": 0.0, "steps": 500, "init": 0.3, "clamp": (0.0, 1.0)},
    "fusion_bench": {"optimizer": "adam", "lr": 1e-3, "weight_decay": 0.0, "steps": 1000, "init": 0.3, "clamp": ()},
}


@dataclass(frozen=True)
class AdaMergingOptions(SharedDescentOptions):
    """Options of ``method="adamerging"``; those that are None are the preset's.

    Attributes:
        preset: ``"nsc"`` (as compared with in the NSC paper), ``"original"`` (the authors' code, whose steps take two
            batches of 16 of each task: as many samples as one of 32) or ``"fusion_bench"``.
        optimizer: as all that follow but the last three, in :class:`nsc_merge.descent.options.SharedDescentOptions`.
        lr: see there.
        weight_decay: see there.
        steps: see there.
        schedule: see there.
        early_stop: see there.
        init: see there.
        share: see there; the authors call them layer-wise and task-wise.
        warm_up: see there.
        clamp: see there; ``()`` for none.
        seed: see there.
        progress: see there.
        state_to: see there.
        state_every: see there.
        state_of: see there.
        resume_from: see there.
        outputs: task -> function of model and batch that gives its logits ``[N, C]``, or ``[N, ..., C]`` with classes
            last; the model's own logits for every task when None, with the head that its adapter brought. A task
            without logits, such as a regression, is left out of the mapping: it has no entropy, and its coefficients
            follow the other tasks' entropies.
        tokens: which predictions count: all that the output holds but those at padding (``"class"``), the next token
            after the prompt (``"single"``), or greedily decoded tokens (``"full"``). None takes ``"single"`` where
            the model predicts the next token and no ``outputs`` were given, and ``"class"`` otherwise.
        new_tokens: how many tokens ``"full"`` decodes at most. Each is a forward and a backward of its own.
    """

    preset: str = "nsc"
    optimizer: str | None = None  # type: ignore[assignment]
    lr: float | None = None  # type: ignore[assignment]
    weight_decay: float | None = None  # type: ignore[assignment]
    steps: int | None = None  # type: ignore[assignment]
    init: float | Mapping[str, float] | None = None  # type: ignore[assignment]
    outputs: Outputs | None = None
    tokens: str | None = None
    new_tokens: int = 128

    def __post_init__(self) -> None:
        fill(self, PRESETS)
        # What else is no pair of bounds is refused with the other options.
        if isinstance(self.clamp, tuple | list) and not self.clamp:
            object.__setattr__(self, "clamp", None)
        super().__post_init__()
        check_outputs(self.outputs)
        check_choice("tokens", self.tokens, (*TOKENS, None))
        check_count("new_tokens", self.new_tokens)


def entropy(logits: Tensor) -> Tensor:
    """Of the distributions ``softmax(logits [..., C])``, ``[...]``."""
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def _run(problem: Problem, given: Mapping[str, Any]) -> MergeResult:
    options = AdaMergingOptions(**given)
    model, tasks = problem.model, problem.tasks
    if not options.outputs:
        check_one_class(model, tasks, "outputs", "method 'distill' with likelihood 'bernoulli'")
    check_outputs(options.outputs, tasks)
    family = find_family(model)
    # Padding is told wherever it can be, also where every token is labelled, as in BERT.
    padding = mask_of_outputs(family)
    writing = None
    if family and family.causal and family.tokens and padding:
        writing = writing_after(model, family.tokens, padding)
    if options.tokens in ("single", "full") and writing is None:
        raise ValueError(
            f"tokens: {type(model).__name__} has no tokens to predict; expected 'class', found {options.tokens!r}"
        )
    if options.tokens == "full" and options.outputs is not None:
        raise ValueError("tokens: 'full' decodes with the model's own logits; expected no outputs beside it")
    tokens = options.tokens
    if tokens is None and (options.outputs is not None or not predicts_next(model, family)):
        tokens = "class"
    counted = [task for task in tasks if options.outputs is None or task in options.outputs]
    # Of tasks that are left out nobody asks for an output.
    adapters = {task: problem.adapters[task] for task in counted}
    heads = with_heads(options.outputs, adapters, model)
    if not counted:
        raise ValueError("outputs: expected a function for at least one task, found none")

    def losses(coefficients: BoundedCoefficients) -> Loss:
        def backward(one: Pass) -> Tensor:
            batch, numbers = one.inputs, one.tasks[0]
            # Tasks that do not count have no loss, rather than one of 0.
            found = torch.full((len(numbers),), math.nan, dtype=torch.float32, device="cpu")
            here = [place for place, number in enumerate(numbers) if tasks[number] in counted]
            if here and options.tokens == "full":
                assert writing is not None
                weight, most = len(here) / len(tasks), options.new_tokens
                found[here] = one.share * _decoded(model, batch, writing, most, coefficients, weight * one.share)
            elif here:
                values = []
                with shared_forward(model):
                    for place in here if heads else here[:1]:
                        task = tasks[numbers[place]]
                        output = output_of(heads, task, model, batch)
                        check_classes(output, task, "outputs", "functions for tasks with classes, and none for others")
                        values.append(_mean_entropy(model, output, one, padding, tokens))
                # Without functions of their own, tasks that share a batch share its logits.
                values = values if heads else values * len(here)
                if torch.is_grad_enabled():
                    backward_of(torch.stack(values).sum() / len(tasks))
                found[here] = torch.stack(values).detach().float().cpu()
            return found

        return Loss(backward)

    return descend("adamerging", problem, options, losses, label="AdaMerging", counted=counted)


def _mean_entropy(model: nn.Module, output: Tensor, one: Pass, name: str | None, tokens: str | None) -> Tensor:
    """Over the predictions that ``tokens`` counts; None counts ``"single"`` where the output predicts every next
    one. Of a process's part of a pass, what adds up to the mean over the whole. ``name`` is the mask's.
    """
    mask = one.inputs.get(name) if name else None
    real = real_positions(model, output, mask)
    if tokens == "single" or (tokens is None and output.dim() == 3):
        if output.dim() != 3 or (mask is not None and real is None):
            wanted = "[N, T, C]" if mask is None else f"[N, T, C] that fit the mask {list(mask.shape)}"
            raise ValueError(f"tokens: 'single' needs logits {wanted}, found {list(output.shape)}")
        return entropy(last_token(output, real)).mean() * one.share
    values = entropy(output)
    mean = values.mean() if real is None else (values * real).sum() / real.sum().clamp(min=1)
    return mean * share_of(model, one, real, name)


def _decoded(
    model: nn.Module, batch: Batch, writing: Writing, most: int, coefficients: BoundedCoefficients, weight: float
) -> float:
    """Mean entropy per prompt, summed over greedily decoded tokens; adds the gradients token by token, so that memory
    holds one forward; none where gradients are off.
    """
    rows = Growing(writing, batch, most)
    total = 0.0
    for _ in range(most):
        coefficients.spread()
        logits = rows.following(model(**rows.inputs()).logits)
        value = (entropy(logits) * ~rows.ended).sum() / len(rows.ended)
        if torch.is_grad_enabled():
            backward_of(weight * value)
        total += float(value.detach())
        rows.append(logits.detach().argmax(-1))
        # Until the answers of all processes have ended.
        if not current().any(not bool(rows.ended.all())):
            break
    return total


METHODS = (
    Method(
        "adamerging",
        "learns coefficients by minimising the entropy of the tasks' predictions (no labels)",
        "AdaMerging, Yang et al. 2023, arXiv 2310.02575",
        AdaMergingOptions,
        _run,
        needs=frozenset({"data", "gradients", "outputs"}),
        gives="coefficients",
    ),
)
