"""The tasks of a first recipe: what each is called, and what its adapter's folder says before any weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsc_merge.adapters import CONFIG_FILE, Adapter, outline_of
from nsc_merge.adapters.weights_beside import read_beside
from nsc_merge.recipes.yaml_keys import RecipeError


@dataclass(frozen=True)
class Task:
    """One adapter that is to be merged.

    Attributes:
        name: of the task.
        source: its folder, as an absolute path.
        outline: the adapter, of which only shapes are known.
        config: of PEFT.
    """

    name: str
    source: str
    outline: Adapter
    config: Mapping[str, Any]

    @property
    def ranks(self) -> list[int]:
        return sorted({factor.rank for factor in self.outline.factors.values()})

    @property
    def targets(self) -> list[str]:
        """Last parts of the paths of the adapted modules."""
        return sorted({path.rpartition(".")[2] for path in self.outline.factors})

    @property
    def whole(self) -> list[str]:
        """Modules that were trained in full."""
        return list(dict.fromkeys(name.rpartition(".")[0] for name in self.outline.trained))

    @property
    def has_dora(self) -> bool:
        return bool(self.config.get("use_dora"))

    @property
    def said(self) -> str:
        """What was found, in a line."""
        alpha = self.config.get("lora_alpha")
        count = len(self.outline.factors)
        parts = [
            f"rank {_span(self.ranks)}, alpha {alpha}" + (" (rsLoRA)" if self.config.get("use_rslora") else ""),
            f"{count} module{'s' if count > 1 else ''}: {', '.join(self.targets)}",
        ]
        return ", ".join([*parts, *(["DoRA"] if self.has_dora else [])])


def find_tasks(adapters: Sequence[str]) -> list[Task]:
    """The tasks of some adapters, each a folder or ``TASK=FOLDER``; of the others the folders make the names.

    Raises:
        RecipeError: if there is no such folder, if two tasks are called the same, or if one has no name.
        ValueError, OSError: if a folder holds no adapter that can be merged.
    """
    given: dict[Path, str] = {}
    folders: list[Path] = []
    for argument in adapters:
        name, equals, place = argument.partition("=")
        named = bool(equals) and not Path(argument).exists()
        folder = Path(place if named else argument).expanduser()
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "is missing"
            raise RecipeError(f"ADAPTER: {folder} {what}; expected a folder with {CONFIG_FILE}, as PEFT saves it")
        folder = folder.resolve()
        if folder in folders:
            raise RecipeError(f"ADAPTER: {folder} is given twice; expected each adapter once")
        if named:
            given[folder] = name.strip()
        folders.append(folder)
    others = [folder for folder in folders if folder not in given]
    names = {**dict(zip(others, _names(others), strict=True)), **given}
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice or not all(names.values()):
        found = f"{twice[0]!r} for several" if twice else "an empty one"
        raise RecipeError(f"ADAPTER: expected a name for each task, found {found}; TASK=FOLDER names one")
    tasks = []
    for folder in folders:
        outline, config = outline_of(folder, names[folder])
        # Refuses what only unpickling reads.
        beside = read_beside(folder, names[folder])
        outline.trained.update(beside.parameters)
        tasks.append(Task(names[folder], str(folder), outline, config))
    return tasks


def _names(folders: Sequence[Path]) -> list[str]:
    """Names of folders that tell them apart: the last parts of their paths that all differ, such as the third from the
    end of ``runs/french/checkpoint-500/adapter``.
    """
    for back in range(1, 1 + min((len(folder.parts) - 1 for folder in folders), default=0)):
        names = [folder.parts[-back] for folder in folders]
        if len(set(names)) == len(names):
            return names
    return ["-".join(folder.parts[1:]) for folder in folders]


def _span(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
