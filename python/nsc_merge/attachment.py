"""Puts merged linears into a model around its own weight tensors, and takes them out again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nsc_kernels import AdapterBank, MergedLoRALinear
from nsc_merge.adapters import Adapter, Factor

Measure = Callable[[str, Tensor, Tensor], None]


class MeasuredLoRALinear(MergedLoRALinear):
    """A merged linear that hands ``quad [..., K]`` and ``sqnorm [...]`` of its input to a callback."""

    path: str = ""
    measure: Measure | None = None

    def forward(self, z: Tensor) -> Tensor:
        if self.measure is None:
            return super().forward(z)
        y, quad, sqnorm = self.nsc(z)
        self.measure(self.path, quad, sqnorm)
        return y


def adapted_linears(model: nn.Module, adapters: Mapping[str, Adapter]) -> dict[str, nn.Linear]:
    """Every linear that some adapter touches, in the order of the model.

    Raises:
        ValueError: naming the adapter and the module, if a path is not in the model or a shape does not fit.
        TypeError: if the module at a path is not an ``nn.Linear``.
    """
    modules = dict(model.named_modules())
    for name, adapter in adapters.items():
        unknown = [path for path in adapter.factors if path not in modules]
        if unknown:
            raise ValueError(
                f"adapters[{name!r}]: {len(unknown)} of {len(adapter.factors)} adapted modules are not in "
                f"{type(model).__name__}, for example {unknown[0]!r}"
            )
        for path, factor in adapter.factors.items():
            linear = modules[path]
            if not isinstance(linear, nn.Linear):
                raise TypeError(
                    f"adapters[{name!r}]: {path}: expected an nn.Linear in the model, "
                    f"found {type(linear).__name__}"
                )
            if factor.A.shape[1] != linear.in_features or factor.B.shape[0] != linear.out_features:
                raise ValueError(
                    f"adapters[{name!r}]: {path}: expected an update of shape "
                    f"[{linear.out_features}, {linear.in_features}] to fit the model, "
                    f"found [{factor.B.shape[0]}, {factor.A.shape[1]}]"
                )
    touched = {path for adapter in adapters.values() for path in adapter.factors}
    return {
        path: module for path, module in modules.items() if path in touched and isinstance(module, nn.Linear)
    }


@contextmanager
def attach(
    model: nn.Module, adapters: Mapping[str, Adapter], init: float | Mapping[str, float]
) -> Iterator[dict[str, MeasuredLoRALinear]]:
    """Merge ``adapters`` into ``model`` for the duration of a ``with`` block, without copying a weight.

    Each adapted linear is replaced by a merged one around the same module. Its ``lam`` is a parameter
    ``[K]``, in the order of ``adapters``; a task whose adapter does not touch the module has a coefficient of
    0 there, which no gradient reaches. All of the model's own parameters are frozen meanwhile. On leaving,
    also by an error, the model holds the same modules with the same settings as before.

    Args:
        model: any module whose adapted submodules are ``nn.Linear``.
        adapters: task -> adapter.
        init: initial coefficient, one for all tasks or one per task.

    Yields:
        Module path -> merged linear.
    """
    linears = adapted_linears(model, adapters)
    values = {task: init[task] if isinstance(init, Mapping) else init for task in adapters}
    merged = {}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for path, linear in linears.items():
            merged[path] = _merged_linear(path, linear, adapters, values)
        for parameter in trainable:
            parameter.requires_grad_(False)
        for path, module in merged.items():
            _replace(model, path, module)
        yield merged
    finally:
        for path in merged:
            _replace(model, path, linears[path])
        for parameter in trainable:
            parameter.requires_grad_(True)


def _merged_linear(
    path: str, linear: nn.Linear, adapters: Mapping[str, Adapter], values: Mapping[str, float]
) -> MeasuredLoRALinear:
    weight = linear.weight
    absent = Factor(weight.new_empty(0, linear.in_features), weight.new_empty(linear.out_features, 0), 1.0)
    factors = [adapter.factors.get(path, absent) for adapter in adapters.values()]
    bank = AdapterBank.from_factors(
        [factor.A for factor in factors],
        [factor.B for factor in factors],
        [factor.scaling for factor in factors],
        dtype=weight.dtype,
        device=weight.device,
    )
    wide = torch.float64 if weight.dtype is torch.float64 else torch.float32
    lam = torch.tensor(
        [value if path in adapters[task].factors else 0.0 for task, value in values.items()],
        dtype=wide,
        device=weight.device,
    )
    module = MeasuredLoRALinear(linear, bank, nn.Parameter(lam))
    module.path = path
    return module


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
