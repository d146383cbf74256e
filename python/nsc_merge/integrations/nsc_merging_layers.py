"""The layers of NSC's public code (wonyoung01/nsc_merging) as fused calls under its own loop: one line after its
``merged_model.to(device)``.

    accelerate(merged_model)

None of its code is here, and none is imported.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nsc_kernels import AdapterBank, MergedLoRALinear, merged_lora_nsc, null_space_ratio


class Accelerated:
    """What :func:`accelerate` did to a model; a context manager.

    Attributes:
        layers: how many layers run fused.
    """

    def __init__(self, placed: Sequence[_Placed], layers: int) -> None:
        self._placed = list(placed)
        self.layers = layers

    def remove(self) -> None:
        """Give the model its own forwards back. A second call does nothing.

        What somebody else put around ours since, such as a hook of ``accelerate``, stays, and calls the codebase's own
        from then on.
        """
        while self._placed:
            self._placed.pop().remove()

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def accelerate(merged_model: nn.Module) -> Accelerated:
    """Make every ``LinearTrainable`` of the codebase's ``SimpleMergeModel`` or ``KernelMergeModel`` compute its
    adapters, with the null-space ratio where it is measured, in one fused call (:func:`nsc_kernels.merged_lora_nsc`).

    The codebase's parameters, optimiser, loop and ``loss_cluster`` stay in place. Outputs, ratios and gradients are
    those of its own layers to rounding, but for these: a ratio is of the row space of A whatever alpha / r is, never
    negative under its root and never infinite in its gradient; adapters of unequal ranks have one coefficient each; and
    ratios are not sent to wandb, for which a GPU has to wait in every layer. Which inputs are measured is decided as by
    its ``activate_projectors``, with the same defaults.

    Call it when the model is on its device.

    Args:
        merged_model: with ``merge_type="weight"`` and ``coeff_type="linear"``.

    Returns:
        A handle: ``remove()`` or leaving its ``with`` block undoes it.

    Raises:
        TypeError: if ``merged_model`` is neither of them.
        ValueError: naming the setting that the kernel has no form for, or a layer whose forward somebody has replaced.
    """
    if not all(hasattr(merged_model, name) for name in ("vit", "lora_dicts", "scaled_name")):
        raise TypeError(
            f"merged_model: expected SimpleMergeModel or KernelMergeModel, found {type(merged_model).__name__}"
        )
    model: Any = merged_model
    for name, value in {"merge_type": "weight", "coeff_type": "linear"}.items():
        if getattr(model, name) != value:
            raise ValueError(f"merged_model.{name}: expected {value!r}, found {getattr(model, name)!r}")
    layers = {
        path: _Fused(path, module, model.scaled_name)
        for path, module in model.vit.model.named_modules()
        if type(module).__name__ == "LinearTrainable"
    }
    if not layers:
        raise ValueError(f"merged_model: expected LinearTrainable layers, found none in {type(model.vit).__name__}")
    changed = next((path for path, layer in layers.items() if "forward" in vars(layer.theirs)), None)
    if changed is not None:
        raise ValueError(
            f"merged_model: expected layers with the codebase's forward, found another one put on {changed}, by an "
            "earlier accelerate or by a hook; remove it first, and put a hook there afterwards"
        )
    placed = [
        _Placed(layer.theirs, "forward", functools.partial(layer.forward, layer.theirs.forward))
        for layer in layers.values()
    ]
    if hasattr(model, "projector_cluster"):
        placed.append(_Placed(model, "activate_projectors", functools.partial(_activate, layers, model)))
    return Accelerated(placed, len(layers))


class _Placed:
    """A method of one object, in the place of its class's, which stays as it is.

    Args:
        owner: the object.
        name: of the method.
        ours: what is called until :meth:`remove`.
    """

    def __init__(self, owner: nn.Module, name: str, ours: Callable[..., Any]) -> None:
        self.owner, self.name = owner, name
        self.theirs, self.called = getattr(owner, name), ours
        setattr(owner, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.called(*args, **kwargs)

    def remove(self) -> None:
        self.called = self.theirs
        if vars(self.owner).get(self.name) is self:
            delattr(self.owner, self.name)


class _Fused:
    """One layer of theirs, and the fused one around the same weight and the same coefficients."""

    def __init__(self, path: str, theirs: Any, name: str) -> None:
        down, diagonal = theirs.lora_A[name]
        up, ranks = theirs.lora_B[name].weight, list(diagonal.adapter_wise_rank)
        if sum(ranks) != down.weight.shape[0] or theirs.lora_B[name].bias is not None:
            raise ValueError(
                f"{path}: expected adapters of ranks {ranks} without biases, found {down.weight.shape[0]} rows of "
                f"lora_A and bias={theirs.lora_B[name].bias is not None}"
            )
        bank = AdapterBank.from_factors(
            down.weight.split(ranks), up.split(ranks, 1), [float(theirs.scaling[name])] * len(ranks)
        )
        self.theirs, self.name = theirs, name
        self.fused = MergedLoRALinear(theirs.base_layer, bank, diagonal.logit)
        # Of a measured input: the adapter that it is measured by, and where its mean ratio goes.
        self.measured: tuple[int, Callable[[Tensor], None]] | None = None

    def forward(self, original: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer = self.theirs
        plain = not args and not kwargs and not layer.disable_adapters and not layer.merged
        if not plain or list(layer.active_adapters) != [self.name]:
            return original(x, *args, **kwargs)
        # The model may have been moved or converted since.
        dtype = layer.lora_A[self.name][0].weight.dtype
        if (self.fused.bank.device, self.fused.bank.dtype) != (x.device, dtype):
            self.fused.bank.to(x.device, dtype)
        if self.measured is None:
            found: Tensor = self.fused(x)
            return found
        adapter, record = self.measured
        used: list[bool] = []
        lam = _IfUsed.apply(self.fused.lam, used)
        y, quad, sqnorm = merged_lora_nsc(x, self.fused.bank, lam, layer.base_layer(x))
        record(null_space_ratio(quad[..., adapter : adapter + 1], sqnorm).mean())
        output: Tensor = _Used.apply(y, used)
        return output

    def remove(self) -> None:
        """As the handle of a hook, which the codebase removes when the task's pass is over."""
        self.measured = None


class _Used(torch.autograd.Function):
    """Notes when a gradient reaches the output of a measured layer."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, used: list[bool]) -> Tensor:
        ctx.used = used
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        ctx.used.append(True)
        return dy, None


class _IfUsed(torch.autograd.Function):
    """No gradient, in place of one of zero, to the coefficients of a layer whose output nothing measured depends on:
    AdamW leaves those alone that have none, and would let the others decay.
    """

    @staticmethod
    def forward(ctx: Any, lam: Tensor, used: list[bool]) -> Tensor:
        ctx.used = used
        return lam.view_as(lam)

    @staticmethod
    def backward(ctx: Any, dlam: Tensor) -> tuple[Tensor | None, None]:
        return dlam if ctx.used else None, None


def _activate(layers: Mapping[str, _Fused], model: Any, *args: Any, **kwargs: Any) -> None:
    """Measure the inputs of the layers whose paths hold a candidate of both, as the codebase decides it."""
    given = inspect.signature(type(model).activate_projectors).bind(model, *args, **kwargs)
    given.apply_defaults()
    _, curr_adapter, block_candidates, layer_candidates = given.args
    model.hook_manager.clear()
    tasks = list(model.lora_dicts)
    if curr_adapter not in tasks:
        raise ValueError(f"curr_adapter: expected one of {tasks}, found {curr_adapter!r}, which has no adapter")
    for key in model.projector_cluster.kernel_projectors[curr_adapter]:
        candidates = (block_candidates.split(","), layer_candidates.split(","))
        if key in layers and all(any(one in key for one in some) for some in candidates):
            record = functools.partial(model.loss_cluster.add_kernel_loss, key, curr_adapter)
            layers[key].measured = tasks.index(curr_adapter), record
            model.hook_manager.handles.append(layers[key])
