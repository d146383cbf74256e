"""The tasks of a first recipe: what each is called, and what its adapter's folder says before any weight is read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from nsc_merge.adapters import CONFIG_FILE, Adapter, Factor, outline_of
from nsc_merge.adapters.adapter import name_of
from nsc_merge.adapters.folder_about import class_names, labels_beside
from nsc_merge.adapters.formats.parameter_stacks import updates_of
from nsc_merge.adapters.hub import fetch
from nsc_merge.adapters.weights_beside import read_beside
from nsc_merge.recipes.yaml_keys import RecipeError
from nsc_merge.utils.option_checks import is_hub_id

_CLASSIFIER = "AutoModelForSequenceClassification"


@dataclass(frozen=True)
class Task:
    """One adapter that is to be merged.

    Attributes:
        name: of the task.
        source: its folder, as an absolute path, or what it is called on the hub.
        outline: the adapter, of which only shapes are known.
        config: of PEFT.
        labels: names of its head's classes, where its folder says them.
    """

    name: str
    source: str
    outline: Adapter
    config: Mapping[str, Any]
    labels: list[str] = field(default_factory=list)

    @property
    def updates(self) -> dict[str, Factor]:
        return updates_of(self.outline)

    @property
    def ranks(self) -> list[int]:
        return sorted({factor.rank for factor in self.updates.values()})

    @property
    def targets(self) -> list[str]:
        """Names of the adapted modules, and of modules with adapted parameters, in their parents."""
        return sorted({name_of(path) for path in self.updates})

    @property
    def whole(self) -> list[str]:
        """Modules that were trained in full."""
        return list(dict.fromkeys(name.rpartition(".")[0] for name in self.outline.trained))

    @property
    def outputs(self) -> int | None:
        """How many numbers the head gives that it brought; None where it brought none."""
        heads = [value for value in self.outline.trained.values() if value.dim() == 2]
        # The last of several layers gives what none of them reads.
        read = {value.shape[1] for value in heads}
        last = [value for value in heads if len(value) not in read] or heads
        return min(map(len, last), default=None)

    def kind_on(self, model: nn.Module) -> str:
        """The class of the model that it was trained in; PEFT puts classifiers on any base."""
        return _CLASSIFIER if self.config.get("task_type") == "SEQ_CLS" else type(model).__name__

    @property
    def has_dora(self) -> bool:
        return bool(self.config.get("use_dora"))

    @property
    def modules(self) -> str:
        """The adapted modules, in words."""
        count = len(self.updates)
        return f"{count} module{'s' if count > 1 else ''}: {', '.join(self.targets)}"

    @property
    def said(self) -> str:
        """Of the updates, in words."""
        rs = " (rsLoRA)" if self.config.get("use_rslora") else ""
        return f"rank {_span(self.ranks)}, alpha {self.config.get('lora_alpha')}{rs}" + ", DoRA" * self.has_dora


def find_tasks(adapters: Sequence[str]) -> list[Task]:
    """The tasks of some adapters, each a folder or ``owner/name[@revision]`` on the hub, with ``TASK=`` in front or
    not; tasks without a name are called like the folder.

    Raises:
        RecipeError: if there is no such folder, if two tasks are called the same, or if one has no name.
        ValueError, OSError: if there is no adapter that can be merged.
    """
    sources: list[str] = []
    given: dict[str, str] = {}
    for argument in adapters:
        name, equals, place = argument.partition("=")
        named = bool(equals) and not Path(argument).exists()
        source = _source(place if named else argument)
        if source in sources:
            raise RecipeError(f"ADAPTER: {source} is given twice; expected each adapter once")
        if named:
            given[source] = name.strip()
        sources.append(source)
    others = [source for source in sources if source not in given]
    names = {**dict(zip(others, _names(others), strict=True)), **given}
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice or not all(names.values()):
        found = f"{twice[0]!r} for several" if twice else "an empty one"
        raise RecipeError(f"ADAPTER: expected a name for each task, found {found}; TASK=FOLDER names one")
    return [_task(source, names[source]) for source in sources]


def _source(text: str) -> str:
    folder = Path(text).expanduser()
    if folder.is_dir():
        return os.path.abspath(folder)
    if is_hub_id(text.partition("@")[0]):
        return text
    what = "is a file" if folder.exists() else "is missing"
    raise RecipeError(
        f"ADAPTER: {folder} {what}; expected a folder with {CONFIG_FILE}, as PEFT saves it, or owner/name on the hub"
    )


def _task(source: str, name: str) -> Task:
    names = None
    folder = Path(source)
    if not folder.is_absolute():
        repo, _, revision = source.partition("@")
        folder, _, names = fetch(repo, name, revision=revision or None)
    outline, config = outline_of(folder, name)
    # Refuses what only unpickling reads.
    outline.trained.update(read_beside(folder, name, names).parameters)
    return Task(name, source, outline, config, class_names(labels_beside(folder)))


def _names(sources: Sequence[str]) -> list[str]:
    """Names that tell sources apart: the last parts of their paths that all differ, such as the second from the end of
    ``runs/french/checkpoint-500``.
    """
    paths = [[part for part in source.partition("@")[0].split("/") if part] for source in sources]
    for back in range(1, 1 + min(map(len, paths), default=0)):
        names = [path[-back] for path in paths]
        if len(set(names)) == len(names):
            return names
    return ["-".join(path) for path in paths]


def _span(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
