"""What the command line of ``pipeline`` gives: adapters, options of the method, prompts."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
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
_PICTURES = ("image", "mask_image", "control_image", "last_image")
_PLACE = re.compile(r"(?P<name>[^=]+)=(?P<path>.+?)(?::(?P<weight>[-+]?(\d+\.?\d*|\.\d+)))?", re.DOTALL)


@dataclass(frozen=True)
class Given:
    """An adapter as the command line names it.

    Attributes:
        name: it gets in the pipeline.
        place: file, folder or hub id, or a file of a repository there; None of one for the second transformer alone.
        weight: that it is used with.
        second: where that for the second transformer is, if it is named by itself.
        second_weight: of the second transformer.
    """

    name: str
    place: str | None
    weight: float
    second: str | None = None
    second_weight: float = 1.0

    @property
    def places(self) -> list[str]:
        return [place for place in (self.place, self.second) if place is not None]

    @property
    def weights(self) -> float | dict[str, float]:
        """As ``pipe.set_adapters`` takes it."""
        if self.second is None or self.weight == self.second_weight:
            return self.weight
        return {"transformer": self.weight, SECOND: self.second_weight}


def given_of(texts: Sequence[str]) -> list[Given]:
    """Adapters, each in one text, or in two where ``NAME.transformer_2=PATH`` is that of the second transformer.

    Raises:
        UsageError: if one is no adapter, or named twice.
    """
    found: dict[str, tuple[str, float | None]] = {}
    for text in texts:
        match = _PLACE.fullmatch(text)
        if match is None:
            raise UsageError(
                f"NAME=PATH:WEIGHT: expected an adapter such as ink=ink.safetensors:0.7, found {text!r:.80}"
            )
        name = match["name"].strip()
        short = name.removesuffix(f".{SECOND}")
        # PEFT keeps adapters by names without.
        if not short or "." in short:
            raise UsageError(f"NAME: expected a name without dots, or NAME.{SECOND}, found {name!r:.80}")
        if name in found or short == MERGED:
            names = [text.partition("=")[0] for text in texts]
            raise UsageError(f"NAME: expected different names other than {MERGED!r}, found {names}")
        found[name] = match["path"], None if match["weight"] is None else float(match["weight"])
    return [_put_together(name, found) for name in dict.fromkeys(one.removesuffix(f".{SECOND}") for one in found)]


def _put_together(name: str, found: Mapping[str, tuple[str, float | None]]) -> Given:
    place, weight = found.get(name, (None, None))
    second, own = found.get(f"{name}.{SECOND}", (None, None))
    # Of one alone, the other's has no meaning, and of two one may be for both.
    first_weight = weight if weight is not None else own if place is None and own is not None else 1.0
    return Given(name, place, first_weight, second, first_weight if own is None else own)


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


def option_of(text: str, option: str = "--option") -> tuple[str, Any]:
    from nsc_merge.utils.yaml_text import from_yaml

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"{option}: expected KEY=VALUE, found {text!r:.80}")
    return key, from_yaml(value)


def prompts_of(file: Path, names: list[str]) -> dict[str, list[Any]]:
    from nsc_merge.utils.yaml_text import read_yaml

    if not file.is_file():
        raise ValueError(f"--prompts: expected a file with prompts of {names}, found none at {file}")
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
        name: [opened(one, folder, f"prompts[{name!r}]") if isinstance(one, Mapping) else one for one in every]
        if isinstance(every, list)
        else every
        for name, every in prompts.items()
    }


def opened(arguments: Mapping[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """Arguments of a pipeline of which those that are pictures are open, a list of them, too."""
    from nsc_merge.calibration.raw.media.images import ImageReader

    reader = ImageReader(folder)

    def one(key: str, value: Any) -> Any:
        if isinstance(value, list):
            return [one(key, each) for each in value]
        return reader.open(value, f"{where}: {key}") if isinstance(value, str) else value

    return {key: one(key, value) if key in _PICTURES else value for key, value in arguments.items()}


@dataclass(frozen=True)
class Size:
    """Of what is drawn."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def size_of(text: str) -> Size:
    """``1024`` or ``1280x720``, the width first."""
    found = re.fullmatch(r"(?P<width>[1-9]\d*)(?:[x×](?P<height>[1-9]\d*))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected a number of pixels, or WIDTHxHEIGHT, found {text!r:.40}")
    return Size(int(found["width"]), int(found["height"] or found["width"]))
