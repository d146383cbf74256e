"""A first recipe as YAML with comments, and what the command says of it."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nsc_merge.methods import METHODS
from nsc_merge.recipes.first.findings import Findings
from nsc_merge.recipes.merge_recipe import Recipe
from nsc_merge.utils.yaml_text import to_yaml

_WIDTH = 100


class Yaml:
    """YAML text that grows line by line, with a remark beside or above each entry."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def __str__(self) -> str:
        return "\n".join(self._lines) + "\n"

    def remark(self, text: str, indent: int = 0) -> None:
        """A comment of its own, over as many lines as it takes."""
        start = f"{'':{indent}}# "
        self._lines += textwrap.wrap(_shown(text), _WIDTH, initial_indent=start, subsequent_indent=start)

    def verbatim(self, *lines: str) -> None:
        self._lines += lines

    def section(self, title: str = "") -> None:
        self._lines.append("")
        if title:
            self.remark(title)

    def entries(self, values: Mapping[str, tuple[Any, str]], indent: int = 0) -> None:
        """Keys with a value and a remark each, the remarks beside them where there is room."""
        written = [(_entry(key, value), note) for key, (value, note) in values.items()]
        column = max((len(line) for (line, *more), _ in written if not more and len(line) <= 48), default=0)
        for (line, *more), note in written:
            start = f"{'':{indent}}{line:{column}}  # "
            beside = not more and len(line) <= column and len(start) + len(_shown(note)) <= _WIDTH + 20
            if note and not beside:
                self.remark(note, indent)
            self._lines.append(f"{start}{_shown(note)}" if note and beside else f"{'':{indent}}{line}")
            self._lines += [f"{'':{indent}}{one}" for one in more]


def _entry(key: str, value: Any) -> list[str]:
    """A key and its value in YAML; lists of plain names in brackets."""
    if isinstance(value, list):
        return [f"{key}: [{', '.join(value)}]"]
    return to_yaml({key: value}).splitlines()


def _shown(text: str) -> str:
    """Text in one line, of characters that a comment may hold."""
    return " ".join("".join(one if one.isprintable() else " " for one in text).split())


def recipe_text(found: Findings, folder: Path, schema: str | None = None) -> str:
    """The recipe of what was found.

    Args:
        folder: that its paths are relative to.
        schema: path of the JSON schema, relative to ``folder``, that editors are to complete keys from.
    """
    yaml = Yaml()
    if schema is not None:
        yaml.verbatim(f"# yaml-language-server: $schema={schema}")
    count = len(found.tasks)
    yaml.remark(f"Merges {count} LoRA adapter{'s' if count > 1 else ''}. Written by nsc-merge init, to be edited.")
    yaml.verbatim(
        "#   nsc-merge run recipe.yaml --dry-run   loads everything, says what it takes, and writes nothing",
        "#   nsc-merge run recipe.yaml             merges",
        "# Paths are relative to this file. All keys: nsc-merge run --help",
    )
    for warning in found.warnings:
        yaml.remark(f"WARNING {warning}")
    _inputs(yaml, found, folder)
    _merging(yaml, found)
    _output(yaml, found)
    return str(yaml)


def _inputs(yaml: Yaml, found: Findings, folder: Path) -> None:
    base = found.base
    yaml.section(f"The base model: {base_said(found)}.")
    yaml.entries({"model": (_relative(base.source, folder) if base.local else base.source, "")})
    yaml.section("Each task by the name that it shall have, and its adapter.")
    yaml.verbatim("adapters:")
    yaml.entries({one.name: (_relative(one.source, folder), one.said) for one in found.tasks}, 2)
    if any(task.has_dora for task in found.tasks):
        yaml.section("DoRA has no exact place in a sum of updates: each is replaced by the nearest plain update.")
        yaml.entries({"dora": ("convert", "")})
    shared = sorted({path for one in found.tasks for path in one.whole if path not in found.heads.get(one.name, ())})
    if shared:
        yaml.section(f"Trained in full, and the base's own: {_some(shared)}.")
        yaml.entries({"shared_modules": ("lambda", "a coefficient per task, as for the rest; or mean, or first")})
    if not found.data:
        return
    yaml.section("Unlabelled inputs of each task, as it is used: labels are not looked at.")
    unused = "data" not in found.method.needs
    if unused:
        yaml.remark(f"Method {found.method.name} does not read them.")
    yaml.verbatim("calibration:")
    places = {
        task: (_relative(one.source, folder) if Path(one.source).is_absolute() else one.source, one.said)
        for task, one in found.data.items()
    }
    yaml.entries(places, 2)


def _merging(yaml: Yaml, found: Findings) -> None:
    method = found.method
    yaml.section(f"How they are merged: {method.summary}")
    yaml.remark(f"({method.paper}).")
    yaml.remark(found.chosen)
    yaml.remark(_advice(found))
    yaml.entries({"method": (method.name, "all of them, with their options: nsc-merge methods")})
    if found.options:
        yaml.verbatim("options:")
        yaml.entries({name: (value, _option_said(name, found)) for name, value in found.options.items()}, 2)
    if "data" in method.needs:
        yaml.entries({"batch_size": (found.batch_size, "samples of each task in a step")})
    if found.measured:
        yaml.remark(f"Measured: the input of {len(found.measured)} linears, {_ends(found.measured)}.")
    if found.bytes is not None:
        yaml.remark(memory_said(found))
    yaml.section()
    dtype = f"that of the base's files ({found.base.dtype}); or float32, bfloat16, float16"
    yaml.entries({"dtype": ("auto", dtype), "device": ("auto", "a GPU if there is one; or cpu, cuda, cuda:1")})


def _advice(found: Findings) -> str:
    """What is known of the method, for somebody who has to choose one."""
    if found.method.name == Recipe.method:
        return (
            "It lowers its objective, which does not always make a better model: compare with "
            "method=task_arithmetic, which takes no data, and with method=match, which takes the same "
            "(docs/results.md)."
        )
    if found.method.tuned is not None:
        return (
            f"Its {found.method.tuned} decides much: try a few on labelled data (nsc-merge eval), if there is some."
        )
    return ""


def _option_said(name: str, found: Findings) -> str:
    preset = f"of the preset {found.preset}, " if found.preset else ""
    if name == "steps":
        return f"{preset}each on one batch of every task"
    if name == "lr":
        return f"{preset}how far a coefficient may move in a step"
    if found.method.tuned == name:
        several = len(found.tasks)
        return f"coefficient of every adapter; 1/{several} is their mean, 1 their sum"
    return ""


def _output(yaml: Yaml, found: Findings) -> None:
    formats = formats_of(found)
    said = []
    if "lora" in formats:
        rank = sum(max(task.ranks) for task in found.tasks)
        exact = f"an adapter for the base, exact at rank {rank} (rank: 16 makes it smaller)"
        said.append(f"lora: {exact if found.method.gives == 'coefficients' else 'an adapter for the base'}")
    if "model" in formats:
        said.append(f"model: the whole merged model, {size_said(found.base.size)}")
    elif found.base.quantised:
        said.append("no model: the base is quantised")
    yaml.section("What is written.")
    yaml.verbatim("output:")
    values: dict[str, tuple[Any, str]] = {"dir": ("merged", "")}
    values["formats"] = (formats, "; ".join(said))
    yaml.entries(values, 2)


def formats_of(found: Findings) -> list[str]:
    """What the method's update can be written as."""
    gives = found.method.gives_with(found.options)
    lora = ["lora"] if gives in ("coefficients", "low rank") else []
    return lora + ([] if found.base.quantised and lora else ["model"])


def base_said(found: Findings) -> str:
    base = found.base
    count = f"{base.parameters / 1e9:.2f} billion" if base.parameters >= 1e8 else f"{base.parameters / 1e6:.2f} million"
    quantised = f", quantised ({base.quantised})" if base.quantised else ""
    family = f"family {base.family.name}" if base.family else "a family that nsc does not know"
    return f"{type(base.model).__name__}, {count} parameters, {base.dtype}{quantised}, {family}"


def memory_said(found: Findings) -> str:
    there = f" of {size_said(found.device_bytes)}" if found.device_bytes else ""
    assert found.bytes is not None and found.operations is not None
    return (
        f"By formula a step takes {size_said(found.bytes)}{there} and {found.operations / 1e12:.3g} TFLOP; the dry run "
        "measures both."
    )


def size_said(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _relative(source: str, folder: Path) -> str:
    """A path as seen from a folder, where it is below the folder or beside it."""
    place, folder = Path(source), folder.resolve()
    return os.path.relpath(place, folder) if place.is_relative_to(folder.parent) else source


def _some(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def _ends(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def summary(found: Findings, out: str, command: str) -> dict[str, Any]:
    """What was found, and where the recipe is, for programs.

    Args:
        out: the recipe's path, ``"-"`` for standard output.
        command: that comes next.
    """
    base = found.base
    return {
        "recipe": out,
        "model": type(base.model).__name__,
        "base": base.source,
        "parameters": base.parameters,
        "dtype": base.dtype,
        "family": base.family.name if base.family else None,
        "tasks": {
            task.name: {
                "adapter": task.source,
                "ranks": task.ranks,
                "alpha": task.config.get("lora_alpha"),
                "modules": len(task.outline.factors),
                "targets": task.targets,
                "base": task.outline.base_model,
                "heads": found.heads.get(task.name, []),
                "trained_in_full": task.whole,
            }
            for task in found.tasks
        },
        "data": {task: {"source": one.source, "found": one.said} for task, one in found.data.items()},
        "method": found.method.name,
        "preset": found.preset,
        "options": found.options,
        "batch_size": found.batch_size,
        "measured_modules": found.measured,
        "step_bytes": found.bytes,
        "device_bytes": found.device_bytes,
        "step_operations": found.operations,
        "warnings": found.warnings,
        "next": command,
    }


def render(found: Findings, out: str, command: str) -> str:
    """What was found, for a terminal."""
    lines = [f"base      {base_said(found)}"]
    for number, task in enumerate(found.tasks):
        heads = found.heads.get(task.name)
        lines.append(f"{'' if number else 'adapters':8}  {task.name}: {task.said}" + (
            f"; its head: {', '.join(heads)}" if heads else ""
        ))
    for number, (name, one) in enumerate(found.data.items()):
        lines.append(f"{'' if number else 'data':8}  {name}: {one.said}")
    options = ", ".join(f"{name} {value}" for name, value in found.options.items())
    preset = f" (preset {found.preset})" if found.preset else ""
    lines.append(f"method    {found.method.name}{f': {options}' if options else ''}{preset}")
    if found.chosen:
        lines.append(f"          {found.chosen}")
    if found.measured:
        lines.append(f"measured  {len(found.measured)} linears: {_ends(found.measured)}")
    if found.bytes is not None:
        lines.append(f"memory    {memory_said(found)}")
    lines += [f"warning   {warning}" for warning in found.warnings]
    return "\n".join([*map(_shown_line, lines), f"written   {out}", f"next      {command}"])


def _shown_line(line: str) -> str:
    return "".join(one if one.isprintable() else " " for one in line)
