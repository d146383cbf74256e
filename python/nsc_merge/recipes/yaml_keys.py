"""Reading the YAML files of the command line, and checking what their keys hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nsc_merge.utils.errors import UsageError
from nsc_merge.utils.option_checks import did_you_mean, is_hub_id
from nsc_merge.utils.yaml_text import from_yaml, read_yaml

# YAML 1.1 takes 1e-3 for a string, which nobody means.
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+")


class RecipeError(UsageError):
    """The recipe, not the data, is at fault."""


def read_document(
    path: Path,
    overrides: Sequence[str],
    absolute: Callable[[dict[str, Any], Path], dict[str, Any]],
    short: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Keys and values of a YAML file, changed by ``overrides``.

    Args:
        path: the file.
        overrides: ``"key.sub=value"``, the value in YAML.
        absolute: makes the paths of a document absolute, given the folder that they are relative to: the file's,
            or the working folder for overrides.
        short: key -> what text stands for among the keys of a task there, so that ``"key.task.sub=value"`` changes a
            task that is written as text alone, too.

    Raises:
        RecipeError: naming the key, what was found and what was expected.
    """
    import yaml

    if not path.is_file():
        raise RecipeError(f"recipe: {path} is not a file")
    try:
        document = read_yaml(path)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"recipe: {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise RecipeError(f"recipe: {path}: expected keys and values, found {type(document).__name__}")
    document = absolute(document, path.resolve().parent)
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not all(name.split(".")):
            raise RecipeError(f"override: expected key.sub=value, found {override!r}")
        try:
            # Where the locale knows no character for a byte, Python passes the byte on as it is.
            value = from_yaml(text.encode("utf-8", "surrogateescape").decode("utf-8"))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise RecipeError(f"override: the value of {override!r} is not valid YAML: {reason}") from None
        nested: Any = value
        for part in reversed(name.split(".")):
            nested = {part: nested}
        change = absolute(nested, Path.cwd())
        document = _updated(_spelt_out(document, change, short or {}), change)
    return document


def _spelt_out(document: dict[str, Any], change: Mapping[str, Any], short: Mapping[str, str]) -> dict[str, Any]:
    """``document`` with keys and values in the place of text where ``change`` has keys and values."""
    document = dict(document)
    for key, name in short.items():
        tasks, changed = document.get(key), change.get(key)
        if isinstance(tasks, dict) and isinstance(changed, dict):
            document[key] = {
                task: {name: value} if isinstance(value, str) and isinstance(changed.get(task), dict) else value
                for task, value in tasks.items()
            }
    return document


def _updated(document: dict[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    document = dict(document)
    for key, value in change.items():
        old = document.get(key)
        document[key] = _updated(old, value) if isinstance(value, dict) and isinstance(old, dict) else value
    return document


def absolute_model(model: Any, base: Path) -> Any:
    """The path of a model made absolute; hub ids, and what is no text, as they are."""
    if isinstance(model, str) and not is_hub_id(model, base):
        return str(base / Path(model).expanduser())
    return model


def refuse_unknown(prefix: str, document: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse keys that there are not, with the nearest that there is."""
    for key in document:
        if key not in known:
            hint = did_you_mean(key, known, prefix) or f" (keys: {', '.join(known)})"
            raise RecipeError(f"{prefix}{key}: no such key{hint}")


def mapping(document: Mapping[str, Any], key: str, prefix: str = "") -> dict[str, Any]:
    """Keys and values, none if the key is absent."""
    value = document.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RecipeError(f"{prefix}{key}: expected keys and values, found {value!r:.60}")
    return value


def by_task(document: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
    """Names of tasks and their values, none if the key is absent."""
    values = mapping(document, key)
    for task in values:
        if not isinstance(task, str):
            raise RecipeError(
                f"{key}: expected names of tasks, found {task!r}, which is how YAML reads numbers, dates and yes, no, "
                "on, off; in quotes it is a name"
            )
    return list(values.items())


def output_folder(output: Mapping[str, Any]) -> Path:
    """The folder that the key ``output`` names."""
    out = Path(text(output, "dir", "output."))
    if out.exists() and not out.is_dir():
        raise RecipeError(f"output.dir: expected a folder, {out} is a file")
    return out


def text_path(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise RecipeError(f"{key}: expected a path, found {value!r:.60}")
    return value


def text(document: Mapping[str, Any], key: str, prefix: str = "", default: str | None = None) -> str:
    value = document.get(key, default)
    if not isinstance(value, str) or not value:
        raise RecipeError(f"{prefix}{key}: expected text, found {value!r:.60}")
    return value


def text_or_none(document: Mapping[str, Any], key: str, prefix: str = "") -> str | None:
    """Text, None if the key is absent."""
    return None if document.get(key) is None else text(document, key, prefix)


def choice(document: Mapping[str, Any], key: str, choices: Sequence[str], prefix: str = "") -> str:
    """One of ``choices``, the first if the key is absent."""
    value = document.get(key, choices[0])
    if value not in choices:
        raise RecipeError(f"{prefix}{key}: expected one of {list(choices)}, found {value!r:.60}")
    return value


def flag(document: Mapping[str, Any], key: str, prefix: str, default: bool) -> bool:
    value = document.get(key, default)
    if not isinstance(value, bool):
        raise RecipeError(f"{prefix}{key}: expected true or false, found {value!r}")
    return value


def count(value: Any, key: str, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise RecipeError(f"{key}: expected a whole number of at least {least}, found {value!r:.60}")
    return value


def numbers(value: Any) -> Any:
    """``value`` with numbers like 1e-3, which YAML reads as text, made numbers."""
    if isinstance(value, dict):
        return {str(key): numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [numbers(item) for item in value]
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value
