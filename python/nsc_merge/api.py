"""The one entry point: :func:`merge`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from torch import nn

from nsc_merge.adapters import Adapter, AdapterSource, load_adapter
from nsc_merge.attachment import adapted_linears
from nsc_merge.nsc import Calibration, NSCOptions, merge_nsc
from nsc_merge.remap import fit
from nsc_merge.result import MergeResult

Method = Callable[[nn.Module, Mapping[str, Adapter], "Calibration | None", Mapping[str, Any]], MergeResult]


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
    """Find one merge coefficient per task and adapted linear layer.

    Args:
        model: a transformers model, the base on which the adapters were trained. It is used and left
            unchanged.
        adapters: task -> PEFT folder, :class:`Adapter`, ``PeftModel`` (not the one that wraps ``model``), or
            mapping with ``config`` and ``weights``.
        calibration: task -> iterable of batches, each a dictionary of model inputs (no labels). Every step
            takes the next batch of every task, in order, and starts again when an iterable ends. Not used by
            ``"task_arithmetic"``.
        method: ``"nsc"`` (options: :class:`nsc_merge.nsc.NSCOptions`) or ``"task_arithmetic"`` (option:
            ``scale``, one coefficient for everything, 0.4 by default).
        shared_modules: what happens to modules that the adapters trained in full and that come before the
            head, such as LLaVA's projector: ``"lambda"`` gives them coefficients, too; ``"mean"`` and
            ``"first"`` do not. See :func:`nsc_merge.remap.fit`.
        dora: ``"refuse"`` DoRA adapters, or ``"convert"`` them to LoRA updates of the same rank.
        options: of the method.

    Returns:
        The coefficients with everything needed to apply or save them.

    Raises:
        TypeError, ValueError, FileNotFoundError: naming the argument, what was found and what was expected,
            before the model is touched.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {sorted(METHODS)}, found {method!r}")
    if not isinstance(adapters, Mapping) or not adapters:
        raise ValueError(
            f"adapters: expected a mapping from task to adapter with at least one entry, found {adapters!r}"
        )
    loaded = {task: load_adapter(source, task, dora=dora) for task, source in adapters.items()}
    result = METHODS[method](model, fit(loaded, model, shared_modules), calibration, options)
    return replace(result, inputs={"shared_modules": shared_modules, "dora": dora})


def _task_arithmetic(
    model: nn.Module,
    adapters: Mapping[str, Adapter],
    calibration: Calibration | None,
    options: Mapping[str, Any],
) -> MergeResult:
    unknown = sorted(set(options) - {"scale"})
    if unknown:
        raise ValueError(f"{unknown[0]}: not an option of method 'task_arithmetic' (options: scale)")
    scale = float(options.get("scale", 0.4))
    coefficients = {
        path: {task: scale if path in adapter.factors else 0.0 for task, adapter in adapters.items()}
        for path in adapted_linears(model, adapters)
    }
    return MergeResult(
        method="task_arithmetic",
        coefficients=coefficients,
        history=[],
        adapters=dict(adapters),
        options={"scale": scale},
        dead={},
        model=model,
    )


METHODS: dict[str, Method] = {"nsc": merge_nsc, "task_arithmetic": _task_arithmetic}


def describe_methods() -> dict[str, dict[str, Any]]:
    """Method -> its ``summary`` in one line and the names of its ``options``."""
    return {
        "nsc": {
            "summary": "learns a coefficient per task and module by minimising the null-space ratio (no labels)",
            "options": [option.name for option in fields(NSCOptions)],
        },
        "task_arithmetic": {"summary": "one coefficient for everything", "options": ["scale"]},
    }
