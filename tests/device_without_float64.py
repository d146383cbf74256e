"""A device that has no float64, as Apple's GPUs have none: ``"small"``, whose tensors lie on the CPU behind it.

To be imported in a process of its own: what a device is called is settled once.
"""

from __future__ import annotations

import builtins
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "small"
# Operations that take tensors of the host beside the device's, as on a GPU.
MIXING = {"copy_", "index", "index_put", "index_put_", "_index_put_impl_"}
_setup_privateuseone_for_python_backend(NAME)


class Narrow(Tensor):
    """A tensor on the device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Narrow:
        if held.dtype is torch.float64:
            raise TypeError(f"{NAME} has no float64")
        found = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=f"{NAME}:0"
        )
        found.held = held
        return found

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(op, *args, **(kwargs or {}))


def run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation on the tensors behind the device's."""
    device = kwargs.get("device")
    to_cpu = device is not None and torch.device(device).type == "cpu"
    if device is not None:
        kwargs["device"] = torch.device("cpu")
    if kwargs.get("dtype") is torch.float64 and not to_cpu:
        raise TypeError(f"{NAME} has no float64")
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    strangers = [x for x in given if not isinstance(x, Narrow) and x.dim() > 0]
    if strangers and len(strangers) < len(given) and op._opname not in MIXING:
        raise RuntimeError(f"{op}: expected all tensors to be on the same device, found {NAME} and cpu")
    inside = tree_map(lambda x: x.held if isinstance(x, Narrow) else x, (args, kwargs))
    found = op(*inside[0], **inside[1])
    if to_cpu or (op is torch.ops.aten.copy_.default and not isinstance(args[0], Narrow)):
        return found
    # What an operation writes into is what it returns.
    pairs = zip(tree_leaves((args, kwargs)), tree_leaves(inside), strict=True)
    outer = {id(behind): given for given, behind in pairs if isinstance(given, Narrow)}
    return tree_map(lambda x: outer[id(x)] if id(x) in outer else Narrow(x) if isinstance(x, Tensor) else x, found)


_rest = torch.library.Library("_", "IMPL")
_rest.fallback(run, "PrivateUse1")


def _here(key: Any) -> Any:
    if isinstance(key, tuple):
        return tuple(map(_here, key))
    return torch.tensor(key).to(NAME) if isinstance(key, list) else key


# What reaches into the memory of a tensor, or makes one from Python's numbers, does not pass through operations.
_tensor, _as_tensor, _get, _set = torch.tensor, torch.as_tensor, Tensor.__getitem__, Tensor.__setitem__


def _made(make: Any) -> Any:
    def made(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        there = device is not None and torch.device(device).type == NAME
        if not there or isinstance(data, Narrow):
            return make(data, device=device, **options)
        return make(data, **options).to(NAME)

    return made


torch.tensor, torch.as_tensor = _made(_tensor), _made(_as_tensor)  # type: ignore[assignment]
Narrow.tolist = lambda self: self.held.tolist()  # type: ignore[method-assign]
Narrow.data_ptr = lambda self: self.held.data_ptr()  # type: ignore[method-assign]
Narrow.__getitem__ = lambda self, key: _get(self, _here(key))  # type: ignore[method-assign]
Narrow.__setitem__ = lambda self, key, value: _set(self, _here(key), value)  # type: ignore[method-assign]


def plain(*modules: ModuleType) -> None:
    """Have modules that ask for a parameter's type take the device's for plain ones."""

    def kind(x: Any) -> type:
        return nn.Parameter if isinstance(x, Narrow) else builtins.type(x)

    for module in modules:
        module.__dict__["type"] = kind
