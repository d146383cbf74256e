"""Options that several methods have: presets, and one weight for each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nsc_merge.utils.option_checks import check_choice, check_number


def fill(options: Any, presets: Mapping[str, Mapping[str, Any]]) -> None:
    """Give the options of a frozen dataclass that are None the values of its ``preset``."""
    check_choice("preset", options.preset, list(presets))
    for name, value in presets[options.preset].items():
        if getattr(options, name) is None:
            object.__setattr__(options, name, value)


def check_weights(weights: Mapping[str, float] | None) -> None:
    """Refuse weights that are no mapping to finite numbers."""
    if weights is not None and not isinstance(weights, Mapping):
        raise ValueError(f"weights: expected a mapping of tasks to numbers, found {weights!r}")
    for task, value in (weights or {}).items():
        check_number(f"weights[{task!r}]", value)


def weights_of(weights: Mapping[str, float] | None, tasks: Sequence[str]) -> dict[str, float]:
    """Task -> weight, 1 each when None.

    Raises:
        ValueError: if other tasks are weighted than there are.
    """
    if weights is not None and set(weights) != set(tasks):
        raise ValueError(f"weights: expected one value for each of {list(tasks)}, found {sorted(weights, key=str)}")
    return dict(weights) if weights is not None else dict.fromkeys(tasks, 1.0)
