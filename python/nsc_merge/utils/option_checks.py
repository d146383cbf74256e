"""Checks of option values: each names the option, what was found and what was expected."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_SIZE = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*[KMGT]B\s*", re.IGNORECASE)
_REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def check_number(
    name: str, value: Any, least: float = -math.inf, most: float = math.inf, *, above: bool = False
) -> None:
    """Refuse what is no finite number from ``least`` (exclusive if ``above``) to ``most``.

    Raises:
        ValueError: naming the option, what was found and what was expected.
    """
    if is_number(value) and math.isfinite(value) and (least < value if above else least <= value) and value <= most:
        return
    bounds = []
    if least > -math.inf:
        bounds.append(f"{'above' if above else 'of at least'} {least:g}")
    if most < math.inf:
        bounds.append(f"of at most {most:g}")
    wanted = " ".join(["a finite number", " and ".join(bounds)]).rstrip()
    raise ValueError(f"{name}: expected {wanted}, found {value!r:.60}")


def is_number(value: Any) -> bool:
    """Whether it is a number that a tensor can hold: a float, or a whole number of 64 bits; True and False are none."""
    if isinstance(value, int):
        return not isinstance(value, bool) and -(2**63) <= value < 2**63
    return isinstance(value, float)


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Refuse what is no whole number of at least ``least``, or one that nothing can count to.

    Raises:
        ValueError: naming the option, what was found and what was expected.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected a whole number of at least {least}, found {value!r:.60}")
    if value >= 2**63:
        raise ValueError(f"{name}: expected a whole number below 2^63, found {value!r:.60}")


class ChoiceError(ValueError):
    """A value is not among those that an option may have.

    Attributes:
        name: of the option.
        value: that was found.
        choices: that there are.
    """

    def __init__(self, name: str, value: Any, choices: Sequence[Any]) -> None:
        super().__init__(f"{name}: expected one of {list(choices)}, found {value!r}")
        self.name, self.value, self.choices = name, value, list(choices)

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are pickled by their message alone otherwise.
        return type(self), (self.name, self.value, self.choices)


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuse what is not among ``choices``.

    Raises:
        ChoiceError: naming the option, what was found and what was expected.
    """
    if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in choices):
        raise ChoiceError(name, value, choices)


def check_names(name: str, value: Any) -> None:
    """Refuse what is no list of strings.

    Raises:
        ValueError: naming the option, what was found and what was expected.
    """
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(one, str) for one in value):
        raise ValueError(f"{name}: expected a list of names, found {value!r}")


def check_plain(name: str, value: Any) -> None:
    """Refuse what is no mapping that JSON can hold.

    Raises:
        ValueError: naming the option, what was found and what was expected.
    """
    try:
        if isinstance(value, Mapping):
            json.dumps(dict(value))
            return
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{name}: expected a mapping that JSON can hold, found {value!r}")


def check_bounds(name: str, value: Any) -> None:
    """Refuse what is no pair of a lower and a higher number.

    Raises:
        ValueError: naming the option, what was found and what was expected.
    """
    pair = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2
    if not pair or not all(map(is_number, value)) or not value[0] < value[1]:
        raise ValueError(f"{name}: expected a lower and a higher bound, found {value!r:.60}")


def did_you_mean(name: Any, known: Iterable[str], prefix: str = "") -> str:
    """The end of a message that refuses ``name``: the nearest that there is, nothing if none is near."""
    near = difflib.get_close_matches(str(name), list(known), 1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def is_repo(name: str) -> bool:
    """Whether it is ``owner/name``, as repositories on the hub are called."""
    return _REPO.fullmatch(name) is not None


def is_size(text: str) -> bool:
    """Whether it is a number of bytes as transformers reads it, such as 5GB."""
    return _SIZE.fullmatch(text) is not None


def is_hub_id(name: str, base: Path = Path()) -> bool:
    """``owner/name`` with no folder ``owner`` in ``base``, by default the working folder, which may be gone: a mistyped
    path must not reach the network.
    """
    return is_repo(name) and not (base / name.split("/")[0]).exists()
