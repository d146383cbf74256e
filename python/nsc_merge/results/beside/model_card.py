"""The model card that lies beside every saved merge."""

from __future__ import annotations

from nsc_merge.adapters import Adapter
from nsc_merge.models.bases.sharded import class_name
from nsc_merge.models.fitting import absent
from nsc_merge.results.beside.preprocessing import preprocessing_notes
from nsc_merge.results.beside.serving_notes import serving_notes
from nsc_merge.results.layout import HEADS_FOLDER, RECORD, file_names, task_folders
from nsc_merge.results.merged_update import MergedUpdate
from nsc_merge.utils.yaml_text import to_yaml

_LOADING = {
    "lora": """\
```python
from peft import PeftModel
model = PeftModel.from_pretrained(base_model, "{place}")
```
""",
    "model": """\
```python
from transformers import {cls}
model = {cls}.from_pretrained("{place}")
```
""",
    "coefficients": "`coefficients.json` holds one coefficient per module and task.\n",
}

# Not load_state_dict: tasks have heads of other sizes than the base.
_HEAD = """\
The adapters brought heads: {files}. After the code above, this puts one into `model`:

```python
import torch
from safetensors.torch import load_file
for name, value in load_file("{file}").items():
    path, _, parameter = name.rpartition(".")
    layer = model.get_submodule(path)
    setattr(layer, parameter, torch.nn.Parameter(value.to(layer.weight)))
{labels}```
"""


def model_card(
    result: MergedUpdate, formats: list[str], rank: int | None, errors: dict[str, float], *, nested: bool
) -> str:
    """Markdown with the metadata that model hubs read.

    It states what was merged and how far the objective moved, and claims nothing about quality.

    Args:
        formats: what was written.
        rank: of a truncated adapter.
        errors: relative error per module, if the adapter was truncated.
        nested: whether each format has a folder of its own.
    """
    bases = {adapter.base_model for adapter in result.adapters.values() if adapter.base_model}
    about = {
        **({"base_model": bases.pop()} if len(bases) == 1 else {}),
        "library_name": "transformers" if "model" in formats else "peft",
        "tags": ["merge", "lora"],
    }
    lines = ["---", to_yaml(about) + "---", ""]
    count = len(result.tasks)
    lines += [f"# {count} LoRA adapter{'s' * (count > 1)} merged: {', '.join(map(_text, result.tasks))}", ""]
    lines += [*_found(result), "", *_table(result), "", "## Loading", ""]
    for name in formats:
        lines.append(_loading(result, name, nested=nested))
    if any(adapter.trained for adapter in result.adapters.values()):
        lines.append(_heads(result))
    lines += [f"- {note}" for note in _remarks(result, formats, rank, errors)]
    return "\n".join(lines).rstrip() + "\n"


def _text(name: str) -> str:
    """The name of a task, which may hold anything, in a line or a cell."""
    return " ".join(name.split()).replace("|", "\\|")


def _loading(result: MergedUpdate, format: str, *, nested: bool) -> str:
    """How to load one format: of the first task, where every task has its own."""
    own = list(task_folders(result.tasks).values()) if result.per_task else [""]
    places = ["/".join(part for part in (place, format if nested else "") if part) or "." for place in own]
    code = _LOADING[format].format(place=places[0], cls=class_name(result.model))
    others = ", ".join(f"`{place}`" for place in places[1:])
    return f"{code}\nEvery task has its own; the others are in {others}.\n" if others else code


def _heads(result: MergedUpdate) -> str:
    """What the tasks' heads are, and code that puts one into the model, if that has a place for it."""
    names = file_names(result.adapters)
    heads = {f"{HEADS_FOLDER}/{names[task]}.safetensors": one.trained for task, one in result.adapters.items()}
    heads = {file: tensors for file, tensors in heads.items() if tensors}
    files = ", ".join(f"`{file}`" for file in heads)
    shapes = {name: list(value.shape) for name, value in result.model.named_parameters(remove_duplicate=False)}
    missing = sorted({name for tensors in heads.values() for name in tensors} - set(shapes))
    if missing:
        return f"The adapters brought heads: {files}. The base that was merged has no place for `{missing[0]}`.\n"
    # The layer that has an output for each label, if there is one.
    labels = getattr(getattr(result.model, "config", None), "num_labels", None)
    first = next(iter(heads))
    layer = next((name for name in heads[first] if len(shapes[name]) == 2 and shapes[name][0] == labels), None)
    told = f'model.config.num_labels = len(model.get_parameter("{layer}"))\n' if layer else ""
    return _HEAD.format(files=files, file=first, labels=told)


def _found(result: MergedUpdate) -> list[str]:
    about = result.about or f"Method: `{result.method}`. All settings are in `recipe.yaml`."
    size = result.inputs.get(RECORD, {}).get("processes", 1)
    shared = [f"{size} processes shared the work, each holding a part of the base."] if size > 1 else []
    return [about, "", *([f"{result.course}.", *shared] if result.course else shared)]


def _table(result: MergedUpdate) -> list[str]:
    if not result.coefficients:
        rows = [
            f"| {_text(task)} | {len(adapter.factors)} | {_ranks(adapter)} |"
            for task, adapter in result.adapters.items()
        ]
        return ["| task | modules | ranks |", "|---|---|---|", *rows]
    lines = ["| task | modules | ranks | coefficients | mean |", "|---|---|---|---|---|"]
    for task, adapter in result.adapters.items():
        values = [
            result.coefficients[path][task] if factor.fixed is None else factor.fixed
            for path, factor in adapter.factors.items()
        ]
        lines.append(
            f"| {_text(task)} | {len(adapter.factors)} | {_ranks(adapter)} | "
            f"{min(values):.3f} to {max(values):.3f} | {sum(values) / len(values):.3f} |"
        )
    return lines


def _ranks(adapter: Adapter) -> str:
    return ", ".join(map(str, sorted({factor.rank for factor in adapter.factors.values() if factor.rank})))


def _remarks(
    result: MergedUpdate, formats: list[str], rank: int | None, errors: dict[str, float]
) -> list[str]:
    remarks = serving_notes(result, rank) if "lora" in formats else []
    if {"lora", "model"} & {*formats}:
        remarks += preprocessing_notes(result)
    if errors:
        worst = max(errors, key=lambda path: errors[path])
        remarks.append(
            f"Truncated to rank {rank}: relative error of the update {sum(errors.values()) / len(errors):.3g} "
            f"on average, {errors[worst]:.3g} at most (`{worst}`); all in `truncation.json`."
        )
    dead = sum(len(tasks) for tasks in result.dead.values())
    if dead:
        remarks.append(
            f"{dead} coefficients received no gradient, as nothing measured depends on them; "
            f"modules: {', '.join(f'`{path}`' for path in result.dead)}."
        )
    missing = absent(result.adapters)
    if missing:
        remarks.append(f"{len(missing)} modules are not adapted by every task; the others count as 0 there.")
    remarks += result.notes
    remarks += [f"{_text(task)}: {note}" for task, adapter in result.adapters.items() for note in adapter.notes]
    return remarks
