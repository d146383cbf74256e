"""PEFT's forward with several active adapters as one fused call per layer::

    from nsc_kernels.integrations.peft import accelerate

    model.base_model.set_adapter(["a", "b", "c"], inference_mode=True)
    with accelerate(model):
        model(**inputs)

``scaling[name]`` of a layer may be a tensor, such as a learnable coefficient times LoRA's own scaling; gradients flow
to it and to the layer's input. The adapters themselves are taken as frozen: without ``inference_mode=True``
``set_adapter`` makes them trainable, and calls are then fused under ``torch.no_grad()`` only.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora.layer import VARIANT_KWARG_KEYS, Linear, LoraLayer
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..bank import FLOAT_DTYPES, AdapterBank
from ..functional import merged_lora, output_dtype
from ..modes import without_autocast
from ..reference import accumulation_dtype

logger = logging.getLogger("nsc_kernels")

# Forwards of PEFT that are the base layer's output and every active adapter's update added to it, by name: most can be
# imported only where the library that quantises the base layer is installed.
_FORWARDS = {
    ("layer", "Linear"),
    ("bnb", "Linear8bitLt"),
    ("bnb", "Linear4bit"),
    ("gptq", "GPTQLoraLinear"),
    ("awq", "AwqLoraLinear"),
    ("hqq", "HqqLoraLinear"),
    ("eetq", "EetqLoraLinear"),
    ("aqlm", "AqlmLoraLinear"),
}


class Accelerated:
    """What :func:`accelerate` did to a model; a context manager.

    Attributes:
        layers: how many layers run fused.
    """

    def __init__(self, layers: dict[nn.Module, functools.partial[Tensor]]) -> None:
        self._layers = layers
        self.layers = len(layers)

    def remove(self) -> None:
        """Give the layers PEFT's own forward back. A second call does nothing.

        A forward that somebody else put around this one since, such as a hook of ``accelerate``, stays, and calls
        PEFT's own from then on.
        """
        while self._layers:
            layer, forward = self._layers.popitem()
            forward.keywords["fused"].clear()
            if vars(layer).get("forward") is forward:
                del layer.forward

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def accelerate(model: nn.Module) -> Accelerated:
    """Make every linear of PEFT's LoRA in ``model`` compute its active adapters in one fused call: of
    ``peft.tuners.lora.Linear`` and of the layers that PEFT puts around quantised linears, which keep their own forward
    (bitsandbytes, torchao, GPTQ, AWQ, HQQ, EETQ, AQLM).

    The model's modules, parameters and adapters stay where they are; activating, adding, deleting, merging,
    hot-swapping and disabling adapters works as before. Every call packs the active adapters as they are then: nothing
    is kept between calls, and no change to a weight, however it is made, is missed. The packing copies these adapters
    once per call.

    The output has the dtype that PEFT's has, and differs from it by the rounding of the low-rank part alone: the update
    is computed in the adapters' dtype (autocast's under ``torch.autocast``) and rounded once, where PEFT rounds every
    adapter's. A base output that this dtype cannot hold, such as float32 under bfloat16 adapters, is not rounded to it.

    A call that the kernel cannot express goes through PEFT's own forward, and the first one of each kind is logged as a
    warning with the reason: dropout in training mode, DoRA and other variants, batches with ``adapter_names``, adapters
    that are being trained, adapters of several dtypes or devices or of complex numbers, nested tensors, DTensors and
    other inputs or factors that are no plain dense tensors, hooks on the modules in ``lora_A``, ``lora_B`` and
    ``lora_dropout`` or on all modules, or other modules than PEFT's in their place.

    What is fused is differentiable once: a second derivative raises a RuntimeError, where PEFT's forward has one.
    ``torch.func`` transforms have theirs.

    Under ``torch.compile`` a layer is the operator ``nsc::merged_lora`` in the graph, which it does not break
    (``fullgraph=True`` and dynamic shapes work); what goes to PEFT's own forward is traced as that is.

    Layers that PEFT creates later, for an adapter on further modules, are not touched, nor are other kinds (embeddings,
    convolutions, a forward of their own), of which a warning says which and why. A copy of an accelerated model
    (``copy.deepcopy``, pickle) is accelerated as well, and no handle undoes that: copy the model first. The replicas
    of ``torch.nn.DataParallel`` call the layers of the first device, and raise on any other;
    ``DistributedDataParallel`` makes none. An accelerated layer refers to itself: a model that is dropped before
    ``remove()`` is freed when Python next collects garbage, and not at once.

    Args:
        model: a ``PeftModel``, or any module that holds PEFT's LoRA layers.

    Returns:
        A handle: ``remove()`` or leaving its ``with`` block restores PEFT's forward.

    Raises:
        TypeError: for what is no module.
        ValueError: if there is no such layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a PeftModel or another module, found {type(model).__name__}; of a pipeline, give a model "
            "of it, such as pipe.unet, or take nsc_merge.integrations.diffusers.accelerate"
        )
    adapted: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if not any(isinstance(layer, Linear) or _is_known(layer) for layer in adapted.values()):
        raise ValueError(f"model: expected peft.tuners.lora.Linear layers, found none in {type(model).__name__}")
    reasons = {name: _unfusible(layer) for name, layer in adapted.items()}
    fused = [layer for name, layer in adapted.items() if reasons[name] is None]
    for reason, count in Counter(filter(None, reasons.values())).items():
        first = next(name for name in reasons if reasons[name] == reason)
        logger.warning("%d of %d LoRA layers are not accelerated, %r first: %s", count, len(adapted), first, reason)
    forwards = {layer: functools.partial(_forward, layer, layer.forward, fused=[True]) for layer in fused}
    for layer, forward in forwards.items():
        setattr(layer, "forward", forward)  # noqa: B010
    return Accelerated(forwards)


def _unfusible(layer: Any) -> str | None:
    """Why a layer keeps the forward that it has, or None."""
    if not _is_known(layer):
        return f"{type(layer).__module__}.{type(layer).__qualname__} has another forward than peft.tuners.lora.Linear"
    forward = vars(layer).get("forward")
    if isinstance(forward, functools.partial) and forward.func is _forward:
        # What was undone comes back with the hook that it was under.
        return "they run fused already" if forward.keywords["fused"] else None
    return None if forward is None else "a forward was put on the layer itself, such as a hook of accelerate's"


def _is_known(layer: Any) -> bool:
    forward = type(layer).forward
    package, _, file = forward.__module__.rpartition(".")
    return package == "peft.tuners.lora" and (file, forward.__qualname__.removesuffix(".forward")) in _FORWARDS


def _packed(down: list[Tensor], up: list[Tensor]) -> AdapterBank:
    """The adapters as they are now.

    Not kept from one call to the next: fused optimisers, PEFT's hotswap_adapter and whoever else writes through
    ``.data`` leave no trace on a tensor. Looking at its contents instead would cost about as much as
    packing, and make the host wait for a GPU.
    """
    offsets = list(itertools.accumulate((A.shape[0] for A in down), initial=0))
    # Autocast's torch.cat refuses float64, and each narrow dtype but autocast's own.
    with torch.no_grad(), without_autocast(down[0].device.type):
        # Not whitened: only the null-space statistics, which PEFT's forward does not have, would need that.
        return AdapterBank(torch.cat(down), torch.cat([B.t() for B in up]), offsets)


def _forward(
    layer: Any, original: Callable[..., Tensor], x: Tensor, *args: Any, fused: list[bool], **kwargs: Any
) -> Tensor:
    """The layer's forward, fused where it can be; PEFT's own once ``remove`` has emptied ``fused``."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if not fused or layer.disable_adapters or layer.merged or not names:
        return original(x, *args, **kwargs)
    reason = _inexpressible(layer, names, x, kwargs)
    if reason is not None:
        _report(reason)
        return original(x, *args, **kwargs)
    down = [layer.lora_A[name].weight for name in names]
    up = [layer.lora_B[name].weight for name in names]
    for key in VARIANT_KWARG_KEYS + ["adapter_names"]:
        kwargs.pop(key, None)
    result = layer.base_layer(x, *args, **kwargs)
    z = layer._cast_input_dtype(x, down[0].dtype)
    scaling = torch.stack([_scalar(layer.scaling[name], z) for name in names])
    narrow = output_dtype(z)
    # A result that this dtype cannot hold is not rounded to it: the update is added in the wider one, as by PEFT.
    held = torch.promote_types(result.dtype, narrow) is narrow
    y = merged_lora(z, _packed(down, up), scaling, result.to(narrow) if held else None)
    biases = [(k, layer.lora_B[name].bias) for k, name in enumerate(names) if layer.lora_B[name].bias is not None]
    for k, bias in biases:
        y = y + (scaling[k] * bias).to(y.dtype)
    return (y if held else result + y).to(result.dtype)


def _scalar(scaling: float | Tensor, like: Tensor) -> Tensor:
    wide = accumulation_dtype(like.dtype)
    if isinstance(scaling, Tensor):
        return scaling.to(like.device, wide).reshape(())
    # Filled in on the device: a copy from the host's memory would wait for a GPU.
    return torch.full((), scaling, dtype=wide, device=like.device)


def _inexpressible(layer: Any, names: list[str], x: Tensor, kwargs: dict[str, Any]) -> str | None:
    """Why a call needs PEFT's own forward, or None."""
    if kwargs.get("adapter_names") is not None:
        return "a batch with adapter_names applies other adapters to every row"
    if any(name in layer.lora_variant for name in names):
        return "DoRA and other variants are not a plain low-rank update"
    dropouts = [layer.lora_dropout[name] for name in names]
    if any(dropout.training and getattr(dropout, "p", 0) for dropout in dropouts):
        return "dropout in training mode gives every adapter an input of its own"
    products = [factors[name] for factors in (layer.lora_A, layer.lora_B) for name in names]
    biased = any(getattr(layer.lora_A[name], "bias", None) is not None for name in names)
    if biased or has_any_global_hook() or not all(_is_plain(module) for module in (*products, *dropouts)):
        return "the modules of an adapter, or all modules, have hooks, or are not PEFT's own"
    weights = [product.weight for product in products]
    if not all(_is_dense(tensor) for tensor in (x, *weights)):
        return "the input or the adapters are no plain dense tensors"
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
        return "the adapters are being trained (frozen are those of set_adapter(..., inference_mode=True))"
    if len({(weight.dtype, weight.device) for weight in weights}) > 1 or weights[0].device != x.device:
        return "the adapters have several dtypes or devices"
    if weights[0].dtype not in FLOAT_DTYPES:
        return f"the adapters are of {weights[0].dtype}, which the kernel does not compute in"
    if not layer.cast_input_dtype_enabled and x.dtype is not weights[0].dtype:
        return "casting of the input is disabled, and input and adapters have different dtypes"
    if any(isinstance(s, Tensor) and s.numel() != 1 for s in (layer.scaling[name] for name in names)):
        return "scaling holds more than one value"
    return None


def _is_plain(module: nn.Module) -> bool:
    """Whether calling ``module`` is what its class does, and nothing else: no subclass, hook or wrapper."""
    return (
        type(module) in (nn.Linear, nn.Dropout, nn.Identity)
        and "forward" not in vars(module)
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
    )


def _is_dense(tensor: Tensor) -> bool:
    """Whether the numbers are the tensor's own, one after another: not nested, sparse, nor held by a wrapper."""
    return tensor.layout is torch.strided and not tensor.is_nested and not is_traceable_wrapper_subclass(tensor)


@functools.cache
def _say_once(reason: str) -> None:
    logger.warning("PEFT's own forward serves some calls: %s", reason)


@torch.compiler.assume_constant_result
def _report(reason: str) -> None:
    """Say it, under torch.compile while the call is traced: a logger in the graph would break it."""
    _say_once(reason)
