"""NSC merging: Algorithm 1 of arXiv 2603.26317 on the fused operator."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from nsc_kernels import null_space_ratio
from nsc_merge.adapters import Adapter
from nsc_merge.attachment import MeasuredLoRALinear, adapted_linears, attach
from nsc_merge.families import Family, family_of, scored_paths
from nsc_merge.progress import Progress
from nsc_merge.result import MergeResult

Batch = Mapping[str, Tensor]
Calibration = Mapping[str, Iterable[Batch]]

# The paper contradicts itself on vision: Section 4 says AdamW at 1e-3, Section A.3 of the supplement Adam at
# 1e-4.
RECIPES: dict[str, dict[str, Any]] = {
    "vision": {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01, "steps": 100},
    "paper-supp": {"optimizer": "adam", "lr": 1e-4, "weight_decay": 0.0, "steps": 100},
}


@dataclass(frozen=True)
class NSCOptions:
    """Options of ``method="nsc"``.

    Attributes:
        recipe: named defaults for optimizer, lr, weight_decay and steps; the family's own when None.
        optimizer: ``"adamw"`` or ``"adam"``.
        lr: learning rate. Adam moves a coefficient by at most about ``steps * lr``.
        weight_decay: of the optimizer.
        steps: optimisation steps; each takes one batch of every task.
        init: initial coefficient, one for all tasks or one per task. Eq. 5 is not convex: the result depends
            on it.
        score_modules: names of the linears whose input is measured; the family's own when None.
        score_blocks: ``"last_quarter"``, how many last blocks, or block numbers.
        seed: of torch's global generator while calibration batches are drawn; restored afterwards.
        progress: True draws a bar, False prints lines, None decides by whether standard error is a terminal.
    """

    recipe: str | None = None
    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.01
    steps: int = 100
    init: float | Mapping[str, float] = 0.4
    score_modules: Sequence[str] | None = None
    score_blocks: str | int | Sequence[int] = "last_quarter"
    seed: int = 0
    progress: bool | None = None


def resolve_options(family: Family, tasks: Sequence[str], options: Mapping[str, Any]) -> NSCOptions:
    """Check ``options`` and fill in the recipe.

    Raises:
        ValueError: naming the option, what was found and what was expected.
    """
    known = [field.name for field in fields(NSCOptions)]
    for name in options:
        if name not in known:
            raise ValueError(f"{name}: not an option of method 'nsc' (options: {', '.join(known)})")
    recipe = options.get("recipe") or family.recipe
    if recipe not in RECIPES:
        raise ValueError(f"recipe: expected one of {sorted(RECIPES)}, found {recipe!r}")
    chosen = replace(NSCOptions(**{**RECIPES[recipe], **options}), recipe=recipe)
    if chosen.optimizer not in ("adamw", "adam"):
        raise ValueError(f"optimizer: expected 'adamw' or 'adam', found {chosen.optimizer!r}")
    if isinstance(chosen.steps, bool) or not isinstance(chosen.steps, int) or chosen.steps < 1:
        raise ValueError(f"steps: expected a whole number of at least 1, found {chosen.steps!r}")
    for name, least in (("lr", 0.0), ("weight_decay", 0.0)):
        value = getattr(chosen, name)
        if not isinstance(value, int | float) or not least <= value < float("inf"):
            raise ValueError(f"{name}: expected a finite number of at least {least:g}, found {value!r}")
    if isinstance(chosen.init, Mapping) and set(chosen.init) != set(tasks):
        raise ValueError(f"init: expected one value for each of {list(tasks)}, found {sorted(chosen.init)}")
    for value in chosen.init.values() if isinstance(chosen.init, Mapping) else [chosen.init]:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"init: expected finite numbers, found {value!r}")
    if isinstance(chosen.score_modules, str):
        raise ValueError(
            f"score_modules: expected a list of names, found the string {chosen.score_modules!r}"
        )
    return chosen


class _Measured(Exception):
    """No error but a signal, raised inside the forward once everything needed has been measured."""


class _Meter:
    """Measures null-space ratios during a forward and ends the forward after the last measurement.

    Nothing past the last measured input enters the objective, so the rest of that block, the final norm and
    the heads are never run. Which measured linear comes last is seen in the first forward, which runs to the
    end.
    """

    def __init__(self, modules: Mapping[str, MeasuredLoRALinear], scored: Sequence[str]) -> None:
        self._modules, self._scored = modules, scored
        self._last: str | None = None
        self._columns: list[int] = []
        self._ratios: dict[str, Tensor] = {}

    def __enter__(self) -> _Meter:
        for path in self._scored:
            self._modules[path].measure = self._record
        return self

    def __exit__(self, *error: object) -> None:
        for path in self._scored:
            self._modules[path].measure = None

    def ratios(self, model: nn.Module, batch: Batch, columns: list[int]) -> dict[str, Tensor]:
        """Run ``batch``; per measured path, Eq. 6 for the adapters ``columns``, averaged over tokens."""
        self._columns, self._ratios = columns, {}
        with suppress(_Measured):
            model(**batch)
        missed = set(self._scored) - set(self._ratios)
        if missed:
            raise RuntimeError(
                f"calibration: the forward never reached {sorted(missed)}, which are to be measured"
            )
        self._last = next(reversed(self._ratios))
        return self._ratios

    def _record(self, path: str, quad: Tensor, sqnorm: Tensor) -> None:
        ratio = null_space_ratio(quad[..., self._columns], sqnorm)
        self._ratios[path] = ratio.flatten(0, -2).mean(0)
        if path == self._last:
            raise _Measured


def merge_nsc(
    model: nn.Module,
    adapters: Mapping[str, Adapter],
    calibration: Calibration | None,
    options: Mapping[str, Any],
) -> MergeResult:
    """Learn one coefficient per task and adapted linear by minimising the mean null-space ratio (Eq. 5).

    Each step runs one batch of every task through the merged model, scores it by that task's own adapter
    only, averages over tokens, modules and tasks, and updates all coefficients once. Forward and backward run
    one batch at a time, so that memory holds one graph; tasks that get the very same batch object share a
    pass. Arguments and errors as :func:`nsc_merge.merge`.
    """
    tasks = list(adapters)
    family = family_of(model)
    chosen = resolve_options(family, tasks, options)
    paths = list(adapted_linears(model, adapters))
    scored = scored_paths(family, model, paths, chosen.score_modules, chosen.score_blocks)
    counts = {task: [path for path in scored if path in adapters[task].factors] for task in tasks}
    unscored = [task for task in tasks if not counts[task]]
    if unscored:
        raise ValueError(
            f"score_modules: the adapters of {unscored} touch none of the measured modules {scored}"
        )
    streams = _streams(calibration, tasks)

    device = next(model.parameters()).device
    history: list[dict[str, Any]] = []
    training = model.training
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        attach(model, adapters, chosen.init) as merged,
        _Meter(merged, scored) as meter,
    ):
        torch.manual_seed(chosen.seed)
        model.eval()
        try:
            lams = {path: module.lam for path, module in merged.items()}
            start = {path: lam.detach().clone() for path, lam in lams.items()}
            present = torch.tensor(
                [path in adapters[task].factors for path in lams for task in tasks], device=device
            )
            kind = torch.optim.AdamW if chosen.optimizer == "adamw" else torch.optim.Adam
            optimiser = kind(list(lams.values()), lr=chosen.lr, weight_decay=chosen.weight_decay)
            dead: dict[str, Tensor] = {}
            with Progress("NSC merging", chosen.steps, chosen.progress) as bar:
                for step in range(chosen.steps):
                    began = time.perf_counter()
                    optimiser.zero_grad()
                    ratios = _accumulate(model, meter, streams, counts, device)
                    _refuse_non_finite(step, lams.values())
                    if step == 0:
                        dead = {path: _no_gradient(lam) for path, lam in lams.items()}
                    entry = _entry(step, tasks, ratios, torch.cat(list(lams.values())).detach()[present])
                    optimiser.step()
                    _restore(lams, start, dead)
                    history.append({**entry, "seconds": time.perf_counter() - began})
                    bar.update(
                        ratio=f"{entry['objective']:.4f}",
                        lam=f"{entry['lambda_min']:.2f}..{entry['lambda_max']:.2f}",
                    )
            coefficients = {
                path: dict(zip(tasks, lam.detach().tolist(), strict=True)) for path, lam in lams.items()
            }
        finally:
            model.train(training)
    return MergeResult(
        method="nsc",
        coefficients=coefficients,
        history=history,
        adapters=dict(adapters),
        options={**asdict(chosen), "scored": scored},
        dead=_named(dead, adapters, tasks),
        model=model,
    )


def _accumulate(
    model: nn.Module,
    meter: _Meter,
    streams: Mapping[str, Iterator[Batch]],
    counts: Mapping[str, Sequence[str]],
    device: torch.device,
) -> dict[str, Tensor]:
    """Add the gradient of Eq. 5 on the next batches to the coefficients; returns Eq. 4 per task, detached."""
    tasks = list(streams)
    ratios: dict[str, Tensor] = {}
    for batch, sharing in _by_batch(streams):
        inputs = {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()
        }
        measured = meter.ratios(model, inputs, [tasks.index(task) for task in sharing])
        own = {
            task: torch.stack([measured[path][column] for path in counts[task]]).mean()
            for column, task in enumerate(sharing)
        }
        (torch.stack(list(own.values())).sum() / len(tasks)).backward()
        ratios.update({task: ratio.detach() for task, ratio in own.items()})
    return ratios


def _refuse_non_finite(step: int, lams: Iterable[Tensor]) -> None:
    gradients = [lam.grad for lam in lams if lam.grad is not None]
    if gradients and not torch.cat(gradients).isfinite().all():
        raise RuntimeError(
            f"calibration: the gradient of step {step} is not finite; do the batches or the model hold "
            "NaN or infinite values?"
        )


def _streams(calibration: Calibration | None, tasks: Sequence[str]) -> dict[str, Iterator[Batch]]:
    if not isinstance(calibration, Mapping) or set(calibration) != set(tasks):
        found = sorted(calibration) if isinstance(calibration, Mapping) else type(calibration).__name__
        raise ValueError(f"calibration: expected batches for each of {list(tasks)}, found {found}")
    return {task: _endless(task, calibration[task]) for task in tasks}


def _by_batch(streams: Mapping[str, Iterator[Batch]]) -> list[tuple[Batch, list[str]]]:
    """The next batch of every task, with the tasks that share it: the same object, not equal values."""
    drawn = [(next(stream), task) for task, stream in streams.items()]
    shared: dict[int, tuple[Batch, list[str]]] = {}
    for batch, task in drawn:
        shared.setdefault(id(batch), (batch, []))[1].append(task)
    return list(shared.values())


def _endless(task: str, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches in order, again and again; an iterator, which cannot be restarted, is remembered."""
    once = isinstance(batches, Iterator)
    seen: list[Batch] = []
    while True:
        empty = True
        for batch in seen if once and seen else batches:
            if not isinstance(batch, Mapping) or not batch:
                raise ValueError(
                    f"calibration[{task!r}]: expected dictionaries of model inputs, "
                    f"found {type(batch).__name__}"
                )
            empty = False
            if once:
                seen.append(batch)
            yield batch
        if empty:
            raise ValueError(f"calibration[{task!r}]: expected at least one batch, found none")


def _no_gradient(lam: Tensor) -> Tensor:
    """``[K]`` bool: coefficients whose gradient is exactly zero because nothing measured depends on them."""
    return torch.ones_like(lam, dtype=torch.bool) if lam.grad is None else lam.grad == 0


@torch.no_grad()
def _restore(lams: Mapping[str, Tensor], start: Mapping[str, Tensor], dead: Mapping[str, Tensor]) -> None:
    """Undo what weight decay does to coefficients that the objective does not see."""
    for path, lam in lams.items():
        lam.copy_(torch.where(dead[path], start[path], lam))


def _entry(step: int, tasks: Sequence[str], ratios: Mapping[str, Tensor], lam: Tensor) -> dict[str, Any]:
    omega = dict(zip(tasks, torch.stack([ratios[task] for task in tasks]).tolist(), strict=True))
    objective = sum(omega.values()) / len(omega)
    return {
        "step": step,
        "objective": objective,
        "omega": omega,
        "lambda_min": lam.min().item(),
        "lambda_mean": lam.mean().item(),
        "lambda_max": lam.max().item(),
    }


def _named(
    dead: Mapping[str, Tensor], adapters: Mapping[str, Adapter], tasks: Sequence[str]
) -> dict[str, list[str]]:
    named = {
        path: [
            task
            for task, is_dead in zip(tasks, mask.tolist(), strict=True)
            if is_dead and path in adapters[task].factors
        ]
        for path, mask in dead.items()
    }
    return {path: found for path, found in named.items() if found}
