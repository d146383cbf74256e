"""Puts merged linears into a model around its own weight tensors, and takes them out again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nsc_kernels import AdapterBank, MergedLoRALinear
from nsc_merge.adapters import Adapter, Factor
from nsc_merge.models.folded_linear import Folded

Measure = Callable[[str, Tensor, Tensor], None]


class MeasuredLoRALinear(MergedLoRALinear):
    """A merged linear that hands ``quad [..., K]`` and ``sqnorm [...]`` of its input to a callback.

    Beyond the low-rank updates of its bank it can hold, per adapter, an update of the bias and, for a layer
    that was trained in full, of the whole weight. The same coefficients scale them.

    Attributes:
        path: of the linear in the model.
        measure: the callback, while the linear is measured.
        folded: what computes the linear and its low-rank updates in one, while it is not measured.
        biases: updates of the bias, ``[K, d_out]``, if some adapter has one.
        denses: updates of the whole weight, ``[K, d_out, d_in]``, if some adapter has one.
    """

    path: str = ""
    measure: Measure | None = None
    folded: Folded | None = None
    biases: Tensor | None = None
    denses: Tensor | None = None

    def forward(self, z: Tensor) -> Tensor:
        if self.measure is not None:
            y, quad, sqnorm = self.nsc(z)
            self.measure(self.path, quad, sqnorm)
        elif self.folded is not None:
            y = self.folded(z, self.lam)
        elif self.bank.R == 0:
            y = self.linear(z)
        else:
            y = super().forward(z)
        # The coefficients stay as wide as they are: rounded to bfloat16, small steps would change nothing.
        if self.denses is not None:
            stacked = self.denses.flatten(0, 1).to(z.dtype)
            shares = nn.functional.linear(z, stacked).unflatten(-1, self.denses.shape[:2])
            y = y + (self.lam[:, None] * shares).sum(-2).to(y.dtype)
        if self.biases is not None:
            y = y + (self.lam @ self.biases.to(self.lam.dtype)).to(y.dtype)
        return y


def adapted_linears(model: nn.Module, adapters: Mapping[str, Adapter]) -> dict[str, nn.Linear]:
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
    return torch.tensor([[path in adapter.factors for adapter in adapters.values()] for path in paths])


def merged_linears(model: nn.Module, adapters: Mapping[str, Adapter]) -> dict[str, nn.Linear]:
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
                f"{type(model).__name__}, for example {unknown[0]!r}" + _wrapped(model)
            )
        for path, factor in adapter.factors.items():
            linear = modules[path]
            if factor.magnitude is not None:
                raise ValueError(
                    f"adapters[{name!r}]: {path} is a DoRA update; nsc_merge.models.fitting.fit makes it a plain one"
                )
            if not isinstance(linear, nn.Linear):
                raise TypeError(
                    f"adapters[{name!r}]: {path}: expected an nn.Linear in the model, "
                    f"found {type(linear).__module__}.{type(linear).__name__}"
                    + ("; expected a model without adapters" if hasattr(linear, "base_layer") else "")
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


def _wrapped(model: nn.Module) -> str:
    """What to say where the model is a wrapper, under which every path begins otherwise."""
    if hasattr(model, "_orig_mod"):
        return "; of a compiled model, expected the module that was compiled"
    return "; of a PeftModel, expected the base model without adapters" if hasattr(model, "peft_config") else ""


@contextmanager
def attach(
    model: nn.Module, adapters: Mapping[str, Adapter], init: float | Mapping[str, float]
) -> Iterator[dict[str, MeasuredLoRALinear]]:
    """Merge ``adapters`` into ``model`` for the duration of a ``with`` block, without copying a weight.

    Each adapted linear is replaced by a merged one around the same module. Its ``lam`` is a parameter
    ``[K]``, in the order of ``adapters``; a task whose adapter does not touch the module has a coefficient of
    0 there, which no gradient reaches. All of the model's own parameters are frozen meanwhile. On leaving,
    also by an error, the model holds the same modules with the same settings as before. Layers whose
    coefficients are fixed (:attr:`nsc_merge.adapters.Factor.fixed`) are merged too, but not yielded.

    Args:
        model: any module whose adapted submodules are ``nn.Linear``.
        adapters: task -> adapter.
        init: initial coefficient, one for all tasks or one per task.

    Yields:
        Module path -> merged linear, of every linear that has coefficients to choose.
    """
    linears = merged_linears(model, adapters)
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
        yield {path: module for path, module in merged.items() if isinstance(module.lam, nn.Parameter)}
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
    fixed = [factor.fixed for factor in factors]
    start = [
        (value if held is None else held) if path in adapters[task].factors else 0.0
        for (task, value), held in zip(values.items(), fixed, strict=True)
    ]
    lam = torch.tensor(start, dtype=wide, device=weight.device)
    learnt = all(value is None for value in fixed)
    module = MeasuredLoRALinear(linear, bank, nn.Parameter(lam) if learnt else lam)
    module.path = path
    module.biases = _stacked([factor.bias_delta() for factor in factors], weight)
    module.denses = _stacked([factor.dense for factor in factors], weight)
    return module


def _stacked(updates: Sequence[Tensor | None], like: Tensor) -> Tensor | None:
    """Updates of all adapters, zero where one has none; None where none has one. In ``like``'s dtype."""
    known = next((update for update in updates if update is not None), None)
    if known is None:
        return None
    return torch.stack([torch.zeros_like(known) if update is None else update for update in updates]).to(like)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
