"""A method of this library as mergekit calls it: one tensor of all models at a time."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, replace
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from nsc_merge import Factor, merge_factors
from nsc_merge.methods import METHODS, Method
from nsc_merge.methods.gradient_free import divisor_of

PREFIX = "nsc_"
# Of every method, beside its own options: up to which relative error a difference of two checkpoints counts as of low
# rank.
TOLERANCE = "tolerance"
WEIGHT = "weight"
_RECIPE = "nsc-merge import makes a recipe for nsc-merge run, which merges all modules at once"


def methods() -> list[Method]:
    """Those that look at adapters alone and give one update for all tasks."""
    return [method for method in METHODS.values() if method.updates is not None]


@dataclass(frozen=True)
class OneTensor:
    """A method, for one tensor at a time.

    Attributes:
        method: of this library.
    """

    method: Method

    @property
    def name(self) -> str:
        """What ``merge_method`` is to say."""
        return PREFIX + self.method.name

    @property
    def pretty_name(self) -> str:
        return f"{self.method.name} (nsc-kernels)"

    @property
    def reference(self) -> str | None:
        """Address of the paper, if it has one."""
        number = self.method.paper.partition("arXiv ")[2].split(",")[0].strip(" )")
        return f"https://arxiv.org/abs/{number}" if number else None

    @property
    def types(self) -> dict[str, Any]:
        """What can stand under ``parameters``, one value for all models, with its type; None is what the method's own
        default is. The weights of models are not among them.
        """
        hints = get_type_hints(self.method.options)
        own = {name: _scalar(hints[name]) for name in self.method.option_names if name != "weights"}
        return {**own, TOLERANCE: float | None}

    def merge(
        self,
        name: str,
        base: Tensor,
        models: Mapping[Hashable, Tensor],
        parameters: Mapping[str, Any],
        weights: Mapping[Hashable, float],
        updates: Mapping[Hashable, Factor | None],
    ) -> Tensor:
        """The merged tensor, of the base's shape, dtype and device.

        Matrices, and convolutions flattened to ``[d_out, the rest]``, are merged by the method. A tensor of one
        dimension is merged as a matrix of one row by methods that look at single entries; by the others it is merged by
        task arithmetic, with their scale and weights, divided as they divide.

        Args:
            name: of the tensor.
            base: the base's, floating point.
            models: model -> its tensor.
            parameters: name -> value, None for the default; see :attr:`types`.
            weights: model -> weight.
            updates: model -> its update of this tensor where that is known from an adapter, None where the adapter
                leaves the tensor alone; others are differences to the base.

        Raises:
            ValueError: naming the parameter or the model, what was found and what was expected.
        """
        tasks = {str(model): model for model in models}
        options = self._options(parameters, {task: weights[model] for task, model in tasks.items()})
        tolerance = options.pop(TOLERANCE, None)
        resolved = self.method.resolved(options, list(tasks))
        deltas: dict[str, Tensor | Factor] = {}
        for task, model in tasks.items():
            if model in updates:
                known = updates[model]
                if known is not None:
                    deltas[task] = replace(known, A=known.A.to(base.device), B=known.B.to(base.device), bias=None)
            elif (delta := _difference(name, task, base, models[model])).any():
                deltas[task] = delta
        if not deltas:
            return base
        if base.ndim == 1 and not self.method.of_entries:
            merged = self._sum(resolved, tasks, deltas)
        else:
            self._check_factors(name, resolved, deltas)
            given = {
                task: {name: _matrix(deltas[task])} if task in deltas else {} for task in tasks
            }
            ((_, factor),) = merge_factors(given, self.method.name, tolerance=tolerance, **options)
            merged = factor.B @ factor.A if factor.dense is None else factor.dense
        wide = torch.promote_types(base.dtype, torch.float32)
        return (base.to(wide) + merged.reshape(base.shape).to(base.device, wide)).to(base.dtype)

    def _options(self, parameters: Mapping[str, Any], weights: Mapping[str, float]) -> dict[str, Any]:
        """The method's options by name, those that were given, with the weights and the scope that they need."""
        options = {name: value for name, value in parameters.items() if value is not None}
        known = self.method.option_names
        if "trim_scope" in known and options.setdefault("trim_scope", "tensor") == "global":
            raise ValueError(
                f"trim_scope: {self.name} sees one tensor at a time and cannot count the entries of all; expected "
                f"'tensor', found 'global'; {_RECIPE}"
            )
        if self.method.weighted == "scale":
            scale = options.pop("scale", self.method.resolved({}, list(weights)).scale)
            return {**options, "scale": {task: scale * weight for task, weight in weights.items()}}
        if "weights" in known:
            return {**options, "weights": dict(weights)}
        for task, weight in weights.items():
            if weight != 1:
                raise ValueError(f"{WEIGHT}: {self.name} has no weights; expected 1 or none, found {weight} for {task}")
        return options

    def _sum(self, options: Any, tasks: Mapping[str, Any], deltas: Mapping[str, Any]) -> Tensor:
        """Task arithmetic, as :func:`nsc_merge.merge` does it with what is no matrix."""
        scale, weights = getattr(options, "scale", 1.0), getattr(options, "weights", None)
        if isinstance(scale, Mapping):
            scale, weights = 1.0, scale
        shares = {task: 1.0 if weights is None else float(weights[task]) for task in deltas}
        divisor = divisor_of(self.method.averages_with(options), list(shares.values()), len(tasks))
        total = torch.stack([shares[task] * delta for task, delta in deltas.items()]).sum(0)
        return float(scale) * total / divisor

    def _check_factors(self, name: str, options: Any, deltas: Mapping[str, Tensor | Factor]) -> None:
        if not self.method.of_factors_with(options):
            return
        task = next((task for task, delta in deltas.items() if isinstance(delta, Tensor)), None)
        if task is not None:
            option = self.method.factors_option(options)
            other = f", or {option} other than factors" if option else ""
            raise ValueError(
                f"merge_method: {self.name} depends on how an update is factored, which {task} does not say at "
                f"{name}; expected models base+adapter and python -m nsc_merge.integrations.mergekit{other}"
            )


def checked(name: str, value: Any, kind: Any) -> Any:
    """A value of a configuration as its type, such as a whole number for 4.0.

    Raises:
        ValueError: naming the parameter.
    """
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        expected = error.errors()[0]["msg"]
        raise ValueError(f"{name}: {expected[:1].lower()}{expected[1:]}, found {value!r:.60}") from None


def _scalar(hint: Any) -> Any:
    """The type without what a configuration cannot hold, or None in its place."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    plain = [part for part in parts if part in (bool, int, float, str)]
    return Union[(*plain, None)] if plain else Any


def _difference(name: str, task: str, base: Tensor, tensor: Tensor) -> Tensor:
    if tensor.shape != base.shape:
        raise ValueError(
            f"models: expected the base's shape {list(base.shape)} of {name}, found {list(tensor.shape)} in {task}; "
            "of embeddings, mergekit's tokenizer: {source: base} makes them alike"
        )
    wide = torch.promote_types(base.dtype, torch.float32)
    return tensor.to(wide) - base.to(wide)


def _matrix(delta: Tensor | Factor) -> Tensor | Factor:
    if isinstance(delta, Factor) or delta.ndim == 2:
        return delta
    return delta[None] if delta.ndim < 2 else delta.flatten(1)


def misplaced_parameter(config: Any, known: Collection[str]) -> str | None:
    """A name under any ``parameters`` of a configuration that is not ``known``, or that stands under one model without
    being its weight; mergekit looks over either.
    """
    if isinstance(config, Mapping):
        for key, value in config.items():
            if key == "parameters" and isinstance(value, Mapping):
                found = next((str(name) for name in value if name not in known), None)
            else:
                found = misplaced_parameter(value, (WEIGHT,) if key in ("models", "sources") else known)
            if found is not None:
                return found
    elif isinstance(config, list):
        return next((found for one in config if (found := misplaced_parameter(one, known)) is not None), None)
    return None
