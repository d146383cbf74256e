"""The model card that lies beside every saved merge."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nsc_merge.adapters.folder_about import license_beside
from nsc_merge.models.bases.placement import PLAIN
from nsc_merge.models.bases.sharded import class_name
from nsc_merge.models.fitting import absent
from nsc_merge.models.traits import has_image_token
from nsc_merge.models.vocabulary import grown_modules
from nsc_merge.results.beside.figures import cell, data_table, tasks_table, truncation_table
from nsc_merge.results.beside.heads import Head, lacked
from nsc_merge.results.beside.loading_code import Base, Saved, block, origin_of, putting, quoted
from nsc_merge.results.beside.preprocessing import preprocessing_notes
from nsc_merge.results.beside.serving.sentence_modules import loaded_by
from nsc_merge.results.beside.serving_notes import serving_notes
from nsc_merge.results.beside.uses import use_of
from nsc_merge.results.layout import HEADS_FOLDER, RECORD, file_names, task_folders
from nsc_merge.results.merged_model import is_of_diffusers, part_of_pipeline
from nsc_merge.results.merged_update import MergedUpdate
from nsc_merge.utils.option_checks import is_hub_id
from nsc_merge.utils.yaml_text import to_yaml

# What hubs take for the name of a licence.
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")


def model_card(
    result: MergedUpdate,
    formats: list[str],
    folder: Path,
    rank: int | None,
    errors: dict[str, float],
    *,
    nested: bool,
    heads: Mapping[str, Head],
    head: str | None,
) -> str:
    """Markdown with the metadata that model hubs read.

    It states what was merged, how far the objective moved and what is left of the updates, and claims nothing about
    quality.

    Args:
        formats: what was written.
        folder: where it lies: code is of what is there.
        rank: of a truncated adapter.
        errors: relative error per module, if the adapter was truncated.
        nested: whether each format has a folder of its own.
        heads: task -> head that it brought.
        head: the task whose head was put in.
    """
    licenses = _licenses(result)
    lines = ["---", to_yaml(_metadata(result, formats, licenses, heads, head)) + "---", ""]
    count = len(result.tasks)
    lines += [f"# {count} LoRA adapter{'s' * (count > 1)} merged: {', '.join(map(cell, result.tasks))}", ""]
    lines += [*_found(result), "", *tasks_table(result), *data_table(result), *truncation_table(rank, errors)]
    lines += ["", "## Loading", ""]
    saved = [
        _saved(result, name, place, folder, heads, head)
        for name in formats
        if name != "coefficients"
        for place in [_places(result, name, nested=nested, head=head)[0]]
    ]
    if "coefficients" in formats:
        lines.append("`coefficients.json` holds one coefficient per module and task.\n")
    for one in saved:
        lines.append(_loading(result, one, heads, head, nested=nested))
    if heads:
        lines += _heads(result, saved, heads, head)
    lines += [f"- {note}" for note in _remarks(result, formats, rank, licenses, heads, head)]
    return "\n".join(lines).rstrip() + "\n"


def _metadata(
    result: MergedUpdate,
    formats: list[str],
    licenses: Mapping[str, str],
    heads: Mapping[str, Head],
    head: str | None,
) -> dict[str, Any]:
    """What hubs read: of a base only if it is one of theirs, and a task only where transformers names it."""
    adapters = result.adapters.values()
    name = Base.of(result.model).name
    bases = [name, *(adapter.base_model for adapter in adapters)]
    known = list(dict.fromkeys(base for base in bases if base is not None and is_hub_id(base)))
    whole = "model" in formats
    if known and whole:
        fetched = (adapter.about.hub for adapter in adapters)
        known = list(dict.fromkeys([*known, *(hub.partition("@")[0] for hub in fetched if hub)]))
    put = heads[head].kind if head else None
    use = use_of(put) if put else use_of(class_name(result.model), origin_of(result.model)[1])
    tag = use.tag if use else None
    if tag == "feature-extraction" and getattr(result.model, "main_input_name", "") == "pixel_values":
        tag = "image-feature-extraction"
    return {
        **({"base_model": known if len(known) > 1 else known[0]} if known else {}),
        **({"base_model_relation": "merge" if whole else "adapter"} if known else {}),
        "library_name": ("diffusers" if is_of_diffusers(result.model) else "transformers") if whole else "peft",
        **({"pipeline_tag": tag} if tag else {}),
        **_license(set(licenses.values())),
        "tags": ["merge", "lora"],
    }


def _license(said: set[str]) -> dict[str, str]:
    """The one on which all agree, as hubs call it: they know a licence of another name as ``other``."""
    if not said:
        return {}
    one = said.pop() if len(said) == 1 else ""
    if _LICENSE.fullmatch(one):
        return {"license": one}
    named = one.removeprefix("other (").removesuffix(")")
    return {"license": "other", **({"license_name": named} if _LICENSE.fullmatch(named) else {})}


def _licenses(result: MergedUpdate) -> dict[str, str]:
    """What each input says of its licence: the base by the card in its folder, adapters by theirs."""
    found = {f"`{cell(task)}`": adapter.about.license for task, adapter in result.adapters.items()}
    base = Base.of(result.model)
    folder = None if base.name is None else _folder_of(base)
    return {
        who: said
        for who, said in {"the base": license_beside(folder) if folder else None, **found}.items()
        if said is not None
    }


def _folder_of(base: Base) -> Path | None:
    """Where the card of a base lies, on this machine."""
    from huggingface_hub import try_to_load_from_cache

    name = str(base.name)
    if Path(name).is_dir():
        return Path(name)
    cached = try_to_load_from_cache(name, "README.md", revision=base.revision)
    return Path(cached).parent if isinstance(cached, str) else None


def _places(result: MergedUpdate, format: str, *, nested: bool, head: str | None) -> list[str]:
    """Where a format lies, or that of each task, the one with a head first."""
    own = [""]
    if result.per_task:
        folders = task_folders(result.tasks)
        own = [folders[task] for task in sorted(result.tasks, key=lambda task: task != head)]
    return ["/".join(part for part in (place, format if nested else "") if part) or "." for place in own]


def _saved(
    result: MergedUpdate, format: str, place: str, folder: Path, heads: Mapping[str, Head], head: str | None
) -> Saved:
    base = Base.of(result.model, result.inputs.get("revision"))
    kind, labels = class_name(result.model), None
    if head is not None:
        kind = heads[head].kind or kind
        labels = _files(result, head)[1] if heads[head].labels else None
    prompts = has_image_token(getattr(result.model, "config", None))
    grown = grown_modules(result.model)
    tokens = len(result.model.get_parameter(f"{grown[0]}.weight")) if grown else None
    return Saved(format, place, folder / place, kind, base, labels, *origin_of(result.model), prompts, tokens)


def _loading(
    result: MergedUpdate, saved: Saved, heads: Mapping[str, Head], head: str | None, *, nested: bool
) -> str:
    """How to load one format, and how to run it where it is of use as it is: of the first task, where every task has
    its own.
    """
    ready = head is not None or not heads
    own = loaded_by(saved.folder) if saved.format == "model" and not heads else None
    run = saved.using(made=False) if ready and saved.format == "model" else []
    if own is not None:
        lines = [f"from sentence_transformers import {own.kind}", f"model = {own.kind}({quoted(saved.place)})"]
        code = block([*lines, f"print(model.{own.call})"])
    elif run and "model=" in " ".join(run):
        code = block(run)
    else:
        code = block([*saved.loading(), *(saved.using(made=True) if ready else [])])
    if saved.format == "lora" and saved.base.name is None:
        code = f"`base_model` is the model that was merged on, a {saved.kind}{_classes(heads, head)}:\n\n{code}"
    others = ", ".join(f"`{place}`" for place in _places(result, saved.format, nested=nested, head=head)[1:])
    return f"{code}\nEvery task has its own; the others are in {others}.\n" if others else code


def _classes(heads: Mapping[str, Head], head: str | None) -> str:
    return f" of {len(heads[head].labels)} classes" if head is not None and heads[head].labels else ""


def _files(result: MergedUpdate, task: str) -> tuple[str, str]:
    """Of a head: its weights, and its classes."""
    stem = f"{HEADS_FOLDER}/{file_names(result.adapters)[task]}"
    return f"{stem}.safetensors", f"{stem}.json"


def _heads(result: MergedUpdate, saved: list[Saved], heads: Mapping[str, Head], head: str | None) -> list[str]:
    """What the tasks' heads are, and code that puts one into the model, if there is a place for it."""
    first = next(iter(heads))
    listed = ", ".join(f"`{_files(result, task)[0]}`" + _counted(one) for task, one in heads.items())
    lines = [f"The adapters brought heads: {listed}."]
    if head is not None:
        return [f"{lines[0]} That of {cell(head)} is in the model.", ""]
    file, labels = _files(result, first)
    one = heads[first]
    held = {name for name, _ in result.model.named_parameters(remove_duplicate=False)}
    if held >= one.tensors.keys():
        run = saved[-1].using(made=True) if saved else []
        put = putting(file, labels if one.labels else None)
        return [f"{lines[0]} After the code above, this puts one into `model`:", "", block([*put, *run])]
    missing = next(name for name in one.tensors if name not in held)
    lines = [f"{lines[0]} The base that was merged has no place for `{cell(missing)}`."]
    if one.kind is None or not saved or (saved[-1].format == "lora" and saved[-1].base.name is None):
        return [*lines, ""]
    last = saved[-1]
    told = f"{lines[0]} {one.kind} has one"
    if last.format == "model" and (without := lacked(result.model, one)):
        told += f", and `{cell(without[0])}`, which `{last.place}` lacks"
        # An adapter is put on the base's own file, which may have it.
        others = [other for other in saved if other.format == "lora" and other.base.name is not None]
        if not others:
            return [f"{told}; a merge on a base that was saved as {one.kind} has both.", ""]
        last = others[-1]
    headed = Saved(last.format, last.place, last.folder, one.kind, last.base, tokens=last.tokens)
    moved = getattr(result.model, "base_model", None) is result.model
    code = [*headed.with_a_head(file, labels, whole=not moved), *headed.using(made=True)]
    return [f"{told}:", "", block(code)]


def _counted(head: Head) -> str:
    return f" ({len(head.labels)} classes)" if head.labels else ""


def _found(result: MergedUpdate) -> list[str]:
    about = result.about or f"Method: `{result.method}`. All settings are in `recipe.yaml`."
    size = result.inputs.get(RECORD, {}).get("processes", 1)
    shared = [f"{size} processes shared the work, each holding a part of the base."] if size > 1 else []
    course = [f"{result.course}.", *shared] if result.course else shared
    return [about, *(["", *course] if course else [])]


def _remarks(
    result: MergedUpdate,
    formats: list[str],
    rank: int | None,
    licenses: Mapping[str, str],
    heads: Mapping[str, Head],
    head: str | None,
) -> list[str]:
    remarks = serving_notes(result, rank) if "lora" in formats else []
    if "lora" in formats and part_of_pipeline(result.model) and not any(map(result.is_whole, result.paths)):
        remarks.append("pipelines of diffusers load it as well, from its folder: `pipe.load_lora_weights`")
    if "lora" in formats and head is not None:
        remarks.append(f"the adapter holds the head of {cell(head)} (modules_to_save), which not every server loads")
        count, own = len(heads[head].labels), getattr(getattr(result.model, "config", None), "num_labels", None)
        if count not in (0, own):
            remarks[-1] += (
                "; the base's is of another size, so that `AutoPeftModel...from_pretrained` needs "
                f"`num_labels={count}, ignore_mismatched_sizes=True`"
            )
    if {"lora", "model"} & {*formats}:
        remarks += preprocessing_notes(result)
    quantised = result.inputs.get("quantization")
    if quantised == PLAIN:
        remarks.append("the base's quantised files were read as the numbers that they stand for")
    elif quantised and "lora" in formats:
        remarks.append(f"the base was quantised as it was loaded (`{quantised}`): give its `from_pretrained` the same")
    if getattr(result.model, "is_quantized", False) and "model" in formats:
        remarks.append("the base is quantised and the model is not: it holds the numbers that the base computes with")
    if licenses:
        silent = len(licenses) <= len(result.adapters)
        said = ", ".join(f"{who}: {cell(name)}" for who, name in licenses.items())
        remarks.append(f"licences of the inputs, as their cards say: {said}" + "; the others say none" * silent)
    numbered = [task for task, head in heads.items() if head.labels and not head.named]
    if numbered:
        remarks.append(
            f"the classes of {', '.join(map(cell, numbered))} are numbered, as nothing names them: "
            "`save(..., labels={task: names})` does"
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
    remarks += [f"{cell(task)}: {cell(note)}" for task, adapter in result.adapters.items() for note in adapter.notes]
    return remarks
