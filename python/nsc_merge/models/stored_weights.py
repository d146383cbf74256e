"""Where the numbers of a linear's parameters are: in the parameter itself, in accelerate's store of offloaded weights,
or in the shards of a DTensor.

What is kept in any other way is refused: quantised codes, flattened shards and weights that are computed from other
parameters are no numbers that an update can be added to.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_KINDS = "float64, float32, bfloat16 or float16"
_UNQUANTISED = (
    "use format 'lora' and load it on the quantised base, save format 'model' with dequantize=True, or load the base "
    "in bfloat16"
)


def is_plain(weight: Tensor) -> bool:
    """Whether a tensor's own numbers are the weight: no subclass, no packed or narrow format, no meta device."""
    return _holds_floats(weight) and weight.device.type != "meta"


@dataclass(frozen=True)
class Stored:
    """The numbers of a parameter, in memory.

    Attributes:
        values: they themselves, detached.
    """

    values: Tensor

    def whole(self) -> Tensor:
        """All of them as one plain tensor."""
        return self.values

    def plus(self, update: Tensor) -> Tensor:
        """With ``update`` added in float64 and rounded once, as :meth:`write` takes them."""
        return _plus(self.values, update)

    def write(self, values: Tensor) -> None:
        """Put others in their place."""
        with torch.no_grad():
            self.values.copy_(values)

    @contextmanager
    def holding(self, values: Tensor) -> Iterator[None]:
        """Others in their place for the duration of a ``with`` block."""
        before = self.values.clone()
        self.write(values)
        try:
            yield
        finally:
            self.write(before)


@dataclass(frozen=True)
class Sharded(Stored):
    """The numbers of a DTensor: every process holds and changes its own."""

    def whole(self) -> Tensor:
        values: Any = self.values
        return values.full_tensor()

    def plus(self, update: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Replicate

        values: Any = self.values
        mesh, own = values.device_mesh, values.to_local()
        # Every process has the whole update, so that taking its shard of it sends nothing.
        update = DTensor.from_local(update.to(own.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
        part = update.redistribute(placements=values.placements).to_local()
        return DTensor.from_local(
            _plus(own, part), mesh, values.placements, run_check=False, shape=values.shape, stride=values.stride()
        )


@dataclass(frozen=True)
class OnDisk(Stored):
    """Numbers that accelerate reads from a file whenever they are needed. The file stays as it is: it may be the
    checkpoint itself. Others are held in memory in its stead.

    Attributes:
        held: name -> numbers that accelerate takes in place of a file's.
        name: of these.
    """

    held: dict[str, Tensor]
    name: str

    def write(self, values: Tensor) -> None:
        self.held[self.name] = values

    @contextmanager
    def holding(self, values: Tensor) -> Iterator[None]:
        self.write(values)
        try:
            yield
        finally:
            del self.held[self.name]


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


def _plus(values: Tensor, update: Tensor) -> Tensor:
    return (values.double() + update.to(values.device)).to(values.dtype)


def stored(model: nn.Module, name: str) -> Stored:
    """Where the numbers of a linear's weight or bias are.

    Args:
        model: it belongs to.
        name: path of the parameter.

    Raises:
        ValueError: naming the parameter and how it is kept, if that is in no way that an update can be added to.
    """
    path, _, part = name.rpartition(".")
    linear: Any = model.get_submodule(path)
    if not isinstance(linear, nn.Linear) or is_compressed(linear):
        found = "what compressed-tensors keeps" if is_compressed(linear) else f"a {type(linear).__name__}"
        raise ValueError(f"{name}: expected a plain parameter in {_KINDS}, found {found}; {_UNQUANTISED}")
    parameter = linear._parameters.get(part)
    shape = [linear.out_features, linear.in_features][: 2 if part == "weight" else 1]
    if parameter is None:
        raise ValueError(
            f"{name}: expected a parameter, found one that is computed from others; remove the parametrization or "
            "weight norm first, or use format 'lora'"
        )
    if is_dtensor(parameter):
        _check_shards(name, parameter)
        return Sharded(parameter.detach())
    numbers = _offloaded(linear, part)
    place = numbers or Stored(parameter.detach())
    if type(parameter) is not nn.Parameter or not _holds_floats(place.values):
        raise ValueError(
            f"{name}: expected a plain parameter in {_KINDS}, found {described(parameter)}; {_UNQUANTISED}"
        )
    if list(place.values.shape) != shape:
        raise ValueError(
            f"{name}: expected shape {shape}, found {list(place.values.shape)}: a shard, or a packed weight; "
            "gather the whole weight first, or use format 'lora'"
        )
    if place.values.device.type == "meta":
        raise ValueError(f"{name}: expected numbers, found the meta device; load the model's weights first")
    return place


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
    return bool((own.to_local() if is_dtensor(values) else own).isfinite().all())


def check_loaded(model: nn.Module) -> None:
    """Refuse a model whose weights are nowhere.

    Raises:
        ValueError: naming the first of them.
    """
    hooks = {path: hook for path, module in model.named_modules() if (hook := offloading(module)) is not None}
    filled = tuple(f"{path}." if path else "" for path, hook in hooks.items() if hook.place_submodules)
    for path, module in model.named_modules():
        for part, parameter in module._parameters.items():
            if parameter is None or parameter.device.type != "meta" or path in hooks or path.startswith(filled):
                continue
            raise ValueError(f"model: expected loaded weights, found {path}.{part} on the meta device; load them first")


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its inputs: where its first parameter is, or is brought to."""
    for module in model.modules():
        parameter = next((value for value in module._parameters.values() if value is not None), None)
        if parameter is not None:
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
    place = _offloaded(model.get_submodule(path), part)
    if place is None:
        raise ValueError(f"{name}: expected numbers, found the meta device; load the model's weights first")
    return place.values


def described(parameter: Tensor) -> str:
    """How a parameter is kept, for messages."""
    kind = type(parameter)
    name = "a parameter" if kind is nn.Parameter else f"{kind.__module__}.{kind.__name__}"
    return f"{name} in {str(parameter.dtype).removeprefix('torch.')}"


def _holds_floats(values: Tensor) -> bool:
    return type(values) in (Tensor, nn.Parameter) and values.layout is torch.strided and values.dtype in FLOATS


def _maps(module: nn.Module, part: str) -> tuple[Any, dict[str, Tensor], str] | None:
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
    maps = _maps(module, part)
    if maps is None:
        return None
    numbers, held, name = maps
    if name in held:
        return Stored(held[name].detach())
    try:
        return OnDisk(numbers[name], held, name)
    except KeyError:
        return None


def _address(module: nn.Module, part: str, parameter: Tensor) -> Hashable:
    values, maps = parameter, _maps(module, part)
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
