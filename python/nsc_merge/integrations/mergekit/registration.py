"""Puts this library's methods where mergekit looks for them, in 0.1.5 and in the interface before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergekit import merge_methods
from mergekit.io.tasks import LoaderCache
from torch import Tensor

from nsc_merge import Factor
from nsc_merge.integrations.mergekit.lora_models import LoraModel
from nsc_merge.integrations.mergekit.one_tensor import WEIGHT, OneTensor, checked, methods


def known_updates(models: Any, name: str, base: Tensor) -> dict[Any, Factor | None]:
    """Model -> what its adapter does to a tensor, of the models that are read from factors; without those that were
    trained in full, and those whose adapter is on another tensor than the merge's ``base`` is: of another model, of one
    with an adapter itself, of a vocabulary that was put in another order.
    """
    found: dict[Any, Factor | None] = {}
    alike: dict[int, bool] = {}
    for model in models:
        loader = LoaderCache().loaders.get(model)
        if not isinstance(loader, LoraModel) or not loader.is_update(name):
            continue
        # Adapters on one base share its loader.
        if id(loader.base) not in alike:
            alike[id(loader.base)] = loader.is_on(name, base)
        if alike[id(loader.base)]:
            found[model] = loader.update(name)
    return found


def register_methods() -> list[str]:
    """Register ``nsc_<method>`` for every method, those that are not there yet.

    Returns:
        The names of all.
    """
    found = [OneTensor(method) for method in methods()]
    if hasattr(merge_methods, "registered_methods"):
        _register(found)
    else:
        _register_as_before(found)
    return [one.name for one in found]


def _register(found: list[OneTensor]) -> None:
    """With mergekit 0.1.5."""
    from mergekit.merge_methods import (
        BasePolicy,
        GroupMergeMethod,
        InputContract,
        MergeMethodSpec,
        ParameterScope,
        TensorGroup,
    )
    from mergekit.merge_methods.base import ParameterSpec

    class Grouped(GroupMergeMethod):
        def __init__(self, one: OneTensor) -> None:
            self.one = one
            shared = [
                ParameterSpec(name, kind, ParameterScope.SHARED, default=None) for name, kind in one.types.items()
            ]
            self.spec = MergeMethodSpec(
                name=one.name,
                parameters=(*shared, ParameterSpec(WEIGHT, float, ParameterScope.NON_BASE, default=1.0)),
                contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
                pretty_name=one.pretty_name,
                reference_url=one.reference,
            )

        def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Any:
            weights = parameters.pop(WEIGHT)
            models = {entry.id: entry.tensor for entry in group.non_base}
            name = group.metadata.name or "the tensor"
            return self.one.merge(
                name,
                group.base.tensor,
                models,
                parameters,
                weights,
                known_updates(models, name, group.base.tensor),
            )

    there = {method.spec.name for method in merge_methods.registered_methods()}
    for one in found:
        if one.name not in there:
            merge_methods.register(Grouped(one))


def _register_as_before(found: list[OneTensor]) -> None:
    """With mergekit 0.1.4, whose configurations hold numbers only: options that are words keep their defaults."""
    from mergekit.common import ImmutableMap, ModelReference
    from mergekit.graph import Task
    from mergekit.merge_methods.base import ConfigParameterDef, MergeMethod, MergeTensorInput
    from mergekit.merge_methods.registry import REGISTERED_MERGE_METHODS

    class Merge(Task[Any]):
        method: str
        gathered: MergeTensorInput
        weight_name: str
        base_model: ModelReference
        parameters: ImmutableMap[str, Any]
        weights: ImmutableMap[ModelReference, float]

        def uses_accelerator(self) -> bool:
            return True

        def arguments(self) -> dict[str, Any]:
            return {"tensors": self.gathered}

        def group_label(self) -> Any:
            return self.gathered.group_label()

        def execute(self, tensors: Mapping[Any, Any], **_: Any) -> Any:
            models = {model: tensor for model, tensor in tensors.items() if model != self.base_model}
            return by_name[self.method].merge(
                self.weight_name,
                tensors[self.base_model],
                models,
                dict(self.parameters.items()),
                {model: self.weights[model] for model in models},
                known_updates(models, self.weight_name, tensors[self.base_model]),
            )

    Merge.model_rebuild(_types_namespace={**locals(), "Any": Any})

    class Before(MergeMethod):
        def __init__(self, one: OneTensor) -> None:
            self.one = one

        def name(self) -> str:
            return self.one.name

        def pretty_name(self) -> str:
            return self.one.pretty_name

        def reference_url(self) -> str | None:
            return self.one.reference

        def parameters(self) -> list[Any]:
            return [ConfigParameterDef(name=name) for name in self.one.types]

        def tensor_parameters(self) -> list[Any]:
            return [ConfigParameterDef(name=WEIGHT, default_value=1.0)]

        def make_task(self, **named: Any) -> Any:
            base_model, parameters, tensor_parameters = (
                named[key] for key in ("base_model", "parameters", "tensor_parameters")
            )
            if base_model is None:
                raise ValueError(f"base_model: {self.one.name} merges differences to it; expected one, found none")
            given = {name: checked(name, parameters[name], kind) for name, kind in self.one.types.items()}
            weights = {model: tensor_parameters[model][WEIGHT] for model in tensor_parameters}
            return Merge(
                method=self.one.name,
                gathered=named["tensors"],
                weight_name=named["output_weight"].name,
                base_model=base_model,
                parameters=ImmutableMap(data=given),
                weights=ImmutableMap(data=weights),
            )

    by_name = {one.name: one for one in found}
    for one in found:
        REGISTERED_MERGE_METHODS.setdefault(one.name, Before(one))
