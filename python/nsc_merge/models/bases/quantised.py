"""Linears whose weight is kept as codes, by whatever library: how they are told apart, measured through and turned back
into numbers.

Nothing here knows how codes are laid out. A quantised linear is a module with ``in_features``, ``out_features`` and a
forward, and its forward is what counts: that of bitsandbytes' 8-bit layers rounds their input as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from nsc_kernels import MergedLoRALinear
from nsc_kernels.devices import to_float64
from nsc_merge.adapters.algebra.low_rank import Rows
from nsc_merge.models.bases.numbers import Stored
from nsc_merge.models.bases.placement import PLAIN
from nsc_merge.models.bases.stored_weights import FLOATS, is_compressed, is_dtensor, numbers_of, offloading, stored

# An nn.Linear, or another module with its in_features, out_features and forward, for which Python has no type.
Linear: TypeAlias = Any

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# bitsandbytes' word for a linear that it may lay out anew.
_REPACKS = "support_avx512bf16_for_cpu"
# Unit vectors that a linear is run on at once.
_ROWS = 1024
# Of what a forward gives and what its backward promises; 8-bit inputs are off by about a hundredth.
_TOLERANCE = 0.2


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear that adapters can be merged onto: an ``nn.Linear``, or one that only has its
    ``in_features``, ``out_features`` and forward. Neither PEFT's layers nor merged linears are: they are around one.
    Nor is an MLP that is called by its sizes, as timm's are.
    """
    if isinstance(module, MergedLoRALinear) or hasattr(module, "base_layer"):
        return False
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if isinstance(module, nn.Linear) or not all(isinstance(size, int) for size in sizes):
        return isinstance(module, nn.Linear)
    return not any(isinstance(one, _LAYERS) for one in module.modules())


def is_quantised(linear: Linear) -> bool:
    """Whether a linear keeps codes that only its own forward can read."""
    if not isinstance(linear, nn.Linear) or is_compressed(linear):
        return True
    weight = linear._parameters.get("weight")
    if weight is None or is_dtensor(weight):
        return False
    if type(weight) is nn.Parameter:
        return weight.dtype not in FLOATS and type(linear) is not nn.Linear
    return True


def activations_of(model: nn.Module, path: str, linear: Linear) -> tuple[torch.dtype, torch.device]:
    """Dtype in which a quantised linear takes and gives activations, and its device.

    The dtype is that of the float parameters next to it, such as its block's norms, and not the one that a library may
    compute in inside (``compute_dtype``): inputs come in the former, and merged updates are added to outputs in it.

    Raises:
        ValueError: if nothing around the linear tells the dtype.
    """
    hook = offloading(linear)
    weight = getattr(linear, "weight", None)
    held = next((value for value in (*linear.parameters(), *linear.buffers())), None)
    device = torch.device("cpu") if held is None else held.device
    if hook is not None:
        device = torch.device(hook.execution_device)
    if isinstance(linear, nn.Linear) and isinstance(weight, Tensor) and weight.dtype in FLOATS:
        return weight.dtype, device
    around = path
    while around:
        around = around.rpartition(".")[0]
        for module in model.get_submodule(around).modules():
            # Neither scales nor coefficients of attached adapters are of the dtype of activations.
            if isinstance(module, MergedLoRALinear) or (is_linear(module) and is_quantised(module)):
                continue
            for value in module._parameters.values():
                if value is not None and value.dtype in FLOATS:
                    return value.dtype, device
    bias = getattr(linear, "bias", None)
    if isinstance(bias, Tensor) and bias.dtype in FLOATS:
        return bias.dtype, device
    raise ValueError(f"{path}: expected a float parameter in the model that tells the dtype of activations, found none")


@dataclass(frozen=True)
class Dequantised(Stored):
    """Numbers that a quantised linear computes with; they are read only.

    Attributes:
        dtype: that merged numbers are rounded to, the one of the activations.
    """

    dtype: torch.dtype

    def rounded(self) -> Tensor:
        """The numbers alone, in that dtype."""
        return self.values.to(self.dtype)

    def plus(self, update: Rows) -> Tensor:
        return update(0, len(self.values)).add_(self.values).to(self.dtype)

    def write(self, values: Tensor) -> None:
        raise AssertionError("codes cannot hold a merged weight")


def stored_or_dequantised(model: nn.Module, name: str) -> Stored:
    """As :func:`nsc_merge.models.bases.stored_weights.stored`; of a quantised linear, what its codes stand for.

    Raises:
        ValueError: as there.
    """
    path, _, part = name.rpartition(".")
    linear = model.get_submodule(path)
    if not is_linear(linear) or not is_quantised(linear):
        return stored(model, name)
    dtype, _ = activations_of(model, path, linear)
    if part == "weight":
        return Dequantised(dequantised(model, path), dtype)
    bias = getattr(linear, part, None)
    if not isinstance(bias, Tensor):
        raise ValueError(f"{name}: expected a tensor, found none in {type(linear).__name__}")
    return Dequantised(numbers_of(model, name, bias.detach()), dtype)


@torch.no_grad()
def dequantised(model: nn.Module, path: str) -> Tensor:
    """The weight ``[d_out, d_in]`` that a quantised linear computes with, in the dtype that its library gives it.

    Where the library has a way to say (bitsandbytes, HQQ, torchao, quanto), it does; elsewhere what the linear makes of
    unit vectors is its weight.

    Raises:
        ValueError: if it cannot be run by itself.
    """
    from peft.utils.integrations import dequantize_module_weight

    linear: Linear = model.get_submodule(path)
    weight = getattr(linear, "weight", None)
    kind = type(weight)
    packed = getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False)
    known = hasattr(linear, "W_q") or kind.__module__.startswith(("torchao.", "bitsandbytes."))
    if known and not packed and offloading(linear) is None:
        return dequantize_module_weight(linear).detach()
    if kind.__module__.startswith("optimum.") and isinstance(weight, Tensor):
        return weight.detach().dequantize()
    _check_runs(path, linear)
    dtype, device = activations_of(model, path, linear)
    columns = []
    bias = getattr(linear, "bias", None)
    try:
        if bias is not None:
            linear.bias = None
        for start in range(0, linear.in_features, _ROWS):
            rows = torch.zeros(min(_ROWS, linear.in_features - start), linear.in_features, dtype=dtype, device=device)
            rows[:, start:].fill_diagonal_(1)
            columns.append(linear(rows))
    finally:
        if bias is not None:
            linear.bias = bias
    return torch.cat(columns).t()


def keep_gradients(model: nn.Module) -> list[nn.Module]:
    """Have bitsandbytes leave 4-bit weights in the layout whose products have gradients: on processors with AVX512-BF16
    it lays them out anew for inference, once and for all, at the first call without a gradient. Returns the linears
    that this concerns.
    """
    found = [module for module in model.modules() if getattr(module, _REPACKS, False)]
    for module in found:
        setattr(module, _REPACKS, False)
    return found


@contextmanager
def keeping_gradients(model: nn.Module) -> Iterator[None]:
    """:func:`keep_gradients` for the duration of a ``with`` block."""
    found = keep_gradients(model)
    try:
        yield
    finally:
        for module in found:
            setattr(module, _REPACKS, True)


def check_gradients(model: nn.Module) -> None:
    """Refuse a model with a quantised linear, or experts, that lose the gradient of their input: many kernels for
    inference do, and the merge would learn from what is left of it.

    Each linear is run on two rows, and its gradient compared with what it computes: its output without its bias, times
    itself, is its input times the gradient of half that.

    Raises:
        ValueError: naming the first such module.
    """
    for path, module in model.named_modules():
        if _are_experts_in_codes(module):
            raise _no_gradient(path, module)
        if not is_linear(module) or not is_quantised(module):
            continue
        parent = model.get_submodule(path.rpartition(".")[0])
        place = path.removesuffix(".linear") if isinstance(parent, MergedLoRALinear) else path
        _check_runs(place, module)
        dtype, device = activations_of(model, path, module)
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(1, module.in_features, generator=generator, device="cpu").to(device, dtype)
        with torch.enable_grad():
            z = torch.cat([z, torch.zeros_like(z)]).requires_grad_()
            y = module(z)
            if not isinstance(y, Tensor):  # I-BERT's, which give the scale of their integers too, take no adapter
                continue
            given = to_float64(y.detach())
            given = given - given[1]
            found = None
            if y.requires_grad:
                (found,) = torch.autograd.grad(y, z, given.to(y), allow_unused=True)
        size = float(given.square().sum())
        promised = 0.0 if found is None else float((to_float64(found) * to_float64(z.detach())).sum())
        if abs(promised - size) > _TOLERANCE * size:
            raise _no_gradient(place, module)


def _no_gradient(path: str, module: nn.Module) -> ValueError:
    return ValueError(
        f"{path}: expected a module whose output has a gradient for its input, found a {type(module).__name__} that "
        f"has none or a wrong one; load the base in plain numbers (fp8, mxfp4, compressed-tensors: quantization: "
        f"{PLAIN}, or {PLAIN}=True in the quantization_config) or for training rather than for inference (GPTQ, AWQ: "
        "backend='auto_trainable'; bitsandbytes' 4 bits on a CPU: anew, as running the model changed their layout), or "
        "use a method without gradients"
    )


def _are_experts_in_codes(module: nn.Module) -> bool:
    """Whether a module is transformers' for experts of files in fp8 or mxfp4, whose kernels have no backward."""
    return type(module).__module__.startswith("transformers.integrations.") and hasattr(module, "num_experts")


def _check_runs(path: str, linear: Linear) -> None:
    """Refuse a linear that does not run by itself until the whole model has."""
    status = getattr(linear, "quantization_status", None)
    if is_compressed(linear) and getattr(status, "value", None) == "compressed":
        raise ValueError(
            f"{path}: expected numbers, found codes of compressed-tensors; load the base with {PLAIN}=True in its "
            "quantization_config, or run the model once first, which decompresses them"
        )
