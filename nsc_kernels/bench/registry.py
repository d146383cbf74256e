"""Who takes part: every contender registers itself, and so can yours.

    from nsc_kernels.bench import contender

    @contender("mine")
    def mine(p):                                    # p: nsc_kernels.bench.Problem
        def forward():
            return y, quad, sqnorm, saved           # None for statistics that are not computed
        def backward(saved):
            return dz, dlam
        return forward, backward

``python -m nsc_kernels.bench --contender my_file.py`` (or ``my_module``, or ``my_module:name``) loads it, and so does
an entry point of the group ``nsc_kernels.contenders`` of an installed package. What is prepared once for an input, such
as weights in another layout, is prepared before the two functions are returned: it is not timed.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import nsc_kernels as nk

from .problem import Problem
from .shapes import Shape

GROUP = "nsc_kernels.contenders"
OPERATOR, LINEAR = "operator", "linear"
GROUPS = ("plain", "compiles", "backend", "inplace", "autograd", "tunes", "package", "variant")


class Result(NamedTuple):
    """What a forward returns; a plain tuple of these four will do."""

    y: Tensor
    quad: Tensor | None
    sqnorm: Tensor | None
    saved: Any  # what the backward takes


Gradients = Sequence[Tensor | None]  # of z and of lam
Pair = tuple[Callable[[], Result], Callable[[Any], Gradients]]
# Whether it can run on a device with a dtype at a shape: why not, in words, or None.
Unavailable = Callable[[torch.device, torch.dtype, Shape], str | None]


@dataclass(frozen=True)
class Contender:
    """One way to compute a layer's adapters. :func:`contender` says what its fields mean."""

    name: str
    make: Callable[[Problem], Pair]
    of: str = OPERATOR
    stats: bool = True
    adapters: bool = True
    inplace: bool = False
    autograd: bool = False
    group: str = "plain"
    unavailable: Unavailable | None = None
    prepare: Callable[[list[Problem]], None] | None = None
    about: str = ""

    @property
    def whole(self) -> bool:
        return self.of == LINEAR


_registered: dict[tuple[str, str], Contender] = {}


def register(found: Contender) -> Contender:
    """Add a contender.

    Raises:
        ValueError: if there is another one of that name already.
    """
    if found.of not in (OPERATOR, LINEAR):
        raise ValueError(f"of: expected {OPERATOR!r} or {LINEAR!r}, found {found.of!r}")
    if found.group not in GROUPS:
        raise ValueError(f"group: expected one of {', '.join(GROUPS)}, found {found.group!r}")
    if (found.of, found.name) in _registered:
        raise ValueError(f"there is a contender named {found.name!r} of {found.of} already; give yours another name")
    _registered[found.of, found.name] = found
    return found


def contender(
    name: str,
    *,
    of: str = OPERATOR,
    stats: bool = True,
    adapters: bool = True,
    inplace: bool = False,
    autograd: bool = False,
    group: str = "plain",
    unavailable: Unavailable | None = None,
    prepare: Callable[[list[Problem]], None] | None = None,
) -> Callable[[Callable[[Problem], Any]], Callable[[Problem], Any]]:
    """Register the decorated function as a contender.

    The function gets a :class:`~nsc_kernels.bench.problem.Problem` and returns ``forward`` and ``backward``. Its
    tensors belong to all contenders: only what is said under ``inplace`` may be written to.

    Args:
        name: in tables, and on the command line.
        of: ``"operator"``, the adapters with the layer's output given, or ``"linear"``, the layer and its adapters.
        stats: whether it computes quad and sqnorm and their gradients; if not it does less, which the tables say.
        adapters: False for a layer without adapters: a floor, and no contender.
        inplace: it writes y over ``p.base``, and adds to ``p.dz_base`` and returns that.
        autograd: the function returns ``forward`` alone, which returns y, or y, quad and sqnorm; the backward is
            ``torch.autograd.grad`` of them.
        group: ``"plain"``; ``"compiles"`` for one that takes seconds to be ready, which ``--quick`` leaves out;
            ``"backend"`` takes part on GPUs; the other :data:`GROUPS` only where they are named: ``"tunes"`` for
            minutes, ``"variant"`` for one of many.
        unavailable: why it cannot run on this device with this dtype at this shape, or None.
        prepare: called once with all sets of inputs of a shape, to try out tiles.

    Returns:
        the function itself.

    Raises:
        ValueError: if there is another contender of that name.
    """

    def decorate(function: Callable[[Problem], Any]) -> Callable[[Problem], Any]:
        make = partial(through_autograd, function) if autograd else function
        about = (inspect.getdoc(getattr(function, "func", function)) or "").split("\n\n")[0]
        register(Contender(name, make, of, stats, adapters, inplace, autograd, group, unavailable, prepare, about))
        return function

    return decorate


def through_autograd(function: Callable[[Problem], Callable[[], Any]], p: Problem) -> Pair:
    run = function(p)

    def forward() -> Result:
        found = run()
        outputs = tuple(found) if isinstance(found, (tuple, list)) else (found,)
        if len(outputs) == 1:
            return Result(outputs[0], None, None, outputs)
        y, quad, sqnorm = parts(outputs, "forward", ("y", "quad", "sqnorm"))
        return Result(y, quad, sqnorm, outputs)

    return forward, p.backward


def parts(found: Any, what: str, names: tuple[str, ...]) -> Any:
    """What a contender's function returned, where it is as many as there are names for.

    Raises:
        ValueError: if it is not.
    """
    several = isinstance(found, (tuple, list))
    if not several or len(found) != len(names):
        said = f"{len(found)} of them" if several else type(found).__name__
        raise ValueError(f"{what} is to return {', '.join(names)}; found {said}")
    return found


def load(text: str) -> None:
    """Import what registers contenders: a file, a module, or ``module:name`` of a class or a function.

    A class is made with the problem and has ``forward()`` and ``backward(saved)``; its attributes ``name``, ``of``,
    ``stats``, ``inplace`` and ``autograd`` are as :func:`contender` has them.

    Raises:
        ValueError: if there is no such module, file or name, it cannot be run, or it registers nothing.
    """
    before = len(_registered)
    where, _, attribute = text.partition(":")
    if where.endswith(".py") and not Path(where).is_file():
        raise ValueError(f"contender: there is no file {where}")
    try:
        module = _from_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except (Exception, SystemExit) as error:  # a script that reads its own arguments leaves
        absent = (
            isinstance(error, ModuleNotFoundError)
            and not where.endswith(".py")
            and f"{where}.".startswith(f"{error.name}.")
        )
        why = f"{error}; give a module or a file.py" if absent else where_and_why(error)
        raise ValueError(f"contender: {text!r} cannot be imported: {why}") from error
    if attribute:
        found = getattr(module, attribute, None)
        if not callable(found):
            raise ValueError(f"contender: {where} has no class or function {attribute!r}")
        if not any(_function(one) is found for one in _registered.values()):
            _register_object(found)
    elif len(_registered) == before:
        raise ValueError(f"contender: {text!r} registers none; decorate one with @contender, or name it after ':'")


def _function(one: Contender) -> object:
    return one.make.args[0] if isinstance(one.make, partial) and one.autograd else one.make


def _register_object(found: Callable[[Problem], Any]) -> None:
    fields = ("of", "stats", "adapters", "inplace", "autograd", "group")
    given = {name: getattr(found, name) for name in fields if hasattr(found, name)}
    name = getattr(found, "name", found.__name__)
    if not isinstance(found, type):
        contender(name, **given)(found)
        return

    def made(p: Problem) -> Any:
        one = found(p)
        return one.forward if given.get("autograd") else (one.forward, one.backward)

    made.__doc__ = found.__doc__
    contender(name, **given)(made)


# Where the files of an error's traceback lie that are of no contender of somebody's.
NOT_THEIRS = (*(f"{Path(one.__path__[0])}/" for one in (nk, torch)), inspect.getfile(contextlib), "<frozen ")


def where_and_why(error: BaseException) -> str:
    """An error in somebody's file, with the last line outside of this package and of torch that it went through; itself
    in one line.
    """
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {error.msg}"
    theirs = [one for one in traceback.extract_tb(error.__traceback__) if not one.filename.startswith(NOT_THEIRS)]
    where = f"{theirs[-1].filename}, line {theirs[-1].lineno}: " if theirs else ""
    return f"{where}{type(error).__name__}: {' '.join(str(error).split())}"


def _from_file(path: Path) -> Any:
    # By a name of its own, and what lies beside it last: triton.py is not what others import as triton.
    name = f"contender_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.append(str(path.resolve().parent))
    spec.loader.exec_module(module)
    return module


@cache
def load_shipped() -> None:
    """This package's contenders, and those of other installed packages."""
    importlib.import_module("nsc_kernels.bench.contenders")
    for point in entry_points(group=GROUP):
        point.load()


def registered(of: str) -> list[Contender]:
    """All contenders of ``"operator"`` or of ``"linear"``: this package's first, which ratios are to."""
    load_shipped()
    return sorted((one for (kind, _), one in _registered.items() if kind == of), key=lambda one: one.name != "fused")


def chosen(of: str, names: Iterable[str], device: str = "cpu", quick: bool = False) -> list[Contender]:
    """The contenders of these names; ``default``, ``all`` and all :data:`GROUPS` are names, too.

    Raises:
        ValueError: for a name that nobody has.
    """
    there = {one.name: one for one in registered(of)}
    groups: dict[str, tuple[str, ...]] = {group: (group,) for group in GROUPS}
    default = ("plain", *(() if quick else ("compiles",)), *(("backend",) if device == "cuda" else ()))
    groups |= {"default": default, "all": tuple(group for group in GROUPS if group != "variant")}
    found: dict[str, Contender] = {}
    for name in names:
        if name in groups:
            found |= {one.name: one for one in there.values() if one.group in groups[name]}
        elif name in there:
            found[name] = there[name]
        else:
            raise ValueError(
                f"contenders: {name!r} is not one of {of}: {', '.join(there)}; or of the groups {', '.join(groups)}"
            )
    return list(found.values())
