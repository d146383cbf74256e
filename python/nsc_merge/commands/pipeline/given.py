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
_PLACE = re.compile(r"(?P<name>[^=]+)=(?P<path>.+?)(?::(?P<weight>[-+]?(\d+\.?\d*|\.\d+)))?", re.DOTALL)


@dataclass(frozen=True)
class Given:
    """An adapter as the command line names it.

    Attributes:
        name: it gets in the pipeline.
        place: file, folder or hub id.
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


def is_hub(place: str) -> bool:
    """Whether it is ``owner/name`` or ``owner/name@revision``, and nothing on disk."""
    return is_hub_id(place.partition("@")[0])


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
