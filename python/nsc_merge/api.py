"""The one entry point: :func:`merge`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields, replace
from typing import Any

from torch import nn

from nsc_merge.adapters import AdapterSource, load_adapter
from nsc_merge.families import FAMILIES
from nsc_merge.fields import did_you_mean
from nsc_merge.methods import METHODS, Method, Problem
from nsc_merge.nsc import RECIPES
from nsc_merge.passes import Calibration
from nsc_merge.remap import fit
from nsc_merge.result import MergeResult


def merge(
    model: nn.Module,
    adapters: Mapping[str, AdapterSource],
    calibration: Calibration | None = None,
    method: str = "nsc",
    *,
    shared_modules: str = "lambda",
    dora: str = "refuse",
    **options: Any,
) -> MergeResult:
    """Merge LoRA adapters into one update of the base model, by any method of :data:`nsc_merge.methods.METHODS`.

    Args:
        model: a transformers model, the base on which the adapters were trained. It is used and left
            unchanged.
        adapters: task -> PEFT folder, :class:`Adapter`, ``PeftModel`` (not the one that wraps ``model``), or
            mapping with ``config`` and ``weights``.
        calibration: task -> iterable of batches, each a dictionary of model inputs (no labels). Every step
            takes the next batch of every task, in order, and starts again when an iterable ends. Methods that
            need no data do not look at it.
        method: ``"nsc"`` (options: :class:`nsc_merge.nsc.NSCOptions`), or another name that ``nsc-merge methods``
            lists.
        shared_modules: what happens to modules that the adapters trained in full and that come before the
            head, such as LLaVA's projector: ``"lambda"`` gives them coefficients, too; ``"mean"`` and
            ``"first"`` do not. See :func:`nsc_merge.remap.fit`.
        dora: ``"refuse"`` DoRA adapters, or ``"convert"`` them to LoRA updates of the same rank.
        options: of the method.

    Returns:
        The merged update, as coefficients or as factors, with everything needed to apply or save it.

    Raises:
        TypeError, ValueError, FileNotFoundError: naming the argument, what was found and what was expected,
            before the model is touched.
    """
    chosen = method_of(method, options)
    if not isinstance(adapters, Mapping) or not adapters:
        raise ValueError(
            f"adapters: expected a mapping from task to adapter with at least one entry, found {adapters!r}"
        )
    for task in adapters:
        if not isinstance(task, str):
            raise TypeError(f"adapters: expected names of tasks (str), found {task!r}")
    loaded = {task: load_adapter(source, task, dora=dora) for task, source in adapters.items()}
    problem = Problem(model, fit(loaded, model, shared_modules), calibration)
    result = chosen.run(problem, options)
    return replace(result, inputs={"shared_modules": shared_modules, "dora": dora})


def method_of(name: str, options: Collection[str] = ()) -> Method:
    """The method of a name, which has the options given.

    Raises:
        ValueError: naming the method or the option that there is not, and the nearest that there is.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"method: expected one of {sorted(METHODS)}, found {name!r}{did_you_mean(name, METHODS)}")
    method = METHODS[name]
    try:
        method.check_names(options)
    except ValueError as error:
        unknown = next(option for option in options if option not in method.option_names)
        raise ValueError(f"{error}{did_you_mean(unknown, method.option_names)}") from None
    return method


def describe_methods() -> dict[str, dict[str, Any]]:
    """Method -> its ``summary`` and ``paper`` in a line each, what it ``needs`` and ``gives`` (see
    :class:`nsc_merge.methods.Method`), the option that is ``tuned`` on validation data if any, its ``options`` with
    defaults, and its ``recipes``: name -> the ``families`` of models that it is for, and the ``options`` whose defaults
    it replaces there.
    """
    recipes = {
        name: {"families": [family.name for family in FAMILIES if family.recipe == name], "options": settings}
        for name, settings in RECIPES.items()
    }
    return {
        method.name: {
            "summary": method.summary,
            "paper": method.paper,
            "needs": sorted(method.needs),
            "gives": method.gives,
            "tuned": method.tuned,
            "options": {
                option.name: None if option.default is MISSING else option.default
                for option in fields(method.options)
            },
            "recipes": recipes if method.name == "nsc" else {},
        }
        for method in METHODS.values()
    }
