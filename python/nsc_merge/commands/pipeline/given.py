"""What the command line of ``pipeline`` gives: adapters, options of the method, prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsc_merge.utils.errors import UsageError
from nsc_merge.utils.option_checks import is_hub_id

# What the merge is called in the pipeline.
MERGED = "merged"
# Wan's, of which an adapter is in a folder of this name within that of the first transformer's.
SECOND = "transformer_2"
_FILE = ".safetensors"
# Arguments of pipelines that are pictures, which a file of prompts names by their paths.
_PICTURES = ("image", "mask_image", "control_image")
_PLACE = re.compile(r"(?P<name>[^=]+)=(?P<path>.+?)(?::(?P<weight>[-+]?(\d+\.?\d*|\.\d+)))?", re.DOTALL)


@dataclass(frozen=True)
class Given:
    """An adapter as the command line names it.

    Attributes:
        name: it gets in the pipeline.
        place: file, folder or hub id, or a file of a repository there.
        weight: that it is used with.
    """

    name: str
    place: str
    weight: float


def given_of(text: str) -> Given:
    match = _PLACE.fullmatch(text)
    if match is None:
        raise UsageError(f"NAME=PATH:WEIGHT: expected an adapter such as ink=ink.safetensors:0.7, found {text!r:.80}")
    return Given(match["name"].strip(), match["path"], float(match["weight"] or 1.0))


@dataclass(frozen=True)
class OnHub:
    """``owner/name`` on the hub, or a file there, ``owner/name/folder/file.safetensors``, perhaps with ``@revision``.

    Attributes:
        repo: ``owner/name``.
        options: what diffusers calls the file, its folder and the revision, where they are named.
    """

    repo: str
    options: dict[str, str]


def on_hub(place: str) -> OnHub | None:
    """None of what is on disk, or would be: a mistyped path must not reach the network."""
    name, _, revision = place.partition("@")
    owner, *others = name.split("/")
    repo, within = "/".join([owner, *others[:1]]), others[1:]
    is_file = name.endswith(_FILE)
    if not is_hub_id(repo) or is_file is not bool(within):
        return None
    file = {"weight_name": within[-1]} if within else {}
    folder = {"subfolder": "/".join(within[:-1])} if within[:-1] else {}
    return OnHub(repo, file | folder | ({"revision": revision} if revision else {}))


def option_of(text: str) -> tuple[str, Any]:
    from nsc_merge.utils.yaml_text import from_yaml

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"--option: expected KEY=VALUE, found {text!r:.80}")
    return key, from_yaml(value)


def prompts_of(file: Path, names: list[str]) -> dict[str, list[Any]]:
    from nsc_merge.utils.yaml_text import read_yaml

    found = read_yaml(file)
    if not isinstance(found, Mapping) or set(found) != set(names):
        told = list(found) if isinstance(found, Mapping) else type(found).__name__
        raise ValueError(f"{file}: expected prompts for each of {names}, found {told}")
    return {name: found[name] for name in names}


def with_pictures(prompts: Mapping[str, list[Any]], folder: Path) -> dict[str, Any]:
    """Prompts of which arguments that are pictures are open.

    Args:
        folder: that their paths are relative to.

    Raises:
        ValueError: naming a file that is missing, or no picture.
    """
    return {
        name: [_opened(one, folder, f"prompts[{name!r}]") if isinstance(one, Mapping) else one for one in every]
        if isinstance(every, list)
        else every
        for name, every in prompts.items()
    }


def _opened(prompt: Mapping[str, Any], folder: Path, where: str) -> dict[str, Any]:
    from nsc_merge.calibration.raw.media.images import ImageReader

    reader = ImageReader(folder)

    def opened(value: Any, key: str) -> Any:
        # Some pipelines take several at once.
        if isinstance(value, list):
            return [opened(one, key) for one in value]
        return reader.open(value, f"{where}: {key}") if isinstance(value, str) else value

    return {key: opened(value, key) if key in _PICTURES else value for key, value in prompt.items()}
