"""How a model is run for measurements: in evaluation mode, and once for callers that run it on the same inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model`` in evaluation mode; afterwards every module has the mode that it had, which may differ from its
    parent's.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def shared_forward(model: nn.Module) -> Iterator[None]:
    """Within it, calling ``model`` again with the very same objects returns what the first call returned."""
    known: dict[tuple[Any, ...], Any] = {}
    own = vars(model).get("forward")
    forward = model.forward

    def once(*args: Any, **inputs: Any) -> Any:
        key = (*map(id, args), *((name, id(value)) for name, value in sorted(inputs.items())))
        if key not in known:
            # The arguments are kept as well, so that no other object takes over their identity.
            known[key] = args, inputs, forward(*args, **inputs)
        return known[key][-1]

    model.forward = once
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own
