"""Task files of one's own for the lm-evaluation-harness: what they read, and whether it is on the hub.

Known before the harness is imported, as libraries settle on import whether they may touch the network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nsc_merge.recipes.yaml_keys import RecipeError

# What datasets reads files with; any other dataset_path that is no folder is an id on the hub.
_READERS = ("json", "csv", "parquet", "text", "arrow", "pandas", "xml", "imagefolder", "audiofolder", "webdataset")


@dataclass(frozen=True)
class TaskFile:
    """A task or a group of tasks, as its file has it."""

    path: Path
    config: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Reads:
    """What tasks read.

    Attributes:
        builtin: whether some task is one of the harness's own.
        hub: whether some data are, or may be, on the hub.
        files: data on disk.
    """

    builtin: bool = False
    hub: bool = False
    files: tuple[Path, ...] = ()

    def __or__(self, other: Reads) -> Reads:
        return Reads(self.builtin or other.builtin, self.hub or other.hub, (*self.files, *other.files))


def read_task_files(folder: Path) -> dict[str, TaskFile]:
    """Name -> file of every task and group in a folder and below, where the harness looks for them.

    Raises:
        RecipeError: naming a file that is no YAML.
    """
    found: dict[str, TaskFile] = {}
    for path in sorted(folder.glob("**/*.yaml")):
        config = _read(path, ())
        name = config.get("group", config.get("task"))
        if isinstance(name, str):
            found.setdefault(name, TaskFile(path, config))
    return found


def reads(name: str, known: Mapping[str, TaskFile], argument: str) -> Reads:
    """What a task or group reads, by its name; a name that is not ``known`` is one of the harness's own.

    Raises:
        RecipeError: naming ``argument`` and a file that is missing.
    """
    if name not in known:
        return Reads(builtin=True, hub=True)
    file = known[name]
    if not isinstance(file.config.get("task"), list):
        return _of_task(file.config, file.path, argument)
    shared = {key: value for key, value in file.config.items() if key not in ("group", "task")}
    found = Reads()
    for member in file.config["task"]:
        own = {"task": member} if isinstance(member, str) else member
        inner = own.get("task", own.get("group"))
        if isinstance(inner, str) and inner != name and (inner in known or not own.keys() - {"task", "group"}):
            found |= reads(inner, known, argument)
        else:
            found |= _of_task({**shared, **own}, file.path, argument)
    return found


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """Keys and values of a file with those that it includes; functions that it names stay unknown."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("!", lambda *_: None)
    if path in seen:
        raise RecipeError(f"lm_eval.include_path: {path} includes itself")
    try:
        document = yaml.load(path.read_bytes(), Loader)
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"lm_eval.include_path: {path}: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        return {}
    included = document.pop("include", [])
    merged: dict[str, Any] = {}
    for one in included if isinstance(included, list) else [included]:
        merged |= _read((path.parent / str(one)).resolve(), (*seen, path))
    return merged | document


def _of_task(config: Mapping[str, Any], path: Path, argument: str) -> Reads:
    if "class" in config:
        return Reads(hub=True)
    source = config.get("dataset_path")
    settings = config.get("dataset_kwargs") or {}
    if "custom_dataset" in config:
        return Reads()
    if not isinstance(source, str):
        return Reads(hub=True)
    if Path(source).exists():
        return Reads(files=(Path(source).resolve(),))
    if source not in _READERS:
        return Reads(hub=True)
    places = [*_texts(settings.get("data_files")), *_texts(settings.get("data_dir"))]
    local = [Path(place) for place in places if "://" not in place]
    for place in local:
        if not any(sign in str(place) for sign in "*?[") and not place.exists():
            raise RecipeError(
                f"{argument}: {path} reads {place}, which is missing; the harness takes relative paths from the "
                f"working folder, here {Path.cwd()}"
            )
    return Reads(hub=len(local) < len(places), files=tuple(place.resolve() for place in local))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(one)
