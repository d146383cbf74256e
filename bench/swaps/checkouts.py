"""Other people's code from a checkout, run beside ours: nothing of it is installed, and none of it is here."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any


def checkout(variable: str) -> Path | None:
    """The folder that an environment variable names, if it is set."""
    place = os.environ.get(variable)
    return Path(place).resolve() if place else None


class _Nothing:
    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass


class _Anything(ModuleType):
    """A module of which every name is there, as a class whose instances do nothing: it is called, and derived from."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (_Nothing,), {})


def _is_there(name: str) -> bool:
    try:
        return name in sys.modules or importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _inside(module: ModuleType, roots: Sequence[str]) -> bool:
    spec = vars(module).get("__spec__")
    # A folder without an __init__ has places, and no origin.
    places = [spec.origin or "", *(spec.submodule_search_locations or [])] if spec is not None else []
    return any(Path(place).is_relative_to(root) for place in places for root in roots)


@contextmanager
def imported_from(folders: Sequence[Path], absent: Sequence[str] = ()) -> Iterator[None]:
    """Import from ``folders`` inside of the block; what was imported is forgotten after it, as checkouts have modules
    of the same names.

    Args:
        folders: put in front of the path.
        absent: modules that may be lacking here, as what they do plays no role: empty ones stand in for them.
    """
    before, path = dict(sys.modules), list(sys.path)
    sys.path[:0] = [str(folder) for folder in folders]
    for name in absent:
        if not _is_there(name):
            sys.modules[name] = _Anything(name)
            # Asked for by those who look whether a package is installed.
            sys.modules[name].__spec__ = ModuleSpec(name, None)
    try:
        yield
    finally:
        # While path and parents are there: a folder without an __init__ asks them for its places.
        roots = [str(folder) for folder in folders]
        new = [name for name in sys.modules if name not in before]
        gone = [name for name in new if isinstance(sys.modules[name], _Anything) or _inside(sys.modules[name], roots)]
        for name in gone:
            del sys.modules[name]
        sys.path[:] = path
        sys.modules.update({name: module for name, module in before.items() if name not in sys.modules})
