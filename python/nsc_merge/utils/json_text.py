"""JSON as every file of this package is read, and values as JSON and YAML can hold them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

# What is parsed in a second, however it is written; and what Python's own recursion has room for.
MAX_VALUES = 500_000
MAX_DEPTH = 64
# Some configurations write int(1e30) for "without limit"; nothing that is counted has so many digits.
MAX_DIGITS = 40


def from_json(text: str | bytes, place: str, *, not_finite: bool = False, most: int = MAX_VALUES) -> Any:
    """The value of JSON text, in which no key is given twice; for all JSON that is read.

    Args:
        text: or its bytes, in UTF-8.
        place: how messages call it, such as the path of its file.
        not_finite: whether NaN, Infinity and -Infinity, which are not JSON but are what Python writes, are numbers.
        most: values that it may hold.

    Raises:
        ValueError: in one line that names ``place``: if it is not JSON, if a key is given twice, if a number is not
            finite or has more than :data:`MAX_DIGITS` digits, or if there are more than ``most`` values or some are
            nested deeper than :data:`MAX_DEPTH`.
    """

    def constant(name: str) -> float:
        if not_finite:
            return float(name)
        raise ValueError(f"expected finite numbers, found {name}")

    def real(digits: str) -> float:
        if math.isinf(value := float(digits)):
            raise ValueError(f"expected finite numbers, found {digits:.40}")
        return value

    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        if text.count(",") >= most:
            raise ValueError(f"expected at most {most} values, found {text.count(',')} commas")
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=constant, parse_float=real, parse_int=_integer
        )
        _check_depth(value)
        if "\\ud" in text or "\\uD" in text:
            # Half of a surrogate pair is no text: it could be neither shown nor written.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError(f"{place} is not valid JSON: {_TOO_DEEP}") from None
    except ValueError as error:
        raise ValueError(f"{place} is not valid JSON: {error}") from None
    return value


_TOO_DEEP = f"values are nested deeper than {MAX_DEPTH}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        for name, _ in pairs:
            # Found once, it is gone for the second time.
            if found.pop(name, pairs) is pairs:
                raise ValueError(f"the key {name!r:.80} is given twice")
    return found


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"expected numbers of at most {MAX_DIGITS} digits, found {digits:.20}... of {len(digits)}")
    return int(digits)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list))
        level = [item for items in inner for item in items]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def plain(value: Any) -> Any:
    """``value`` with only dictionaries, lists, strings, numbers, booleans and None in it."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def finite_or_none(value: Any) -> Any:
    """``value`` with None in place of NaN and infinities, which JSON does not know."""
    if isinstance(value, dict):
        return {key: finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
