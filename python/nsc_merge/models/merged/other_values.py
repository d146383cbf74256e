"""Other values in place of some parameters and buffers for a while, such as the head of a task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from nsc_merge.models.bases.quantised import activations_of, is_linear, is_quantised
from nsc_merge.models.bases.stored_weights import maps_of


@contextmanager
def other_values(model: nn.Module, values: Mapping[str, Tensor], argument: str) -> Iterator[None]:
    """Within it, parameters and buffers of ``model`` have other values, of other shapes if need be: also where they are
    offloaded, and would be fetched as the model runs. A linear that keeps codes gives way to one of plain numbers.

    Args:
        model: any.
        values: path of a parameter or buffer -> value.
        argument: how messages call them.

    Raises:
        ValueError: naming ``argument`` and one that the model has not.
    """
    owners: dict[str, dict[str, Tensor]] = {}
    known = {name for held in (model.named_parameters, model.named_buffers) for name, _ in held(remove_duplicate=False)}
    for name, value in values.items():
        if name not in known:
            raise ValueError(
                f"{argument}: {type(model).__name__} has no {name}, which is a part of the task's own; expected a "
                f"model of the base's class, as that {argument} is put into it"
            )
        path, _, part = name.rpartition(".")
        owners.setdefault(path, {})[part] = value
    with ExitStack() as stack:
        for path, own in owners.items():
            module: Any = model.get_submodule(path)
            if "weight" in own and _keeps_codes(module):
                stack.enter_context(_another(model, path, module, own))
                continue
            for part, value in own.items():
                stack.enter_context(_other(module, part, value))
        yield


def _keeps_codes(module: nn.Module) -> bool:
    """Whether it is a linear of which nothing but codes is called its weight; one of another kind, with a forward that
    is more than a product, may have numbers there.
    """
    weight = module._parameters.get("weight")
    plain = type(weight) is nn.Parameter and weight.is_floating_point()
    return not plain and is_linear(module) and is_quantised(module)


@contextmanager
def _other(module: nn.Module, part: str, value: Tensor) -> Iterator[None]:
    """One in the place of a module's own."""
    before = getattr(module, part)
    maps = maps_of(module, part) if before.is_meta else None
    value = value.to(before.dtype)
    held: dict[str, Tensor] = {}
    name, kept = "", None
    if maps is None:
        value = value.to(before.device)
    else:
        # accelerate takes what it has in memory, and of the module's own the shape.
        _, held, name = maps
        kept, held[name] = held.get(name), value
        value = value.to("meta")
    try:
        setattr(module, part, nn.Parameter(value, requires_grad=False) if isinstance(before, nn.Parameter) else value)
        yield
    finally:
        setattr(module, part, before)
        if maps is not None and kept is not None:
            held[name] = kept
        elif maps is not None:
            del held[name]


@contextmanager
def _another(model: nn.Module, path: str, module: Any, values: Mapping[str, Tensor]) -> Iterator[None]:
    """A plain linear in the place of one that keeps codes."""
    dtype, device = activations_of(model, path, module)
    bias = values.get("bias", getattr(module, "bias", None))
    d_out, d_in = values["weight"].shape
    linear = nn.Linear(d_in, d_out, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(values["weight"].to(device, dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(device, dtype), requires_grad=False)
    model.set_submodule(path, linear)
    try:
        yield
    finally:
        model.set_submodule(path, module)
