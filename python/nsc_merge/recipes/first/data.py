"""The data of a first recipe: which file is which task's, and what is in it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nsc_merge.calibration.batch_files import Batches, check_names
from nsc_merge.calibration.raw.files.text_files import kind_of
from nsc_merge.recipes.calibration_keys import absolute_source
from nsc_merge.recipes.yaml_keys import RecipeError
from nsc_merge.utils.option_checks import did_you_mean
from nsc_merge.utils.safetensors_checks import DTYPES, check_safetensors


@contextmanager
def naming_options() -> Iterator[None]:
    """Within it, errors that name a key of a recipe, which is not written yet, name the option for it, too."""
    try:
        yield
    except ValueError as error:
        asked = [key for key in ("text", "labels") if re.search(f"(write|expected) {key}: ", str(error))]
        if not asked:
            raise
        raise ValueError(f"{error}; nsc-merge init has --{asked[0]} for it") from None


@dataclass(frozen=True)
class Data:
    """Inputs of a task.

    Attributes:
        source: absolute path, or an id on the hub.
        said: what was found, in a line.
        batch: inputs of a batch as far as shapes go; None where nothing was looked at.
        text: column or template of the text, where a recipe has to name it.
        text_pair: that of a second text.
        texts: columns or templates of texts that are read each alone, for embeddings.
        longest: tokens at which these are cut, where the base says it.
        target: that of what a decoder reads.
        messages: the column of chats, where it has no usual name.
        raw: whether it is raw data, which settings say how to encode; False for safetensors.
        words: whether there are texts in it.
        audio: whether there is audio in it.
    """

    source: str
    said: str
    batch: Mapping[str, Tensor] | None
    text: str | None = None
    text_pair: str | None = None
    texts: Sequence[str] | None = None
    longest: int | None = None
    target: str | None = None
    messages: str | None = None
    raw: bool = False
    words: bool = False
    audio: bool = False

    @property
    def named(self) -> dict[str, Any]:
        """The settings of raw data that a recipe has to write."""
        names = ("text", "text_pair", "texts", "target", "messages")
        return {key: value for key in names if (value := getattr(self, key)) is not None}


def sources(arguments: Sequence[str], tasks: Sequence[str], flag: str = "--data") -> dict[str, str]:
    """Task -> absolute path or hub id of its data, of the arguments of ``--data``: something for all tasks, a folder
    whose entries are called like the tasks, or ``TASK=`` in front of something for one.

    Raises:
        RecipeError: if there is no such thing, or if a task is left without, or has two.
    """
    found: dict[str, str] = {}
    for argument in arguments:
        name, equals, place = argument.partition("=")
        if equals and name in tasks:
            given = {name: _place(place, flag)}
        elif equals and not Path(argument).exists():
            hint = did_you_mean(name, tasks) or f" (tasks: {', '.join(tasks)})"
            raise RecipeError(f"{flag}: {name!r} is no task{hint}")
        else:
            given = _by_name(Path(argument), tasks, flag) or dict.fromkeys(tasks, _place(argument, flag))
        for task, source in given.items():
            if task in found:
                raise RecipeError(f"{flag}: task {task!r} is given {found[task]} and {source}; expected one of them")
            found[task] = source
    missing = [task for task in tasks if task not in found]
    if found and missing:
        raise RecipeError(f"{flag}: nothing is given for task {missing[0]!r}; expected {flag} {missing[0]}=FILE, too")
    return {task: found[task] for task in tasks if task in found}


def _place(text: str, flag: str) -> str:
    place = Path(text).expanduser()
    if place.exists():
        return os.path.abspath(place)
    if absolute_source(text, Path.cwd()) == text and not place.is_absolute():
        return text
    raise RecipeError(f"{flag}: {text} is missing; expected a file or a folder, or the id owner/name of a dataset")


def _by_name(folder: Path, tasks: Sequence[str], flag: str) -> dict[str, str]:
    """Task -> the entry of a folder that is called like it; empty if none is."""
    folder = folder.expanduser()
    entries = [entry for entry in folder.iterdir() if entry.name[0] != "."] if folder.is_dir() else []
    called: dict[str, list[Path]] = {}
    for entry in sorted(entries):
        # Of a packed file without both of its suffixes.
        bare = entry.stem if kind_of(entry) == entry.suffix.lower() else Path(entry.stem).stem
        for name in {entry.name, entry.stem, bare} if entry.is_file() else {entry.name}:
            called.setdefault(name, []).append(entry)
    if not any(task in called for task in tasks):
        return {}
    for task in tasks:
        if len(called.get(task, ())) != 1:
            several = ", ".join(entry.name for entry in called.get(task, ())) or "none"
            raise RecipeError(
                f"{flag}: {folder} has entries called like tasks; expected one for task {task!r}, found {several} "
                f"(or {flag} TASK=FILE)"
            )
    return {task: os.path.abspath(called[task][0]) for task in tasks}


def stored_inputs(source: str, model: nn.Module, batch_size: int, task: str) -> Data:
    """What a safetensors file of stacked inputs holds, or a folder whose files are one batch each, by its headers.

    Raises:
        ValueError, OSError: if it holds none of the model's inputs.
    """
    place = Path(source)
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    header = check_safetensors(files[0])
    shapes = {name: entry["shape"] for name, entry in header.items() if entry["shape"]}
    if not shapes:
        raise ValueError(f"--data {task}: {files[0]} holds no inputs with rows")
    batch = {}
    for name, (first, *others) in shapes.items():
        dtype = DTYPES[header[name]["dtype"]]
        rows = first if place.is_dir() else min(first, batch_size)
        # A mask of zeros counts as one with padding in it; images are large, and only their shape counts.
        device = "meta" if dtype.is_floating_point else "cpu"
        batch[name] = torch.zeros([rows, *others], dtype=dtype, device=device)
    check_names(Batches([batch]), model, f"--data {task}")
    held = f"{len(files)} batches" if place.is_dir() else f"{max(shape[0] for shape in shapes.values())} rows"
    return Data(source, f"safetensors, {held} of {', '.join(sorted(header))}", batch)
