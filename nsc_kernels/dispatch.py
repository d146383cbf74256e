"""Which backend serves a call.

A backend is a module of ``nsc_kernels.backends`` with five functions (see :class:`nsc_kernels.contract.Backend`). The
table below names the modules in order of preference; a module that is not there is reported as such, so a new backend
is a new file.

An explicit choice (``use_backend`` or ``NSC_BACKEND``) works or raises. The automatic choice takes the first backend
that can serve the call and logs, once each, what it passed over and why.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import logging
import os
import warnings
from functools import cache, lru_cache
from typing import Any

import torch

from .contract import Backend, Call

logger = logging.getLogger("nsc_kernels")

# name -> device types it is considered for automatically, None for all of them; best first.
PREFERENCE: dict[str, tuple[str, ...] | None] = {
    "cuda": ("cuda",),
    "triton": ("cuda",),
    "cpu": ("cpu",),
    "reference": None,
}
AUTO = "auto"


def _checked_name(name: str, source: str) -> str:
    if name not in PREFERENCE and name != AUTO:
        raise ValueError(f"{source}: expected one of {', '.join([AUTO, *PREFERENCE])}, found {name!r}")
    return name


# One choice for the process and not one per thread: autograd runs a compiled graph's backward on threads of its own.
# The first counts: one for each block entered and not left, before NSC_BACKEND's.
_choices = [_checked_name(os.environ.get("NSC_BACKEND", AUTO), "NSC_BACKEND")]


def chosen() -> str:
    """The backend asked for: by ``use_backend``, else by ``NSC_BACKEND``, else ``"auto"``."""
    return _choices[0]


class use_backend(contextlib.ContextDecorator):
    """``with use_backend(name):`` every call in the block uses this backend, or raises where it cannot.

    Also a decorator of functions. Outside a ``with`` or a decorated function it does nothing. The choice is the
    process's, as ``NSC_BACKEND`` is: threads that want different backends must not overlap. It goes around the call of
    what ``torch.compile`` made and not within it, where a graph chooses when it runs.

    Args:
        name: of the backend; ``"auto"`` chooses per call.

    Raises:
        ValueError: if there is no such backend.
        TypeError: as a decorator of a generator or a coroutine, whose body runs after it was called.
        RuntimeError: within a graph that is exported, or compiled whole (``fullgraph=True``).
    """

    def __init__(self, name: str) -> None:
        self._name = _checked_name(name, "use_backend")

    def __call__(self, func: Any) -> Any:
        if inspect.iscoroutinefunction(func) or inspect.isgeneratorfunction(func) or inspect.isasyncgenfunction(func):
            raise TypeError(
                f"use_backend decorates functions that end where they return, and {func.__qualname__} goes on later: "
                "put blocks around the calls within it"
            )
        return super().__call__(func)

    def __enter__(self) -> None:
        if torch.compiler.is_compiling():
            # A graph holds no block and chooses when it runs. Where it need not be whole, this frame is left to Python.
            raise RuntimeError(
                f"use_backend({self._name!r}) is within what torch.compile makes a graph of, which it would have no "
                "effect on: put it around the call of what is compiled"
            )
        _choices.insert(0, self._name)

    def __exit__(self, *error: object) -> None:
        # And not what was chosen before put back: blocks of other threads may have begun since, or have ended.
        _choices.remove(self._name)


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
    unproven: list[str] = []
    for candidate, devices in PREFERENCE.items():
        if devices is not None and call.device.type not in devices:
            continue
        backend, reason = load(candidate)
        if backend is not None and reason is None:
            reason = backend.rejects(call)
        if backend is not None and reason is None:
            reason = backend.unproven(call)
            unproven += [] if reason is None else [f"{candidate}, {reason}"]
        if backend is not None and reason is None:
            if candidate == "reference" and unproven:
                _warn_once(
                    f"PyTorch's operators compute it, slower, and not {unproven[-1]}; NSC_BACKEND=reference says that "
                    "this is wanted"
                )
            return backend
        _log_once(f"{call.device.type} {call.dtype}: backend {candidate!r} passed over: {reason}")
        if backend is not None and candidate == "cpu" and load(candidate)[1] is not None:
            _warn_once(
                f"nsc_kernels has no CPU kernels here ({reason}), so that PyTorch's operators compute it, slower; "
                "NSC_BACKEND=reference says that this is wanted"
            )
    raise RuntimeError(f"no backend serves tensors on {call.device}: available_backends() lists what there is")


@cache
def _log_once(message: str) -> None:
    logger.info(message)


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
