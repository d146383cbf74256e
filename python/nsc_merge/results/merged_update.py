"""A merged update: coefficients or factors, and the merged weights that follow from them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nsc_merge.adapters import Adapter, Factor
from nsc_merge.adapters.algebra.low_rank import Rows, dense, low_rank
from nsc_merge.adapters.algebra.row_spaces import signal_notes
from nsc_merge.models.attachment import merged_linears
from nsc_merge.models.bases.adapted import without_adapters
from nsc_merge.models.bases.quantised import is_quantised, stored_or_dequantised
from nsc_merge.models.bases.stored_weights import Stored, check_in_memory, is_finite, sharing, stored
from nsc_merge.models.merged.matrices import Matrix
from nsc_merge.models.own_base import original_of
from nsc_merge.results.layout import task_folders
from nsc_merge.results.parameter_rows import update_of

Update = TypeVar("Update", bound="MergedUpdate")


@dataclass(frozen=True)
class MergedUpdate:
    """A merged update, with the adapters that it was made of.

    A method gives one of three things: coefficients, one per task and module; factors, one update per module; or,
    where every task keeps an update of its own, factors per task, of which :meth:`for_task` takes one.

    Attributes:
        method: what found it.
        coefficients: module path in the base model -> task -> coefficient; 0 where a task's adapter is
            absent. Empty if the method gives factors.
        history: one entry per step: ``step``, ``objective`` (Eq. 5), ``omega`` (per task), ``lambda_min``,
            ``lambda_mean``, ``lambda_max`` and ``seconds``. All values are from before the step's update, and on the
            batches of that step: two entries show how far the objective moved only if their batches are the same.
        adapters: task -> adapter, as fitted to the model by :func:`nsc_merge.models.fitting.fit`.
        options: resolved options of the method.
        dead: module path -> tasks whose coefficient cannot receive a gradient and therefore kept its initial
            value.
        model: the base model, unchanged.
        inputs: further arguments of the merge, as they go into ``recipe.yaml``.
        factors: module path -> the merged update, low-rank or dense, of methods that give no coefficients.
        per_task: task -> module path -> update, of methods that give every task its own.
        about: how it was found, in a paragraph for the model card.
        found_after: how often :meth:`apply` had changed ``model`` when the result was made.
        objective: of methods that take steps, what they minimise ``before`` and ``after``: at the initial coefficients
            and at those found, both on the same batches, ``batches`` of every task. Means over tasks; ``tasks`` holds
            both for each. Empty where that is not known.
    """

    method: str
    coefficients: dict[str, dict[str, float]] = field(repr=False)
    history: list[dict[str, Any]] = field(repr=False)
    adapters: dict[str, Adapter] = field(repr=False)
    options: dict[str, Any]
    dead: dict[str, list[str]] = field(repr=False)
    model: nn.Module = field(repr=False)
    inputs: dict[str, Any] = field(default_factory=dict)
    factors: Mapping[str, Factor] = field(default_factory=dict, repr=False)
    per_task: Mapping[str, Mapping[str, Factor]] = field(default_factory=dict, repr=False)
    about: str = field(default="", repr=False)
    found_after: int | None = field(default=None, repr=False)
    objective: dict[str, Any] = field(default_factory=dict)

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
        :func:`nsc_merge.adapters.algebra.row_spaces.signal_notes`.
        """
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

    @property
    def course(self) -> str:
        """What the steps did to the objective and the coefficients, in a line; empty if that is not known."""
        if not self.objective or not self.history:
            return ""
        steps = len(self.history)
        quantity = "null-space ratio" if "omega" in self.history[0] else "loss"
        count = self.objective["batches"]
        on = "the same batch" if count == 1 else f"the same {count} batches"
        rows = self.coefficients.items()
        values = [row[task] for path, row in rows for task, one in self.adapters.items() if path in one.factors]
        span = f", coefficients {min(values):.3f} to {max(values):.3f}" if values else ""
        return (
            f"{steps} step{'s' * (steps > 1)}: mean {quantity} {self.objective['before']:#.4g} -> "
            f"{self.objective['after']:#.4g} on {on} of every task{span}"
        )

    def for_task(self: Update, task: str) -> Update:
        """The result that serves one task: itself, unless every task has an update of its own.

        Raises:
            ValueError: if there is no such task.
        """
        if task not in self.adapters:
            raise ValueError(f"task: expected one of {self.tasks}, found {task!r}")
        return replace(self, factors=self.per_task[task], per_task={}) if self.per_task else self

    def scaled(self: Update, scale: float) -> Update:
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
            # It was of other coefficients.
            objective={},
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
        coefficients; with gains (DoRA), of :attr:`model`'s weight.
        """
        weight = f"{path}.weight"
        return dense(self.terms(path), lambda *rows: stored_or_dequantised(self.model, weight).rows(*rows))

    def bias_delta(self, path: str) -> Tensor | None:
        """The merged update ``sum_k lam_k s_k b_k`` of a linear's bias, ``[d_out]`` in float64, if any."""
        updates = [(lam, factor.bias_delta()) for lam, factor in self.terms(path)]
        known = [lam * update for lam, update in updates if update is not None]
        return torch.stack(known).sum(0) if known else None

    def merged(
        self, model: nn.Module, paths: Collection[str] | None = None, *, dequantize: bool = False
    ) -> dict[str, Tensor]:
        """The merged parameters of ``model``, by parameter path; each sum is formed in float64, rounded once.

        Weights that accelerate offloads are taken from where it keeps them; of a DTensor, every process gets its own
        shards.

        Args:
            model: the base model, or another of the same shapes.
            paths: the linears to merge, all by default.
            dequantize: also merge into quantised weights, as :meth:`merged_names` says.

        Raises:
            TypeError, ValueError: as :meth:`merged_names` and :meth:`merged_value`.
        """
        names = self.merged_names(model, paths, dequantize=dequantize)
        return {name: self.merged_value(model, name, dequantize=dequantize) for name in names}

    def merged_names(
        self, model: nn.Module, paths: Collection[str] | None = None, *, dequantize: bool = False
    ) -> list[str]:
        """Paths of the parameters of ``model`` that the merge changes.

        Args:
            model, paths: as in :meth:`merged`.
            dequantize: take the numbers that quantised linears compute with as their weights, rounded with the update
                to the dtype of the activations.

        Raises:
            ValueError: if a module is missing or has another shape, if there is no bias to hold the update of
                one, if a merged weight is tied to another parameter, which would change with it, or if a weight is kept
                in a way that nothing can be added to, such as quantised.
            TypeError: if a module is no linear.
        """
        shared = sharing(model)
        names: list[str] = []
        for path, place in merged_linears(model, self.adapters).items():
            matrix = place if isinstance(place, Matrix) else None
            weight = f"{path}.weight" if matrix is None else matrix.parameter
            if weight in names or not (paths is None or path in paths):
                continue
            linear = model.get_submodule(path) if matrix is None else matrix.module
            if not (dequantize and is_quantised(linear)):
                stored(model, weight)
            tied = shared.get(weight, [weight])
            if len(tied) > 1:
                raise ValueError(
                    f"{path}: its weight is shared by {tied}, so it cannot be merged into; use format 'lora', or, "
                    "where the result's model has it apart, apply to copy.deepcopy(result.model)"
                )
            names.append(weight)
            if self.bias_delta(path) is None:
                continue
            if getattr(linear, "bias", None) is None:
                raise ValueError(
                    f"{path}: the adapters have a bias (lora_bias) and the linear has none to merge it into; "
                    "use format 'lora'"
                )
            if not (dequantize and is_quantised(linear)):
                stored(model, f"{path}.bias")
            names.append(f"{path}.bias")
        return names

    def merged_value(self, model: nn.Module, name: str, *, dequantize: bool = False) -> Tensor:
        """The merged parameter of one of :meth:`merged_names`.

        Raises:
            ValueError: if its dtype cannot hold the sum.
        """
        place = (stored_or_dequantised if dequantize else stored)(model, name)
        value = place.plus(self._update_of(name, place))
        _refuse_not_finite(name, value)
        return value

    def merged_rows(self, model: nn.Module, name: str) -> Iterator[Tensor]:
        """One of :meth:`merged`, by its path, some rows after others, on the device of the weight."""
        place = stored(model, name)
        for rows in place.tiles(self._update_of(name, place)):
            _refuse_not_finite(name, rows)
            yield rows

    def _update_of(self, name: str, place: Stored) -> Rows:
        path, _, part = name.rpartition(".")
        if part != "bias":
            return update_of(self.model, name, self.paths, self.terms, place)
        update = self.bias_delta(path)
        assert update is not None
        return lambda begin, end: update[begin:end].clone().to(place.device)

    def apply(self, model: nn.Module) -> nn.Module:
        """Add the merged updates to the weights of ``model``, in place, and return it.

        Calling it twice adds twice. :attr:`model` itself is then no longer the base, so that saving can no longer write
        what needs it; a copy can be changed freely. Of weights that accelerate offloads to disk, the files stay as they
        are, and the merged ones are held in memory in their stead. Of a model with adapters in it, a ``PeftModel`` say,
        the base's weights change, and what is returned is the base without them, as by PEFT's ``merge_and_unload``.

        Raises:
            TypeError, ValueError: as :meth:`merged`, before any weight changes.
        """
        model = without_adapters(model)
        check_in_memory(model)
        merged = self.merged(model)
        setattr(original_of(model), _APPLICATIONS, _applications(model) + 1)
        for name, value in merged.items():
            stored(model, name).write(value)
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
        """Relative error (Frobenius) per module of an adapter of ``rank``; 0 where it is exact, as gains are."""
        paths = (path for path in self.paths if not self.is_whole(path))
        return {path: low_rank(self.terms(path), rank)[2] for path in paths}


def _refuse_not_finite(name: str, values: Tensor) -> None:
    if not is_finite(values):
        raise ValueError(
            f"{name}: the merged values are not finite in {values.dtype}; expected a base, coefficients and adapters "
            "whose sums it holds"
        )


# On the model itself, and not in a table beside it: a copy of a changed model is a changed model.
_APPLICATIONS = "_nsc_merge_applications"


def _applications(model: nn.Module) -> int:
    """How often :meth:`MergedUpdate.apply` has changed a model."""
    return getattr(original_of(model), _APPLICATIONS, 0)


def by_task(update: Update) -> Iterator[tuple[str, Update]]:
    """Folder within an output, and what is written there: one entry, or one for each task."""
    if not update.per_task:
        yield "", update
        return
    for task, folder in task_folders(update.tasks).items():
        yield folder, update.for_task(task)
