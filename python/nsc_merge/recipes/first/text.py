"""A first recipe as YAML with comments."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nsc_merge.calibration.raw.settings import DataSettings
from nsc_merge.models.bases.placement import PLAIN, is_choice
from nsc_merge.models.families import FAMILIES, family_said
from nsc_merge.recipes.first.commented_yaml import Yaml, key_of, relative, shown
from nsc_merge.recipes.first.findings import WITHOUT_DATA, Findings
from nsc_merge.recipes.first.summary import base_said, measured_said, memory_said
from nsc_merge.recipes.merge_recipe import Recipe
from nsc_merge.utils.memory import size_said

# A rank that every server takes.
_SMALL = 16
# With what the usual method is to be compared.
_OTHERS = ("match", WITHOUT_DATA)


def recipe_text(found: Findings, folder: Path, name: str = "recipe.yaml", schema: str | None = None) -> str:
    """The recipe of what was found.

    Args:
        found: it.
        folder: that its paths are relative to.
        name: of its file there.
        schema: path of the JSON schema, relative to ``folder``, that editors are to complete keys from.
    """
    yaml = Yaml()
    if schema is not None:
        yaml.verbatim(f"# yaml-language-server: $schema={schema}")
    count = len(found.tasks)
    yaml.remark(f"Merges {count} LoRA adapter{'s' if count > 1 else ''}. Written by nsc-merge init, to be edited.")
    command = shown(shlex.join(["nsc-merge", "run", name]))
    yaml.verbatim(
        f"#   {command} --dry-run   loads everything, says what a merge takes, and writes nothing",
        f"#   {command}             merges",
        "# Paths are relative to this file. All keys: nsc-merge run --help",
    )
    for warning in found.warnings:
        yaml.remark(f"WARNING {warning}")
    _inputs(yaml, found, folder)
    _merging(yaml, found, name)
    _output(yaml, found)
    return str(yaml)


def _inputs(yaml: Yaml, found: Findings, folder: Path) -> None:
    base = found.base
    yaml.section(f"The base model: {base_said(found)}.")
    yaml.entries({"model": (relative(base.source, folder), "")})
    if base.revision is not None:
        yaml.entries({"revision": (base.revision, "")})
    alike = len({one.modules for one in found.tasks}) == 1
    touched = f"; all touch {found.tasks[0].modules}" if alike else ""
    yaml.section(f"Each task by the name that it shall have, and its adapter{touched}.")
    yaml.verbatim("adapters:")
    said = {one.name: one.said if alike else f"{one.said}, {one.modules}" for one in found.tasks}
    yaml.entries({one.name: (relative(one.source, folder), said[one.name]) for one in found.tasks}, 2)
    if any(task.has_dora for task in found.tasks):
        yaml.section("DoRA is merged as it is; the adapter saved is then DoRA, too, which vLLM does not serve.")
        yaml.entries({"dora": ("exact", "or convert: the nearest plain LoRA of the same rank")})
    shared = sorted({path for one in found.tasks for path in one.whole if path not in found.heads.get(one.name, ())})
    if shared:
        yaml.section(f"Trained in full, and the base's own: {_some(shared)}.")
        yaml.entries({"shared_modules": ("lambda", "a coefficient per task, as for the rest; or mean, or first")})
    if found.heads:
        _heads(yaml, found)
    if not found.data:
        return
    yaml.section("Unlabelled inputs of each task, as it is used: labels are not looked at.")
    if "data" not in found.method.needs:
        yaml.remark(f"Method {found.method.name} does not read them.")
    yaml.verbatim("calibration:")
    for_all = _named_for_all(found)
    entries: dict[str, tuple[Any, str]] = {}
    alike = len({one.source for one in found.data.values()}) == 1 < len(found.data)
    if alike:
        yaml.remark(f"The same for all: {next(iter(found.data.values())).said}.", 2)
    for task, one in found.data.items():
        source = relative(one.source, folder)
        own = {} if one.named == for_all else one.named
        entries[task] = ({"source": source, **own} if own else source, "" if alike else one.said)
    yaml.entries(entries, 2)
    if found.samples:
        _encoding(yaml, found, for_all)


def _named_for_all(found: Findings) -> dict[str, Any]:
    """The settings of raw data that have to be written, where they are the same for all; else each task has its own."""
    named = [one.named for one in found.data.values() if one.raw]
    return named[0] if named and all(one == named[0] for one in named) else {}


def _heads(yaml: Yaml, found: Findings) -> None:
    """What the classes of the tasks' own heads are called."""
    named = {task.name: _some(task.labels, 8) for task in found.tasks if task.labels and task.name in found.heads}
    paths = sorted({path for heads in found.heads.values() for path in heads})
    yaml.section(f"Each task keeps a head of its own: {_some(paths)} of {', '.join(found.heads)}.")
    for task, labels in named.items():
        yaml.remark(f"Classes of {task}, as its folder says: {labels}.")
    unnamed = [task for task in found.heads if task not in named]
    if unnamed:
        yaml.remark("What its classes are called, in order (or a .txt with one a line, or .json):")
        yaml.verbatim("# labels:")
        for task in unnamed:
            yaml.verbatim(f"#   {shown(key_of(task))}: [first, second]")


def _encoding(yaml: Yaml, found: Findings, named: Mapping[str, Any]) -> None:
    """What of raw data is taken, and how."""
    said = {
        "text": "a column, or columns put together, as the adapters were trained",
        "texts": "columns that are read each alone, with the prompts in front that were trained",
        "text_pair": "a second text, which the tokenizer puts behind the first",
        "messages": "the column of chats, which go through the tokenizer's chat template",
        "target": "what the decoder reads; without it the token that begins every answer alone",
    }
    values: dict[str, tuple[Any, str]] = {key: (value, said[key]) for key, value in named.items()}
    steps = found.options.get("steps")
    used = f": {steps} steps of {found.batch_size} use {steps * found.batch_size}" if steps else ""
    if used and "texts" in named:
        used += f" texts, and a row has {len(named['texts'])}"
    values["samples"] = (found.samples, f"drawn of each at most, the same ones every time{used}")
    if any(one.words for one in found.data.values()):
        longest = [one.longest for one in found.data.values() if one.longest is not None]
        most = min([DataSettings.max_length, *longest])
        values["max_length"] = (most, "tokens of a sample at most; longer ones are cut")
    if any(one.audio for one in found.data.values()):
        values["max_seconds"] = (DataSettings.max_seconds, "of a recording at most; longer ones are cut")
    values["seed"] = (DataSettings.seed, "of the draw")
    yaml.verbatim("data:")
    yaml.entries(values, 2)


def _merging(yaml: Yaml, found: Findings, name: str) -> None:
    method = found.method
    yaml.section(f"How they are merged: {method.summary}. Source: {method.paper}.")
    yaml.remark(found.chosen)
    _advice(yaml, found, name)
    yaml.entries({"method": (method.name, "all of them, with their options: nsc-merge methods")})
    if found.options:
        yaml.verbatim("options:")
        yaml.entries({name: (value, _option_said(name, found)) for name, value in found.options.items()}, 2)
    if "data" in method.needs:
        yaml.entries({"batch_size": (found.batch_size, "samples of each task in a step")})
    if found.measured:
        yaml.remark(f"Measured: the input of {measured_said(found)}.")
        if found.base.family and found.base.family not in FAMILIES:
            yaml.remark(f"Family: {family_said(found.base.family)}.")
    if found.bytes is not None:
        yaml.remark(memory_said(found))
    yaml.section()
    dtype = f"that of the base's files ({found.base.dtype}); or float32, bfloat16, float16"
    yaml.entries({"dtype": ("auto", dtype), "device": ("auto", "a GPU if there is one; or cpu, cuda, cuda:1, mps")})
    if is_choice(found.base.quantised):
        said = f"{found.base.quantised} files as plain numbers; or none: as codes, whose kernels have no gradient"
        yaml.entries({"quantization": (PLAIN, said)})


def _advice(yaml: Yaml, found: Findings, name: str) -> None:
    """What is known of the method, for somebody who has to choose one."""
    if found.method.name == Recipe.method:
        yaml.remark("A lower ratio is not always a better model (docs/results.md). With the same data, and without:")
        run = shown(shlex.join(["nsc-merge", "run", name]))
        yaml.verbatim(*(f"#   {run} method={one} output.dir=merged-{one}" for one in _OTHERS))
        can_generate = getattr(found.base.model, "can_generate", None)
        if can_generate is not None and can_generate():
            yaml.remark("With samples that end where an answer begins, along what each task's own model answers:")
            # What tells inputs of tasks apart is nothing where they are the same.
            apart = len({one.source for one in found.data.values()}) == len(found.tasks) > 1
            terms = " options.regmean=true" * apart
            own = [f"calibration.{task}" for task, one in found.data.items() if one.target is not None]
            places = ["data"] if "target" in _named_for_all(found) else own
            terms += "".join(f" {shown(shlex.quote(f'{place}.target=null'))}" for place in places)
            yaml.verbatim(f"#   {run} method=distill options.new_tokens=16{terms} output.dir=merged-distill")
    elif found.method.tuned is not None:
        tuned = found.method.tuned
        yaml.remark(f"Its {tuned} decides much: try a few on labelled data (nsc-merge eval), if there is some.")


def _option_said(name: str, found: Findings) -> str:
    preset = f"of the preset {found.preset}, " if found.preset else ""
    if name == "steps":
        return f"{preset}each on one batch of every task"
    if name == "lr":
        return f"{preset}how far a coefficient may move in a step"
    if name == "score_modules":
        return "measured, since none of the linears that usually are has an adapter"
    if found.method.tuned == name:
        several = len(found.tasks)
        return f"coefficient of every adapter; 1/{several} is their mean, 1 their sum"
    return ""


def _output(yaml: Yaml, found: Findings) -> None:
    formats = formats_of(found)
    said = {"lora": "lora: an adapter for the base", "model": f"model: all of it, {size_said(found.base.size)}"}
    yaml.section("What is written, and where to.")
    yaml.verbatim("output:")
    yaml.entries({"dir": ("merged", ""), "formats": (formats, "; ".join(said[name] for name in formats))}, 2)
    if head := head_of(found):
        yaml.entries({"head": (head, "the task whose head they have; those of all are in heads/")}, 2)
    rank = sum(max(task.ranks) for task in found.tasks)
    if "lora" in formats and found.method.gives == "coefficients" and rank > _SMALL:
        yaml.verbatim(f"  # rank: {_SMALL}  # of an adapter that is an approximation; it is exact at rank {rank}")
    if "model" not in formats:
        yaml.remark("A model of plain numbers comes of a quantised base by formats: [model], dequantize: true.", 2)


def head_of(found: Findings) -> str | None:
    """A task whose head has a place in the base's class."""
    held = {name for name, _ in found.base.model.named_modules()}
    return next((task for task, heads in found.heads.items() if set(heads) <= held), None)


def formats_of(found: Findings) -> list[str]:
    """What the method's update can be written as."""
    gives = found.method.gives_with(found.options)
    lora = ["lora"] if gives in ("coefficients", "low rank") else []
    return lora + ([] if found.base.quantised and lora else ["model"])


def _some(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
