"""What was found for a first recipe, said to a person or to a program."""

from __future__ import annotations

from typing import Any

from nsc_merge.models.families import FAMILIES, family_said
from nsc_merge.recipes.first.findings import Findings
from nsc_merge.utils.memory import size_said


def base_said(found: Findings) -> str:
    base = found.base
    count = f"{base.parameters / 1e9:.2f} billion" if base.parameters >= 1e8 else f"{base.parameters / 1e6:.2f} million"
    quantised = f", quantised ({base.quantised})" if base.quantised else ""
    family = f"family {base.family.name}" if base.family else "a family that nsc does not know"
    return f"{type(base.model).__name__}, {count} parameters, {base.dtype}{quantised}, {family}"


def memory_said(found: Findings) -> str:
    there = f" of {size_said(found.device_bytes)}" if found.device_bytes else ""
    count = found.operations or 0
    operations = f"{count / 1e12:.3g} TFLOP" if count >= 1e12 else f"{count / 1e9:.3g} GFLOP"
    taken = f"{size_said(found.bytes or 0)}{there} of memory and {operations}"
    return f"By formula a step takes {taken}; the dry run measures how long that is."


def measured_said(found: Findings) -> str:
    names = found.measured
    return names[0] if len(names) == 1 else f"{len(names)} linears, {names[0]} to {names[-1]}"


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
                "modules": len(task.updates),
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
        head = f"; its head: {', '.join(heads)}" if heads else ""
        lines.append(f"{'' if number else 'adapters':8}  {task.name}: {task.said}, {task.modules}{head}")
    said = {name: one.said for name, one in found.data.items()}
    if len({one.source for one in found.data.values()}) == 1 < len(said):
        said = {"for all": next(iter(said.values()))}
    lines += [f"{'' if number else 'data':8}  {name}: {text}" for number, (name, text) in enumerate(said.items())]
    options = ", ".join(f"{name} {value}" for name, value in found.options.items())
    preset = f" (preset {found.preset})" if found.preset else ""
    lines.append(f"method    {found.method.name}{f': {options}' if options else ''}{preset}")
    if found.chosen:
        lines.append(f"          {found.chosen}")
    if found.measured and found.base.family and found.base.family not in FAMILIES:
        lines.append(f"family    {family_said(found.base.family)}")
    if found.measured:
        lines.append(f"measured  the input of {measured_said(found)}")
    if found.bytes is not None:
        lines.append(f"memory    {memory_said(found)}")
    lines += [f"warning   {warning}" for warning in found.warnings]
    lines = [line.replace("\n", " ") for line in lines]
    return "\n".join([*lines, f"written   {out}", f"next      {command}"])
