"""The keys of a recipe by task that say which adapters are merged, and what the classes of their heads are called."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from nsc_merge.recipes.yaml_keys import RecipeError, by_task, refuse_unknown, text, text_or_none, text_path
from nsc_merge.utils.json_text import from_json
from nsc_merge.utils.option_checks import is_hub_id

ADAPTER_KEYS = ("adapter", "revision", "subfolder")
_LISTS = (".txt", ".json")
_EXPECTED = "expected a list of names, a .txt file with one a line, or a .json file"


@dataclass(frozen=True)
class HubAdapter:
    """An adapter on the hub.

    Attributes:
        repo: ``owner/name``.
        revision: branch, tag or commit; None for the newest.
        subfolder: where in the repository it lies; None for its top.
    """

    repo: str
    revision: str | None = None
    subfolder: str | None = None


def absolute_adapter(value: Any, base: Path) -> Any:
    """An adapter of a recipe with the path of its folder made absolute; ids of the hub, with ``@revision`` or without,
    as they are.
    """
    if isinstance(value, dict):
        return {**value, "adapter": absolute_adapter(value["adapter"], base)} if "adapter" in value else value
    if not isinstance(value, str) or is_hub_id(value.partition("@")[0], base):
        return value
    return str(base / Path(value).expanduser())


def adapters_in(document: Mapping[str, Any]) -> dict[str, Path | HubAdapter]:
    """Task -> folder, which is there, or place on the hub, of a document whose paths are absolute.

    Raises:
        RecipeError: naming the key, what was found and what was expected.
    """
    adapters = {task: adapter_in(f"adapters.{task}", value) for task, value in by_task(document, "adapters")}
    if not adapters:
        raise RecipeError("adapters: expected at least one task, found none")
    for task, place in adapters.items():
        if isinstance(place, Path) and not place.is_dir():
            raise RecipeError(
                f"adapters.{task}: expected a PEFT folder, {place} is none (on the hub: owner/name, or "
                "owner/name@revision)"
            )
    return adapters


def adapter_in(key: str, value: Any) -> Path | HubAdapter:
    """The folder, which need not be there, or place on the hub that the value of ``key`` names.

    Raises:
        RecipeError: naming the key, what was found and what was expected.
    """
    given = value if isinstance(value, dict) else {"adapter": text_path(key, value)}
    refuse_unknown(f"{key}.", given, ADAPTER_KEYS)
    place = text(given, "adapter", f"{key}.")
    revision, subfolder = (text_or_none(given, name, f"{key}.") for name in ("revision", "subfolder"))
    if subfolder is not None and (PurePosixPath(subfolder).is_absolute() or ".." in PurePosixPath(subfolder).parts):
        raise RecipeError(f"{key}.subfolder: expected a path within the adapter's place, found {subfolder!r:.60}")
    if Path(place).is_absolute():
        if revision is not None:
            raise RecipeError(f"{key}.revision: is of an adapter on the hub, but {place} is a path; expected none")
        return Path(place, subfolder or "")
    repo, at, named = place.partition("@")
    if at and not named:
        raise RecipeError(f"{key}: expected owner/name@revision, found {place!r:.80}")
    if at and revision is not None:
        raise RecipeError(f"{key}.revision: expected it once, found {place!r:.80} and {revision!r:.60}")
    return HubAdapter(repo, named or revision, subfolder)


def absolute_labels(value: Any, base: Path) -> Any:
    """The names of a head's classes with the path of their file made absolute."""
    return str(base / Path(value).expanduser()) if isinstance(value, str) else value


def labels_in(document: Mapping[str, Any], tasks: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Task -> names of the classes of its head, in the order of their numbers.

    Raises:
        RecipeError: naming the key, what was found and what was expected.
    """
    labels = {}
    for task, value in by_task(document, "labels"):
        key = f"labels.{task}"
        if task not in tasks:
            raise RecipeError(f"{key}: no such task (tasks: {', '.join(tasks)})")
        listed = _of_file(key, Path(value)) if isinstance(value, str) else value
        labels[task] = _names(key, listed)
    return labels


def _of_file(key: str, file: Path) -> Any:
    if file.suffix.lower() not in _LISTS:
        raise RecipeError(f"{key}: {_EXPECTED}, found {file}")
    if not file.is_file():
        raise RecipeError(f"{key}: {file} is missing")
    try:
        raw = file.read_bytes()
        if file.suffix.lower() == ".json":
            return from_json(raw, f"{key}: {file}")
        return [line.strip() for line in raw.decode("utf-8-sig").splitlines() if line.strip()]
    except (ValueError, OSError) as error:
        message = str(error)
        raise RecipeError(message if message.startswith(key) else f"{key}: {file}: {message}") from None


def _names(key: str, value: Any) -> tuple[str, ...]:
    """Of a list, or of numbers and names as ``id2label`` or ``label2id`` in a ``config.json`` has them."""
    if isinstance(value, dict) and isinstance(found := value.get("id2label"), dict):
        value = found
    if isinstance(value, dict):
        pairs = [(number, name) if _is_number(number) else (name, number) for number, name in value.items()]
        by_number = {int(number): name for number, name in pairs if _is_number(number)}
        if sorted(by_number) != list(range(len(value))):
            raise RecipeError(f"{key}: expected names by number from 0 on, without a gap, found {value!r:.60}")
        value = [by_number[number] for number in range(len(by_number))]
    if not isinstance(value, list) or not value:
        raise RecipeError(f"{key}: {_EXPECTED}, found {value!r:.60}")
    for name in value:
        if not isinstance(name, str) or not name:
            raise RecipeError(
                f"{key}: expected names, found {name!r:.60}, which is how YAML reads numbers, dates and yes, no, on, "
                "off; in quotes it is a name"
            )
    twice = next((name for name in value if value.count(name) > 1), None)
    if twice is not None:
        raise RecipeError(f"{key}: expected every name once, found {twice!r:.60} {value.count(twice)} times")
    return tuple(value)


def _is_number(value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole or (isinstance(value, str) and re.fullmatch("[0-9]{1,6}", value) is not None)
