"""Puts merged linears into a model around its own weight tensors, and takes them out again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nsc_kernels import AdapterBank
from nsc_merge.adapters import Adapter, Factor
from nsc_merge.models.bases.quantised import (
    Linear,
    activations_of,
    is_linear,
    is_quantised,
    keeping_gradients,
    stored_or_dequantised,
)
from nsc_merge.models.bases.sharded import unit_of
from nsc_merge.models.bases.stored_weights import (
    FLOATS,
    check_loaded,
    described,
    is_dtensor,
    offloading,
)
from nsc_merge.models.forward_contexts import check_unscaled, eager, unscaled, wrapper_of
from nsc_merge.models.merged.matrices import Matrix, matrix_at
from nsc_merge.models.merged.measured_linear import MeasuredLoRALinear
from nsc_merge.models.merged.parameters import MergedMatrix, around
from nsc_merge.models.merged.whole import MergedWhole, Site, instead, is_part, merged_at, why_no_rows
from nsc_merge.processes.launch import undisturbed


def adapted_linears(model: nn.Module, adapters: Mapping[str, Adapter]) -> dict[str, Linear]:
    """Every linear that has coefficients to choose, in the order of the model: all that some adapter touches,
    but those whose coefficients are fixed (:attr:`nsc_merge.adapters.Factor.fixed`).

    Raises:
        TypeError, ValueError: as :func:`merged_linears`.
    """
    fixed = {
        path
        for adapter in adapters.values()
        for path, factor in adapter.factors.items()
        if factor.fixed is not None
    }
    linears = merged_linears(model, adapters)
    return {path: linear for path, linear in linears.items() if path not in fixed}


def presence(paths: Iterable[str], adapters: Mapping[str, Adapter]) -> Tensor:
    """``[modules, K]`` bool: where each adapter touches the modules of ``paths``."""
    return torch.tensor([[path in adapter.factors for adapter in adapters.values()] for path in paths], device="cpu")


def merged_linears(model: nn.Module, adapters: Mapping[str, Adapter]) -> dict[str, Linear]:
    """Every linear that some adapter touches, in the order of the model: ``nn.Linear``, or what stands for one
    (:func:`nsc_merge.models.bases.quantised.is_linear`).

    Raises:
        ValueError: naming the adapter and the module, if a path is not in the model or a shape does not fit; or if the
            model is what ``torch.compile`` returns, or has divided its weights.
        TypeError: if the module at a path is no linear, or one of tensor parallelism.
    """
    if hasattr(model, "_orig_mod"):
        raise ValueError(f"model: expected a model, found {type(model).__name__}{wrapper_of(model)}")
    check_unscaled(model)
    modules = dict(model.named_modules())
    places: dict[str, Any] = {}
    for path in dict.fromkeys(path for adapter in adapters.values() for path in adapter.factors):
        places[path] = merged_at(modules[path]) if path in modules else matrix_at(model, path)
    for name, adapter in adapters.items():
        if left := next((path for path in (*adapter.stacks, *adapter.token_rows)), None):
            raise ValueError(
                f"adapters[{name!r}]: {left} has LoRA on parameters, or rows of tokens, of which nsc_merge.models."
                "fitting.fit makes updates; expected adapters as it returns them, or as a merge's result has them"
            )
        unknown = [path for path in adapter.factors if places[path] is None]
        if unknown:
            raise ValueError(
                f"adapters[{name!r}]: {len(unknown)} of {len(adapter.factors)} adapted modules are not in "
                f"{type(model).__name__}, for example {unknown[0]!r}" + wrapper_of(model, unknown[0])
            )
        for path, factor in adapter.factors.items():
            linear = places[path]
            if factor.magnitude is not None:
                raise ValueError(
                    f"adapters[{name!r}]: {path} is a DoRA update; nsc_merge.models.fitting.fit makes it one of "
                    "the base's weight"
                )
            if not (isinstance(linear, Site) or is_linear(linear)) or (path in modules and is_part(modules[path])):
                raise TypeError(
                    f"adapters[{name!r}]: {path}: expected a linear, embedding, norm or convolution, found "
                    f"{type(linear).__module__}.{type(linear).__name__}{instead(modules[path])}"
                )
            if factor.dense is None and path in modules and (reason := why_no_rows(modules[path])):
                raise TypeError(f"adapters[{name!r}]: {path}: {reason}")
            if isinstance(linear, Matrix) and factor.dense is not None:
                raise ValueError(f"adapters[{name!r}]: {path}: expected a low-rank update, found a dense one")
            if factor.A.shape[1] != linear.in_features or factor.B.shape[0] != linear.out_features:
                raise ValueError(
                    f"adapters[{name!r}]: {path}: expected an update of shape "
                    f"[{linear.out_features}, {linear.in_features}] to fit the model, "
                    f"found [{factor.B.shape[0]}, {factor.A.shape[1]}]"
                )
    order = {path: number for number, path in enumerate(modules)}

    def position(path: str) -> tuple[int, str, int]:
        place = places[path]
        if isinstance(place, Matrix):
            return order[place.owner], place.name, place.number or 0
        return order[path], "", 0

    return {path: places[path] for path in sorted(places, key=position)}


def measurable(linears: Mapping[str, Linear], adapters: Mapping[str, Adapter]) -> list[str]:
    """Paths of linears with LoRA, whose inputs have null-space ratios; what was trained in full alone gives none."""
    low_rank = {path for adapter in adapters.values() for path, factor in adapter.factors.items() if factor.rank}
    return [path for path, linear in linears.items() if path in low_rank and not isinstance(linear, Site)]


def refuse_unseen(model: nn.Module, silent: Iterable[str], expected: str = "adapters without these modules") -> None:
    """Refuse adapted linears that the model did not call but whose weights it took, as nn.MultiheadAttention does: the
    update counts there, but nobody sees an input.

    Args:
        model: with adapters attached, after a forward.
        silent: paths of linears that were not called.
        expected: the way out, for the message.

    Raises:
        RuntimeError: naming them.
    """
    hidden = sorted(path for path in silent if is_computed_with(model, path))
    if hidden:
        which = hidden[0] if len(hidden) == 1 else f"{len(hidden)} adapted modules, such as {hidden[0]},"
        raise RuntimeError(
            f"calibration: the model computes with the weights of {which} by itself, so that their inputs cannot be "
            f"seen; expected {expected}, or another method"
        )


def is_computed_with(model: nn.Module, path: str) -> bool:
    """Whether a model with adapters takes the weight of an adapted linear that it does not call."""
    linear, parent = model.get_submodule(path), model.get_submodule(path.rpartition(".")[0])
    return isinstance(parent, nn.MultiheadAttention) or getattr(linear, "weight_taken", False)


@contextmanager
def attach(
    model: nn.Module, adapters: Mapping[str, Adapter], init: float | Mapping[str, float]
) -> Iterator[dict[str, Any]]:
    """Merge ``adapters`` into ``model`` for the duration of a ``with`` block, without copying a weight.

    Each adapted linear is replaced by a merged one around the same module. Its ``lam`` is a parameter ``[K]``, float32
    (float64 for float64 weights), in the order of ``adapters``; a task whose adapter does not touch the module has a
    coefficient of 0 there, which no gradient reaches. All of the model's own parameters are frozen meanwhile. On
    leaving, also by an error, the model holds the same modules with the same settings as before. Layers whose
    coefficients are fixed (:attr:`nsc_merge.adapters.Factor.fixed`) are merged too, but not yielded. Offloaded and
    quantised linears keep their own forward, and modules compiled in place run uncompiled meanwhile.

    Args:
        model: any module whose adapted submodules are linears.
        adapters: task -> adapter.
        init: initial coefficient, one for all tasks or one per task.

    Raises:
        TypeError, ValueError: as :func:`merged_linears`; or if weights are nowhere (meta device) or in shards.

    Yields:
        Module path -> merged linear, of every linear that has coefficients to choose.
    """
    linears = merged_linears(model, adapters)
    check_loaded(model)
    values = {task: init[task] if isinstance(init, Mapping) else init for task in adapters}
    merged: dict[str, Any] = {}
    empty: dict[tuple[Any, ...], AdapterBank] = {}
    placed: dict[str, nn.Module] = {}
    # By name: accelerate gives an offloaded layer other parameters with every call.
    trainable = [
        (module, name)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]
    with eager(model), unscaled(model), keeping_gradients(model):
        try:
            for path, linear in linears.items():
                kind = _activations_of(model, path, linear)
                offset = _offset(model, path, linear, kind[1], adapters)
                merged[path] = _merged_linear(path, linear, *kind, adapters, values, offset, empty)
            _set_requires_grad(trainable, False)
            alone = {path: one for path, one in merged.items() if not isinstance(one, MergedMatrix)}
            for path, module in {**alone, **around(merged)}.items():
                placed[path] = model.get_submodule(path)
                _replace(model, path, module)
            yield {path: module for path, module in merged.items() if isinstance(module.lam, nn.Parameter)}
        finally:
            # Ctrl-C once more, while a run is ended by it, must not leave some of the merged linears in the model.
            with undisturbed():
                # A linear is within what was put around its module later.
                for path, module in reversed(placed.items()):
                    _replace(model, path, module)
                _set_requires_grad(trainable, True)


def _set_requires_grad(parameters: Iterable[tuple[nn.Module, str]], value: bool) -> None:
    for module, name in parameters:
        module.get_parameter(name).requires_grad_(value)


def _activations_of(model: nn.Module, path: str, linear: Linear) -> tuple[torch.dtype, torch.device]:
    """Dtype and device of what a linear gives: those of its weight; where the weight is offloaded, the device that it
    is brought to, and where it holds codes, what :func:`nsc_merge.models.bases.quantised.activations_of` says.

    Raises:
        ValueError: if it has no forward that a whole update could be added to.
    """
    if isinstance(linear, Site):
        hook = offloading(linear.module)
        if isinstance(linear, Matrix) and hook is not None:
            raise ValueError(
                f"{path}: expected experts in memory, found them offloaded; load the model without device_map, or "
                "merge without data (method 'task_arithmetic' and others)"
            )
        if type(linear.weight) is not nn.Parameter or linear.weight.dtype not in FLOATS:
            raise ValueError(
                f"{path}: expected a whole weight in one process, found {described(linear.weight)}; merge before the "
                "model is distributed, or without data (method 'task_arithmetic' and others)"
            )
        return linear.weight.dtype, linear.weight.device if hook is None else torch.device(hook.execution_device)
    if is_quantised(linear):
        return activations_of(model, path, linear)
    weight, hook = linear.weight, offloading(linear)
    shape = (linear.out_features, linear.in_features)
    in_part = type(weight) is nn.Parameter and weight.shape != shape
    if in_part or (is_dtensor(weight) and unit_of(model, path) is None):
        raise ValueError(
            f"{path}: expected the whole weight {list(shape)} in one process, found a shard ({described(weight)} "
            f"{list(weight.shape)}); merge before the model is distributed, or distribute it by "
            "FSDP2's fully_shard, which gathers whole weights where they are computed with"
        )
    own = model.get_submodule(path)
    if linear is not own and (offloading(own) is not None or is_dtensor(weight)):
        found, way = ("in shards", "in one process") if is_dtensor(weight) else ("offloaded", "without device_map")
        raise ValueError(
            f"{path}: expected a Conv1D in memory, found it {found}; load the model {way}, or merge without data "
            "(method 'task_arithmetic' and others)"
        )
    if hook is None and weight.device.type == "meta":
        raise ValueError(
            f"{path}: expected a weight on a device, or offloaded by a hook of its own, found the meta device; "
            "load it, or offload without preload_module_classes"
        )
    if weight.dtype not in FLOATS:
        raise ValueError(f"{path}: expected a weight that nn.Linear computes with, found {described(weight)}")
    return weight.dtype, weight.device if hook is None else torch.device(hook.execution_device)


def _merged_linear(
    path: str,
    linear: Linear,
    dtype: torch.dtype,
    device: torch.device,
    adapters: Mapping[str, Adapter],
    values: Mapping[str, float],
    offset: Tensor | None,
    empty: dict[tuple[Any, ...], AdapterBank],
) -> MeasuredLoRALinear | MergedWhole | MergedMatrix:
    absent = Factor.empty(linear.out_features, linear.in_features)
    factors = [adapter.factors.get(path, absent) for adapter in adapters.values()]
    whole = isinstance(linear, Site)
    # The bank is of what linears compute with: an embedding looks rows up, and thousands of experts share an empty one.
    packed = [absent] * len(factors) if whole else factors
    key = (linear.in_features, linear.out_features, dtype, device)
    bank = empty.get(key) if whole else None
    if bank is None:
        bank = AdapterBank.from_factors(
            [factor.A for factor in packed],
            [factor.B for factor in packed],
            [factor.scaling for factor in packed],
            dtype=dtype,
            device=device,
        )
    if whole:
        empty[key] = bank
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    fixed = [factor.fixed for factor in factors]
    start = [
        (value if held is None else held) if path in adapters[task].factors else 0.0
        for (task, value), held in zip(values.items(), fixed, strict=True)
    ]
    lam = torch.tensor(start, dtype=wide, device=device)
    learnt = all(value is None for value in fixed)
    own = nn.Parameter(lam) if learnt else lam
    module: Any
    if whole:
        ranked = [(number, factor) for number, factor in enumerate(factors) if factor.rank]
        low_rank = [(number, (one.scaling * one.A.double()).to(bank.A), one.B.to(bank.A)) for number, one in ranked]
        module = (
            MergedMatrix(linear, own, bank, low_rank)
            if isinstance(linear, Matrix)
            else MergedWhole(linear.module, own, bank, low_rank)
        )
    else:
        module = MeasuredLoRALinear(linear, bank, own)
    module.path = path
    module.biases = _stacked([factor.bias_delta() for factor in factors], bank.A)
    module.denses = _stacked([_scaled_dense(factor) for factor in factors], bank.A)
    # As wide as the coefficients, small as they are.
    gains = _stacked([None if one.gain is None else one.scaling * one.gain for one in factors], lam)
    if gains is not None:
        module.gains, module.offset = gains, offset
    return module


def _offset(
    model: nn.Module, path: str, linear: Linear, device: torch.device, adapters: Mapping[str, Adapter]
) -> Tensor | None:
    """The bias of a linear that has gains, at hand also where its weights are offloaded or in shards."""
    held = [adapter.factors[path] for adapter in adapters.values() if path in adapter.factors]
    if getattr(linear, "bias", None) is None or all(factor.gain is None for factor in held):
        return None
    return stored_or_dequantised(model, f"{path}.bias").whole().to(device)


def _scaled_dense(factor: Factor) -> Tensor | None:
    """The update of a whole weight; as it is, and no copy, where nothing scales it: an embedding is large."""
    return factor.dense if factor.dense is None or factor.scaling == 1.0 else factor.scaling * factor.dense


def _stacked(updates: Sequence[Tensor | None], like: Tensor) -> Tensor | None:
    """Updates of all adapters, zero where one has none; None where none has one. In ``like``'s dtype."""
    known = next((update for update in updates if update is not None), None)
    if known is None:
        return None
    every = [torch.zeros_like(known) if update is None else update for update in updates]
    return torch.stack(every).detach().to(like)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
