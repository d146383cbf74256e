"""A recipe made of a configuration of mergekit as YAML with comments, and what is said of it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from nsc_merge.recipes.first.commented_yaml import Yaml, relative, shown
from nsc_merge.recipes.first.mergekit.configurations import Imported
from nsc_merge.utils.yaml_text import to_yaml


def imported_text(found: Imported, folder: Path, name: str = "recipe.yaml") -> str:
    """The recipe of a configuration.

    Args:
        found: it.
        folder: that its paths are relative to.
        name: of its file there.
    """
    yaml = Yaml()
    yaml.remark(
        f"Made by nsc-merge import of {found.file.name}, a configuration of mergekit with merge_method "
        f"{found.merge_method}. The adapters are merged from their factors, in float32."
    )
    yaml.verbatim("#   " + shown(shlex.join(["nsc-merge", "run", name])))
    for note in found.notes:
        yaml.remark(note)
    yaml.section()
    yaml.entries({"model": (relative(found.base, folder), "")})
    if found.revision is not None:
        yaml.entries({"revision": (found.revision, "")})
    yaml.verbatim("adapters:")
    said = {task.name: f"{task.said}, {task.modules}" for task in found.tasks}
    yaml.entries({task.name: (relative(task.source, folder), said[task.name]) for task in found.tasks}, 2)
    yaml.section(f"{found.method.summary}. Source: {found.method.paper}.")
    yaml.entries({"method": (found.method.name, "")})
    if found.options:
        yaml.verbatim("options:")
    for option, value in found.options.items():
        lines = to_yaml({option: value}).splitlines()
        yaml.verbatim(*(f"  {line}" for line in lines))
    yaml.section()
    yaml.entries({"dtype": (found.dtype, "of the base, and of the model that is written")})
    formats = found.formats
    yaml.verbatim("output:")
    both = "an adapter for the base, and the model, which is what mergekit writes"
    alone = "as mergekit writes it; with lora and rank: beside it an adapter that is an approximation"
    yaml.entries({"dir": ("merged", ""), "formats": (formats, both if "lora" in formats else alone)}, 2)
    return str(yaml)


def import_summary(found: Imported, out: str, command: str) -> dict[str, Any]:
    """What was imported and where the recipe is, for programs.

    Args:
        out: the recipe's path.
        command: that comes next.
    """
    return {
        "recipe": out,
        "merge_method": found.merge_method,
        "base": found.base,
        "tasks": {task.name: task.source for task in found.tasks},
        "method": found.method.name,
        "options": found.options,
        "dtype": found.dtype,
        "formats": found.formats,
        "notes": found.notes,
        "next": command,
    }


def import_said(found: Imported, out: str, command: str) -> str:
    """The same for a terminal."""
    lines = [f"method    {found.merge_method} is {found.method.name} here"]
    for number, task in enumerate(found.tasks):
        lines.append(f"{'' if number else 'adapters':8}  {task.name}: {task.said}")
    lines += [f"note      {note}" for note in found.notes]
    return "\n".join([*lines, f"written   {out}", f"next      {command}"])
