"""What else goes on in the thread that calls the operator: autocast, transforms, and whoever watches every call."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# Asked once: torch.is_autocast_enabled raises for other devices, and not every torch.compile can trace the question.
AUTOCAST_DEVICES = frozenset(d for d in ("cpu", "cuda", "mps", "xpu", "hpu") if torch.amp.is_autocast_available(d))
# Asked first in every call: the question about one device type takes three times as long.
any_autocast = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)
functorch_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
# What is_grads_batched makes of gradients is older than torch.func, which does not count it among its transforms.
_legacy_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda t: False)
# Inside torch.jit.trace, which records the operators that are called and none of autograd's functions.
jit_tracing = getattr(torch._C, "_is_tracing", lambda: False)
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
AS_IT_IS: AbstractContextManager[None] = nullcontext()  # made once: it holds nothing


def autocast_enabled(kind: str) -> bool:
    """Whether autocast is on for devices of a type."""
    return kind in AUTOCAST_DEVICES and torch.is_autocast_enabled(kind)


def without_autocast(kind: str) -> AbstractContextManager[None]:
    """A block in which autocast is off for devices of a type: a backward computes as its forward did, which was not
    under autocast, wherever it is called from.
    """
    return torch.autocast(kind, enabled=False) if any_autocast() and autocast_enabled(kind) else AS_IT_IS


def gradients_batched(dy: Tensor | None, dquad: Tensor | None, dsqnorm: Tensor | None) -> bool:
    """Whether torch.vmap runs a backward over many gradients at a time, as ``is_grads_batched`` and
    ``torch.autograd.functional.jacobian(vectorize=True)`` have it: no kernel can be handed the address of one then.
    """
    return (
        functorch_active()
        or (dy is not None and _legacy_batched(dy))
        or (dquad is not None and _legacy_batched(dquad))
        or (dsqnorm is not None and _legacy_batched(dsqnorm))
    )


def dispatch_watched() -> bool:
    """Whether a TorchDispatchMode sees every operator: fake tensors, tracing, selective checkpointing, counters."""
    return _dispatch_modes() > 0


def results_watched() -> bool:
    """Whether some mode sees what operators or functions return, and may keep it: nothing of that may be overwritten.
    Under torch.compile nobody does.
    """
    return _dispatch_modes() > 0 or _function_modes() > 0
