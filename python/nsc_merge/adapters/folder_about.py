"""What lies beside weights and says what they are: the licence of a model card, the labels of a configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nsc_merge.utils.json_text import from_json
from nsc_merge.utils.yaml_text import from_yaml

_CARD, _CONFIG = "README.md", "config.json"
# As trainers call the folders of earlier states of the same adapter.
_CHECKPOINT = re.compile(r"checkpoint-\d+")
# The metadata of a model card, as the hub writes it: YAML between two lines of dashes, at its very beginning.
_FRONT_MATTER = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?\r?\n)---[ \t]*(\r?\n|\Z)", re.DOTALL)
# A configuration is small, but for the names of many classes.
_MOST_BYTES = 4 << 20


def license_beside(folder: Path) -> str | None:
    """The licence that the card in a folder names, as the hub calls it, with its own name where that is ``other``; None
    if there is no card, or none that can be read: it is of no matter to the weights.
    """
    import yaml

    found = _FRONT_MATTER.match(_text(folder / _CARD))
    try:
        about = from_yaml(found[1]) if found else None
    except yaml.YAMLError:
        return None
    if not isinstance(about, dict):
        return None
    named = about.get("license")
    if named == "other" and about.get("license_name"):
        named = f"other ({about['license_name']})"
    if isinstance(named, list):
        named = ", ".join(str(one) for one in named)
    return " ".join(str(named).split())[:200] or None if named is not None else None


def labels_beside(folder: Path) -> dict[int, str]:
    """``id2label`` of a ``config.json`` in a folder; empty if there is none that numbers classes from 0."""
    try:
        config = from_json(_text(folder / _CONFIG), _CONFIG, not_finite=True)
    except ValueError:
        return {}
    named: Any = config.get("id2label") if isinstance(config, dict) else None
    if not isinstance(named, dict) or set(named) != {str(number) for number in range(len(named))}:
        return {}
    if not all(isinstance(label, str) and label for label in named.values()):
        return {}
    return {number: named[str(number)] for number in range(len(named))}


def class_names(id2label: Mapping[int, str]) -> list[str]:
    """Names of classes in the order of their numbers; none where a number is missing, or they are only numbered, as
    transformers does it.
    """
    names = [str(id2label[number]) for number in range(len(id2label)) if number in id2label]
    numbered = names == [f"LABEL_{number}" for number in range(len(names))]
    return [] if numbered or len(names) != len(id2label) else names


def adapters_within(folder: Path, file: str) -> list[str]:
    """A note where folders within have such a file, too: PEFT saves a model's adapters there, but for the default."""
    try:
        named = sorted(one.parent.name for one in folder.glob(f"*/{file}"))
    except OSError:
        return []
    found = [name for name in named if not _CHECKPOINT.fullmatch(name)]
    listed = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    what = f"folders within its own hold other adapters, which are not read ({listed}): name each that is to be merged"
    return [what] if found else []


def _text(file: Path) -> str:
    """What a file holds, nothing if it is none that can be read."""
    try:
        if not file.is_file() or file.stat().st_size > _MOST_BYTES:
            return ""
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
