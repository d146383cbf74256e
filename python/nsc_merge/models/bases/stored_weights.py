"""Where the numbers of a linear's parameters are: in the parameter itself, in accelerate's store of offloaded weights,
in the shards of a DTensor, or still in the file of a model that was loaded without them.

What is kept in any other way is refused: quantised codes, flattened shards and weights that are computed from other
parameters are no numbers that an update can be added to.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from nsc_merge.models.bases.numbers import UNLOADED, InFile, OnDisk, Sharded, Stored, file_tensor
from nsc_merge.models.bases.transposed import is_transposed

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_KINDS = "float64, float32, bfloat16 or float16"
_UNQUANTISED = (
    "use format 'lora' and load it on the quantised base, save format 'model' with dequantize=True, or load the base "
    "in bfloat16"
)


def is_plain(weight: Tensor) -> bool:
    """Whether a tensor's own numbers are the weight: no subclass, no packed or narrow format, no meta device."""
    return _holds_floats(weight) and weight.device.type != "meta"


class NotAtHand(Tensor):
    """Shape and dtype of a weight that is offloaded or quantised, to be looked at. Computing with it is refused: torch
    multiplies by a meta tensor without complaint.
    """

    path: str

    @classmethod
    def of(cls, weight: Tensor, shape: tuple[int, int], path: str) -> NotAtHand:
        """In place of a linear's ``weight``, for the linear at ``path``."""
        stand_in = torch.empty(shape, dtype=weight.dtype, device="meta").as_subclass(cls)
        stand_in.path = path
        return stand_in

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ == "__get__":
            found = super().__torch_function__(func, types, args, kwargs)
            if not isinstance(found, Tensor):
                return found
        path = next(value.path for value in (*args, *kwargs.values()) if isinstance(value, cls))
        raise RuntimeError(
            f"{path}: the model computes with its weight by itself, which is offloaded or quantised, so that the "
            "update would be left out; expected that layer plain and on a device"
        )


# The names of a linear's parameters.
_LINEAR = ("weight", "bias")
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


def stored(model: nn.Module, name: str) -> Stored:
    """Where the numbers of a weight or bias of a linear, embedding, norm or convolution are.

    Args:
        model: it belongs to.
        name: path of the parameter.

    Raises:
        ValueError: naming the parameter and how it is kept, if that is in no way that an update can be added to.
    """
    path, _, part = name.rpartition(".")
    linear: Any = model.get_submodule(path)
    own = linear._parameters.get("weight")
    # A norm's or a router's, or that of experts; attachment says which modules can be merged.
    other = not hasattr(linear, "in_features") and isinstance(own, nn.Parameter)
    whole = isinstance(linear, (nn.Embedding, *_CONVOLUTIONS)) or other or part not in _LINEAR
    if not (isinstance(linear, nn.Linear) or whole or is_transposed(linear)) or is_compressed(linear):
        found = "what compressed-tensors keeps" if is_compressed(linear) else f"a {type(linear).__name__}"
        raise ValueError(f"{name}: expected a plain parameter in {_KINDS}, found {found}; {_UNQUANTISED}")
    parameter = linear._parameters.get(part)
    shape = _shape(linear, part)
    if parameter is None:
        raise ValueError(
            f"{name}: expected a parameter, found one that is computed from others; remove the parametrization or "
            "weight norm first, or use format 'lora'"
        )
    if is_dtensor(parameter):
        _check_shards(name, parameter)
        return Sharded(parameter.detach())
    place = _offloaded(linear, part) or _in_file(parameter) or Stored(parameter.detach())
    if type(parameter) is not nn.Parameter or not _holds_floats(place.values):
        raise ValueError(
            f"{name}: expected a plain parameter in {_KINDS}, found {described(parameter)}; {_UNQUANTISED}"
        )
    if list(place.values.shape) != shape:
        raise ValueError(
            f"{name}: expected shape {shape}, found {list(place.values.shape)}: a shard, or a packed weight; "
            "gather the whole weight first, or use format 'lora'"
        )
    if place.device.type == "meta":
        raise ValueError(f"{name}: expected numbers, found the meta device; load the model's weights first")
    return place


def _shape(module: Any, part: str) -> list[int]:
    """What the shape of a parameter should be."""
    if is_transposed(module):
        return [module.nx, module.nf] if part == "weight" else [module.nf]
    if isinstance(module, _TRANSPOSED):
        shape = [module.in_channels, module.out_channels // module.groups, *module.kernel_size]
        return shape if part == "weight" else [module.out_channels]
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        shape = [module.out_channels, module.in_channels // module.groups, *module.kernel_size]
    elif isinstance(module, nn.Embedding):
        shape = [module.num_embeddings, module.embedding_dim]
    elif isinstance(module, nn.Linear):
        shape = [module.out_features, module.in_features]
    else:
        return list(module._parameters[part].shape) if part in module._parameters else []
    return shape if part == "weight" else shape[:1]


def is_compressed(linear: nn.Module) -> bool:
    """Whether compressed-tensors gave an nn.Linear codes and a forward of its own. Its first call may turn them into
    numbers, which that forward goes on rounding.
    """
    return hasattr(linear, "quantization_status") and "forward" in vars(linear)


def is_dtensor(parameter: Tensor) -> bool:
    """Whether it is a ``torch.distributed.tensor.DTensor``."""
    if type(parameter) is nn.Parameter or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)


def offloading(module: nn.Module) -> Any:
    """accelerate's hook that brings a module's weights from elsewhere for every call, None if there is none."""
    hook = getattr(module, "_hf_hook", None)
    return next((one for one in getattr(hook, "hooks", (hook,)) if getattr(one, "offload", False)), None)


def is_finite(values: Tensor) -> bool:
    """Whether all the numbers are finite that this process holds."""
    own: Any = values
    own = own.to_local() if is_dtensor(values) else own
    # What is not finite makes the sum so too; the other way round, it may be no more than large.
    return bool(own.sum().isfinite()) or bool(own.isfinite().all())


def check_in_memory(model: nn.Module) -> None:
    """Refuse a model that was loaded without its numbers.

    Raises:
        ValueError: saying how to load it.
    """
    if any(file_tensor(parameter) is not None for parameter in model.parameters()):
        raise ValueError(UNLOADED)


def check_loaded(model: nn.Module) -> None:
    """Refuse a model whose weights are nowhere, or let no gradient through.

    Raises:
        ValueError: naming the first of them.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ValueError(
                f"model: {name} was made inside torch.inference_mode(), so that no gradient can pass through it; "
                "expected a model that was loaded outside; a merge may be called inside"
            )
    check_in_memory(model)
    hooks = {path: hook for path, module in model.named_modules() if (hook := offloading(module)) is not None}
    filled = tuple(f"{path}." if path else "" for path, hook in hooks.items() if hook.place_submodules)
    for path, module in model.named_modules():
        for part, parameter in module._parameters.items():
            if parameter is None or parameter.device.type != "meta" or path in hooks or path.startswith(filled):
                continue
            raise ValueError(f"model: expected loaded weights, found {path}.{part} on the meta device; load them first")


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its inputs: where its first parameter is, or is brought to, be it only to be read."""
    for module in model.modules():
        parameter = next((value for value in module._parameters.values() if value is not None), None)
        if parameter is not None:
            if (there := file_tensor(parameter)) is not None:
                return there.device
            hook = offloading(module)
            return parameter.device if hook is None else torch.device(hook.execution_device)
    raise ValueError(f"model: expected parameters, found none in {type(model).__name__}")


def sharing(model: nn.Module) -> dict[str, list[str]]:
    """Path of every parameter -> the paths of all parameters that have the same numbers in memory, its own included."""
    groups: dict[Hashable, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for part, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{path}.{part}" if path else part
                groups.setdefault(_address(module, part, parameter), []).append(name)
    return {name: names for names in groups.values() for name in names}


def state_of(model: nn.Module) -> dict[str, Any]:
    """``model.state_dict()`` with the numbers of offloaded weights, wherever they are.

    Raises:
        ValueError: naming a tensor that is sharded over processes, or has no numbers.
    """
    state = model.state_dict()
    for name, value in state.items():
        if isinstance(value, Tensor) and is_dtensor(value):
            raise ValueError(
                f"{name}: expected a whole tensor, found a DTensor; gather the model first, or use format 'lora'"
            )
        if isinstance(value, Tensor):
            state[name] = numbers_of(model, name, value)
    return state


def numbers_of(model: nn.Module, name: str, value: Tensor) -> Tensor:
    """A parameter or buffer ``value`` of any module, by its path ``name``: whole, from wherever its numbers are.

    Raises:
        ValueError: naming it, if it has none.
    """
    if is_dtensor(value):
        return Sharded(value.detach()).whole()
    if value.device.type != "meta":
        return value
    path, _, part = name.rpartition(".")
    module = model.get_submodule(path)
    place = _offloaded(module, part) or _in_file(module._parameters.get(part), module._buffers.get(part))
    if place is None:
        raise ValueError(f"{name}: expected numbers, found the meta device; load the model's weights first")
    return place.whole()


def described(parameter: Tensor) -> str:
    """How a parameter is kept, for messages."""
    kind = type(parameter)
    name = "a parameter" if kind is nn.Parameter else f"{kind.__module__}.{kind.__name__}"
    return f"{name} in {str(parameter.dtype).removeprefix('torch.')}"


def _holds_floats(values: Tensor) -> bool:
    return type(values) in (Tensor, nn.Parameter) and values.layout is torch.strided and values.dtype in FLOATS


def maps_of(module: nn.Module, part: str = "") -> tuple[Any, dict[str, Tensor], str] | None:
    """accelerate's map of a module's offloaded numbers, the part of it in memory, and what a parameter is called there;
    None if they are not offloaded.
    """
    hook = offloading(module)
    if hook is None:
        return None
    numbers: Any = hook.weights_map
    while hasattr(numbers, "prefix"):
        numbers, part = numbers.dataset, f"{numbers.prefix}{part}"
    return numbers, getattr(numbers, "state_dict", numbers), part


def _offloaded(module: nn.Module, part: str) -> Stored | None:
    """Where accelerate keeps a parameter's numbers, None if it does not."""
    maps = maps_of(module, part)
    if maps is None:
        return None
    numbers, held, name = maps
    if name in held:
        return Stored(held[name].detach())
    try:
        return OnDisk(numbers[name], held, name)
    except KeyError:
        return None


def _in_file(*tensors: Tensor | None) -> Stored | None:
    """Where in a file the numbers are of the first tensor that has some there."""
    for tensor in tensors:
        if tensor is not None and (file := file_tensor(tensor)) is not None:
            return InFile(tensor.detach(), file)
    return None


def _address(module: nn.Module, part: str, parameter: Tensor) -> Hashable:
    values, maps = parameter, maps_of(module, part)
    if maps is not None and maps[2] in maps[1]:
        values = maps[1][maps[2]]
    return (values.device, values.data_ptr()) if is_plain(values) and values.numel() else id(parameter)


def _check_shards(name: str, parameter: Any) -> None:
    from torch.distributed.tensor import Replicate, Shard

    unknown = [one for one in parameter.placements if type(one) not in (Replicate, Shard)]
    if unknown or parameter.to_local().dtype not in FLOATS or type(parameter.to_local()) is not Tensor:
        raise ValueError(
            f"{name}: expected a DTensor in {_KINDS} with placements Shard and Replicate, "
            f"found {list(parameter.placements)} of {described(parameter.to_local())}; gather it first, or use "
            "format 'lora'"
        )
