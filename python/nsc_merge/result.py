"""What a merge returns: coefficients or factors, and the merged weights that follow from them."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nsc_merge.adapters import Adapter, Factor
from nsc_merge.attachment import merged_linears


@dataclass(frozen=True)
class MergeResult:
    """A merged update, with the adapters that it was made of.

    A method gives one of three things: coefficients, one per task and module; factors, one update per module; or,
    where every task keeps an update of its own, factors per task, of which :meth:`for_task` takes one.

    Attributes:
        method: what found it.
        coefficients: module path in the base model -> task -> coefficient; 0 where a task's adapter is
            absent. Empty if the method gives factors.
        history: one entry per step: ``step``, ``objective`` (Eq. 5), ``omega`` (per task), ``lambda_min``,
            ``lambda_mean``, ``lambda_max`` and ``seconds``. All values are from before the step's update.
        adapters: task -> adapter, as fitted to the model by :func:`nsc_merge.remap.fit`.
        options: resolved options of the method.
        dead: module path -> tasks whose coefficient cannot receive a gradient and therefore kept its initial
            value.
        model: the base model, unchanged.
        inputs: further arguments of the merge, as they go into ``recipe.yaml``.
        factors: module path -> the merged update, low-rank or dense, of methods that give no coefficients.
        per_task: task -> module path -> update, of methods that give every task its own.
        found_after: how often :meth:`apply` had changed ``model`` when the result was made.
    """

    method: str
    coefficients: dict[str, dict[str, float]]
    history: list[dict[str, Any]]
    adapters: dict[str, Adapter]
    options: dict[str, Any]
    dead: dict[str, list[str]]
    model: nn.Module = field(repr=False)
    inputs: dict[str, Any] = field(default_factory=dict)
    factors: Mapping[str, Factor] = field(default_factory=dict, repr=False)
    per_task: Mapping[str, Mapping[str, Factor]] = field(default_factory=dict, repr=False)
    found_after: int | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.found_after is None:
            object.__setattr__(self, "found_after", _applications(self.model))

    @property
    def tasks(self) -> list[str]:
        return list(self.adapters)

    @property
    def paths(self) -> list[str]:
        """Every linear that the merge changes, by its path in the base model."""
        return list(dict.fromkeys(path for adapter in self.adapters.values() for path in adapter.factors))

    @property
    def notes(self) -> list[str]:
        """What a person should know about the objective that found the coefficients, a sentence each; see
        :func:`nsc_merge.signal.signal_notes`.
        """
        from nsc_merge.signal import signal_notes

        return signal_notes(self.adapters, self.options.get("scored", ()))

    def terms(self, path: str) -> Iterator[tuple[float, Factor]]:
        """What the merged update of a linear is the sum of: coefficient and update of every adapter that touches it,
        or 1 and the method's own update.

        Raises:
            ValueError: if every task has an update of its own.
        """
        if self.per_task:
            raise ValueError(
                f"method {self.method!r} gives every task its own update: take one with for_task, found none "
                f"taken (tasks: {', '.join(self.per_task)})"
            )
        if self.factors:
            yield 1.0, self.factors[path]
            return
        for task, adapter in self.adapters.items():
            factor = adapter.factors.get(path)
            if factor is not None:
                yield self.coefficients[path][task] if factor.fixed is None else factor.fixed, factor

    def for_task(self, task: str) -> MergeResult:
        """The result that serves one task: itself, unless every task has an update of its own.

        Raises:
            ValueError: if there is no such task.
        """
        if task not in self.adapters:
            raise ValueError(f"task: expected one of {self.tasks}, found {task!r}")
        return replace(self, factors=self.per_task[task], per_task={}) if self.per_task else self

    def scaled(self, scale: float) -> MergeResult:
        """This result with its whole update multiplied by ``scale``, but for what has a fixed coefficient.

        Raises:
            ValueError: if ``scale`` is not finite.
        """
        if not math.isfinite(scale):
            raise ValueError(f"scale: expected a finite number, found {scale!r}")

        def times(factors: Mapping[str, Factor]) -> dict[str, Factor]:
            return {
                path: factor if self._is_fixed(path) else replace(factor, scaling=scale * factor.scaling)
                for path, factor in factors.items()
            }

        options = dict(self.options)
        if isinstance(options.get("scale"), Mapping):
            options["scale"] = {task: scale * value for task, value in options["scale"].items()}
        elif "scale" in options:
            options["scale"] = scale * options["scale"]
        return replace(
            self,
            coefficients={
                path: {task: scale * value for task, value in row.items()}
                for path, row in self.coefficients.items()
            },
            factors=times(self.factors),
            per_task={task: times(factors) for task, factors in self.per_task.items()},
            options=options,
        )

    def _is_fixed(self, path: str) -> bool:
        held = [adapter.factors[path] for adapter in self.adapters.values() if path in adapter.factors]
        return any(factor.fixed is not None for factor in held)

    def is_whole(self, path: str) -> bool:
        """Whether some adapter trained the linear in full, and not by low-rank factors."""
        return any(
            adapter.factors[path].dense is not None
            for adapter in self.adapters.values()
            if path in adapter.factors
        )

    def delta(self, path: str) -> Tensor:
        """The merged update of one linear, ``[d_out, d_in]`` in float64: ``sum_k lam_k s_k B_k A_k`` where there are
        coefficients.
        """
        return torch.stack([lam * factor.delta() for lam, factor in self.terms(path)]).sum(0)

    def bias_delta(self, path: str) -> Tensor | None:
        """The merged update ``sum_k lam_k s_k b_k`` of a linear's bias, ``[d_out]`` in float64, if any."""
        updates = [(lam, factor.bias_delta()) for lam, factor in self.terms(path)]
        known = [lam * update for lam, update in updates if update is not None]
        return torch.stack(known).sum(0) if known else None

    def merged(self, model: nn.Module, paths: Collection[str] | None = None) -> dict[str, Tensor]:
        """The merged parameters of ``model``, by parameter path; each sum is formed in float64, rounded once.

        Args:
            model: the base model, or another of the same shapes.
            paths: the linears to merge, all by default.

        Raises:
            ValueError: if a module is missing or has another shape, if there is no bias to hold the update of
                one, or if a merged weight is tied to another parameter, which would change with it.
            TypeError: if a module is not an ``nn.Linear``.
        """
        linears = {
            path: linear
            for path, linear in merged_linears(model, self.adapters).items()
            if paths is None or path in paths
        }
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        for path, linear in linears.items():
            tied = names[id(linear.weight)]
            if len(tied) > 1:
                raise ValueError(
                    f"{path}: its weight is shared by {tied}, so it cannot be merged into; use format 'lora'"
                )
            if linear.bias is None and self.bias_delta(path) is not None:
                raise ValueError(
                    f"{path}: the adapters have a bias (lora_bias) and the linear has none to merge it into; "
                    "use format 'lora'"
                )
        merged = {}
        for path, linear in linears.items():
            merged[f"{path}.weight"] = _plus(linear.weight, self.delta(path))
            bias = self.bias_delta(path)
            if bias is not None:
                merged[f"{path}.bias"] = _plus(linear.bias, bias)
        return merged

    def apply(self, model: nn.Module) -> nn.Module:
        """Add the merged updates to the weights of ``model``, in place, and return it.

        Calling it twice adds twice. :attr:`model` itself is then no longer the base, so that :meth:`save` can no longer
        write what needs it; a copy can be changed freely.

        Raises:
            TypeError, ValueError: as :meth:`merged`, before any weight changes.
        """
        merged = self.merged(model)
        setattr(model, _APPLICATIONS, _applications(model) + 1)
        with torch.no_grad():
            for name, value in merged.items():
                model.get_parameter(name).copy_(value)
        return model

    def check_base(self) -> None:
        """Refuse a base model that :meth:`apply`, of this result or of another, changed since the result was made.

        Raises:
            ValueError: saying what to do instead.
        """
        if _applications(self.model) != self.found_after:
            raise ValueError(
                "model: apply has changed it since this merge was made, so that the base is gone and the update would "
                "be added twice; expected save before apply, or apply to a copy.deepcopy of the model. What the model "
                "holds now can be written by its own save_pretrained"
            )

    def rank_errors(self, rank: int) -> dict[str, float]:
        """Relative error (Frobenius) per module of the adapter of ``rank`` that :meth:`save` writes; 0 where it is
        exact.
        """
        from nsc_merge.export import low_rank

        paths = (path for path in self.paths if not self.is_whole(path))
        return {path: low_rank(self, path, rank)[2] for path in paths}

    def save(
        self,
        out: str | os.PathLike[str],
        format: str | Sequence[str] = "model",
        *,
        rank: int | None = None,
        max_shard_size: str | int = "5GB",
        plots: bool = False,
    ) -> Path:
        """Write the result into the folder ``out``, which appears or changes only once everything is written.

        Besides the format's own files: ``recipe.yaml`` (resolved options, versions, SHA-256 of the inputs, files
        written), ``README.md`` (a model card), ``history.jsonl`` if there is a history, and
        ``heads/<task>.safetensors`` for every task that brought a head.

        Args:
            out: a folder; made if needed. Files of the same names are replaced, and what an earlier save of another
                merge left there goes; other files stay.
            format: ``"lora"`` writes one PEFT adapter with the coefficients folded in, exact and of rank sum
                of the ranks; ``"model"`` writes the merged transformers model as sharded safetensors;
                ``"coefficients"`` writes ``coefficients.json``. A list writes ``coefficients.json`` (if the method
                gives coefficients) into ``out`` and each other format into a folder of its name. Where every task
                has an update of its own, each goes into ``tasks/<task>`` of that folder.
            rank: truncates ``"lora"`` to this rank. The relative error of every module goes into
                ``truncation.json``; :meth:`rank_errors` returns the same. Methods whose update is of full rank
                have no exact adapter and need it.
            max_shard_size: of ``"model"``, as in transformers.
            plots: also draw the coefficients and, if there is a history, the null-space ratios.

        Returns:
            ``out`` as a path.

        Raises:
            TypeError, ValueError, OSError: naming the argument, what was found and what was expected; ``out`` is then
                as it was. ``"model"``, and ``"lora"`` where adapters trained linears in full, need the base as it was
                merged: see :meth:`apply`.
        """
        from nsc_merge.export import save

        save(self, Path(out), format, rank=rank, max_shard_size=max_shard_size, plots=plots)
        return Path(out)


# On the model itself, and not in a table beside it: a copy of a changed model is a changed model.
_APPLICATIONS = "_nsc_merge_applications"


def _applications(model: nn.Module) -> int:
    """How often :meth:`MergeResult.apply` has changed a model."""
    return getattr(model, _APPLICATIONS, 0)


def _plus(parameter: Tensor, update: Tensor) -> Tensor:
    value = parameter.detach()
    return (value.double() + update.to(value.device)).to(value.dtype)
