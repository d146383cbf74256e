"""Which backend serves a call.

A backend is a module of ``nsc_kernels.backends`` with five functions (see :class:`Backend`). The table below names the
modules in order of preference; a module that is not there is reported as such, so a new backend is a new file.

An explicit choice (``use_backend`` or ``NSC_BACKEND``) works or raises. The automatic choice takes the first backend
that can serve the call and logs, once each, what it passed over and why.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

logger = logging.getLogger("nsc_kernels")

# name -> device types it is considered for automatically, best first.
PREFERENCE: dict[str, tuple[str, ...]] = {
    "cuda": ("cuda",),
    "triton": ("cuda",),
    "cpu": ("cpu",),
    "reference": ("cpu", "cuda", "mps", "xpu", "meta"),
}
AUTO = "auto"


class Call(NamedTuple):
    """What a backend is told about a call before it accepts it."""

    device: torch.device
    dtype: torch.dtype
    T: int
    d_in: int
    d_out: int
    offsets: tuple[int, ...]


class Backend(Protocol):
    """What a backend module provides. Tensors are as in :mod:`nsc_kernels.reference`, z of unit inner stride.

    What was not asked for (``u`` without ``save_u``, the statistics without ``stats``, a gradient that is not needed)
    is returned as None or as an empty tensor. ``reuse_base`` permits, and does not oblige, a backend to write the
    output over ``base`` (``dz_base``) and return that tensor: nobody else holds it.
    """

    def unavailable(self) -> str | None:
        """Why this backend cannot run in this process, or None."""

    def rejects(self, call: Call) -> str | None:
        """Why this backend cannot serve a call, or None. Only asked of an available backend."""

    def unproven(self, call: Call) -> str | None:
        """Why the automatic choice must pass over a call that :meth:`rejects` lets through, or None.

        For kernels that have not passed on the hardware at hand at their current source.
        """

    def forward(
        self,
        z: Tensor,
        A: Tensor,
        Bt: Tensor,
        offsets: Sequence[int],
        lam: Tensor,
        base: Tensor | None,
        stats: bool,
        save_u: bool,
        reuse_base: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]: ...

    def backward(
        self,
        dy: Tensor | None,
        dquad: Tensor | None,
        dsqnorm: Tensor | None,
        u: Tensor,
        z: Tensor | None,
        A: Tensor,
        Bt: Tensor,
        offsets: Sequence[int],
        lam: Tensor,
        dz_base: Tensor | None,
        need_dz: bool,
        need_dlam: bool,
        reuse_base: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]: ...


def _checked_name(name: str, source: str) -> str:
    if name not in PREFERENCE and name != AUTO:
        raise ValueError(f"{source}: expected one of {', '.join([AUTO, *PREFERENCE])}, found {name!r}")
    return name


# One choice for the process and not one per thread: autograd runs a compiled graph's backward on threads of its own.
_choice = _checked_name(os.environ.get("NSC_BACKEND", AUTO), "NSC_BACKEND")


def chosen() -> str:
    """The backend asked for: by ``use_backend``, else by ``NSC_BACKEND``, else ``"auto"``."""
    return _choice


class use_backend(contextlib.ContextDecorator):
    """``with use_backend(name):`` every call in the block uses this backend, or raises where it cannot.

    Also a decorator of functions. Outside a ``with`` or a decorated function it does nothing. The choice is the
    process's, as ``NSC_BACKEND`` is: threads that want different backends must not overlap.

    Args:
        name: of the backend; ``"auto"`` chooses per call.

    Raises:
        ValueError: if there is no such backend.
    """

    def __init__(self, name: str) -> None:
        self._name = _checked_name(name, "use_backend")
        # One for each block entered and not left: a decorated function may call itself.
        self._previous: list[str] = []

    def __enter__(self) -> None:
        global _choice
        self._previous.append(_choice)
        _choice = self._name

    def __exit__(self, *error: object) -> None:
        global _choice
        _choice = self._previous.pop()


@cache
def load(name: str) -> tuple[Backend | None, str | None]:
    """The backend's module and, where it cannot run, the reason in words."""
    module_name = f"nsc_kernels.backends.{name}"
    if importlib.util.find_spec(module_name) is None:
        return None, "not part of this release"
    backend: Backend = importlib.import_module(module_name)
    return backend, backend.unavailable()


def available_backends() -> dict[str, bool | str]:
    """Backend name -> True, or the reason in words why it cannot run in this process."""
    return {name: load(name)[1] or True for name in reversed(PREFERENCE)}


@lru_cache(maxsize=4096)
def select(name: str, call: Call) -> Backend:
    """The backend for a call: ``name`` itself or, for ``"auto"``, the best one that accepts it."""
    if name != AUTO:
        backend, reason = load(name)
        if backend is not None and reason is None:
            reason = backend.rejects(call)
        if backend is None or reason is not None:
            raise RuntimeError(f"backend {name!r} was asked for and cannot serve this call: {reason}")
        return backend
    for candidate, devices in PREFERENCE.items():
        if call.device.type not in devices:
            continue
        backend, reason = load(candidate)
        if backend is not None and reason is None:
            reason = backend.rejects(call) or backend.unproven(call)
        if backend is not None and reason is None:
            return backend
        _log_once(f"{call.device.type} {call.dtype}: backend {candidate!r} passed over: {reason}")
    raise RuntimeError(f"no backend serves tensors on {call.device}: available_backends() lists what there is")


@cache
def _log_once(message: str) -> None:
    logger.info(message)
