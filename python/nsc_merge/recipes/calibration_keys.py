"""The keys of a recipe that say what it is calibrated on: ``calibration``, by task, and ``data``, for all tasks."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from nsc_merge.calibration.raw.settings import DataSettings
from nsc_merge.recipes.yaml_keys import RecipeError, absolute_model, by_task, mapping, refuse_unknown, text_path
from nsc_merge.utils.option_checks import is_hub_id

# Code of others is allowed by a key of the whole recipe.
DATA_KEYS = tuple(one.name for one in fields(DataSettings) if one.name != "trust_remote_code")
_HELPERS = ("tokenizer", "processor")
# A mistyped path to a file must not reach the network, whatever folders there are.
_FILE = re.compile(
    r".*\.(safetensors|jsonl|ndjson|json|csv|tsv|parquet|arrow|txt|png|jpe?g|wav|flac|mp3|ogg|zip|gz|bz2|xz|zst|tar|bin|pth?|np[yz]|pkl"
    r"|xlsx|yaml)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class CalibrationSource:
    """What the inputs of one task are made of.

    Attributes:
        source: file or folder, or the id of a dataset on the hub.
        local: whether it is on disk.
        settings: what is taken of it and how it is encoded, if it is raw data.
        own: the keys of ``settings`` that are this task's, not the defaults of all.
    """

    source: str
    local: bool = True
    settings: DataSettings = field(default_factory=DataSettings)
    own: tuple[str, ...] = ()

    @property
    def offline(self) -> bool:
        """Whether nothing that it takes is on the hub, a tokenizer beside the base aside."""
        named = (self.settings.tokenizer, self.settings.processor)
        return self.local and all(name is None or Path(name).is_absolute() for name in named)

    def as_written(self) -> dict[str, Any]:
        """The keys with their values, as a recipe has them, whatever its defaults."""
        held = {key: getattr(self.settings, key) for key in DATA_KEYS}
        return {"source": self.source, **{key: list(v) if isinstance(v, tuple) else v for key, v in held.items()}}


def absolute_source(value: Any, base: Path) -> Any:
    """A task's calibration with the paths in it made absolute."""
    if isinstance(value, dict):
        source = {"source": absolute_source(value["source"], base)} if "source" in value else {}
        return {**absolute_data(value, base), **source}
    if not isinstance(value, str) or (is_hub_id(value, base) and not _FILE.fullmatch(value)):
        return value
    return str(base / Path(value).expanduser())


def absolute_data(value: Any, base: Path) -> Any:
    """The settings of raw data with the paths in them made absolute."""
    if not isinstance(value, dict):
        return value
    return {**value, **{key: absolute_model(value[key], base) for key in _HELPERS if key in value}}


def calibration_in(
    document: Mapping[str, Any], tasks: Collection[str], *, trust_remote_code: bool
) -> dict[str, CalibrationSource]:
    """Task -> its calibration, of a document whose paths are absolute; files and folders are there.

    Raises:
        RecipeError: naming the key, what was found and what was expected.
    """
    # What is wrong with them is said once, and also where no task has them.
    data_in(document, trust_remote_code=trust_remote_code)
    data = mapping(document, "data")
    found = {}
    for task, value in by_task(document, "calibration"):
        key = f"calibration.{task}"
        if task not in tasks:
            raise RecipeError(f"{key}: no such task (tasks: {', '.join(tasks)})")
        found[task] = source_in(key, value, data, trust_remote_code=trust_remote_code)
        check_there(key, found[task])
    return found


def source_in(key: str, value: Any, data: Mapping[str, Any], *, trust_remote_code: bool) -> CalibrationSource:
    """The source that the value of ``key`` names, whose file or folder need not be there.

    Args:
        key: how messages call it.
        value: of a document whose paths are absolute.
        data: defaults of its settings.
        trust_remote_code: of the recipe.

    Raises:
        RecipeError: naming the key, what was found and what was expected.
    """
    given = dict(value) if isinstance(value, dict) else {"source": text_path(key, value)}
    refuse_unknown(f"{key}.", given, ("source", *DATA_KEYS))
    source = text_path(f"{key}.source", given.pop("source", None))
    local = Path(source).is_absolute()
    settings = _settings(_together(data, given), f"{key}.", trust_remote_code)
    if local and given.get("revision") is not None:
        raise RecipeError(f"{key}.revision: is of a dataset on the hub, but {source} is a path; expected none")
    return CalibrationSource(source, local, settings, tuple(given))


def refuse_without_effect(overrides: Sequence[str], document: Mapping[str, Any]) -> None:
    """Refuse overrides of ``data`` that no task would notice, as where a saved merge's recipe has every key of each.

    Args:
        overrides: ``"key.sub=value"``.
        document: what they have made of a recipe.

    Raises:
        RecipeError: naming the key, and the one to change.
    """
    given = [value if isinstance(value, dict) else {} for _, value in by_task(document, "calibration")]
    for override in overrides:
        parts = override.partition("=")[0].split(".")
        if len(parts) != 2 or parts[0] != "data" or not given:
            continue
        if all(parts[1] in own for own in given):
            raise RecipeError(
                f"{'.'.join(parts)}: has no effect, since every task sets {parts[1]} itself; expected "
                f"calibration.TASK.{parts[1]}=... for each (tasks: {', '.join(document['calibration'])})"
            )


def check_there(key: str, source: CalibrationSource) -> None:
    """Refuse a file or folder that is missing.

    Raises:
        RecipeError: naming ``key`` and the path.
    """
    if source.local and not Path(source.source).exists():
        raise RecipeError(
            f"{key}: expected a file or folder of raw data, or of inputs in safetensors, {source.source} is missing"
        )


def data_in(document: Mapping[str, Any], *, trust_remote_code: bool) -> DataSettings:
    """The defaults that the key ``data`` of a document sets.

    Raises:
        RecipeError: naming the key, what was found and what was expected.
    """
    data = mapping(document, "data")
    refuse_unknown("data.", data, DATA_KEYS)
    return _settings(data, "data.", trust_remote_code)


def _settings(data: Mapping[str, Any], prefix: str, trust_remote_code: bool) -> DataSettings:
    try:
        return DataSettings(**data, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise RecipeError(f"{prefix}{error}") from None


def _together(data: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A task's own settings in front of those for all: a chat takes the place of a text, and the other way round."""
    instead = {
        "text": ("messages", "texts"),
        "messages": ("text", "text_pair", "texts"),
        "texts": ("text", "text_pair", "messages", "target"),
    }
    replaced = {other for key, others in instead.items() if own.get(key) is not None for other in others}
    return {**{key: value for key, value in data.items() if key not in replaced}, **own}
