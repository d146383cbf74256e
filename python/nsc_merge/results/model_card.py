"""The model card that lies beside every saved merge."""

from __future__ import annotations

from nsc_merge.adapters import Adapter
from nsc_merge.models.fitting import absent
from nsc_merge.results.merged_update import MergedUpdate
from nsc_merge.results.serving_notes import serving_notes

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
    lines = ["---"]
    if len(bases) == 1:
        lines.append(f"base_model: {bases.pop()}")
    lines += [f"library_name: {'transformers' if 'model' in formats else 'peft'}", "tags:", "- merge", "- lora"]
    count = len(result.tasks)
    lines += ["---", "", f"# {count} LoRA adapter{'s' * (count > 1)} merged: {', '.join(result.tasks)}", ""]
    lines += [*_found(result), "", *_table(result), "", "## Loading", ""]
    for name in formats:
        lines.append(_LOADING[name].format(place=name if nested else ".", cls=type(result.model).__name__))
    lines += [f"- {note}" for note in _remarks(result, formats, rank, errors)]
    return "\n".join(lines).rstrip() + "\n"


def _found(result: MergedUpdate) -> list[str]:
    about = result.about or f"Method: `{result.method}`. All settings are in `recipe.yaml`."
    return [about, "", f"{result.course}."] if result.course else [about]


def _table(result: MergedUpdate) -> list[str]:
    if not result.coefficients:
        rows = [
            f"| {task} | {len(adapter.factors)} | {_ranks(adapter)} |" for task, adapter in result.adapters.items()
        ]
        return ["| task | modules | ranks |", "|---|---|---|", *rows]
    lines = ["| task | modules | ranks | coefficients | mean |", "|---|---|---|---|---|"]
    for task, adapter in result.adapters.items():
        values = [
            result.coefficients[path][task] if factor.fixed is None else factor.fixed
            for path, factor in adapter.factors.items()
        ]
        lines.append(
            f"| {task} | {len(adapter.factors)} | {_ranks(adapter)} | "
            f"{min(values):.3f} to {max(values):.3f} | {sum(values) / len(values):.3f} |"
        )
    return lines


def _ranks(adapter: Adapter) -> str:
    return ", ".join(map(str, sorted({factor.rank for factor in adapter.factors.values() if factor.rank})))


def _remarks(
    result: MergedUpdate, formats: list[str], rank: int | None, errors: dict[str, float]
) -> list[str]:
    remarks = serving_notes(result, rank) if "lora" in formats else []
    if errors:
        worst = max(errors, key=lambda path: errors[path])
        remarks.append(
            f"Truncated to rank {rank}: relative error of the update {sum(errors.values()) / len(errors):.3g} "
            f"on average, {errors[worst]:.3g} at most (`{worst}`); all in `truncation.json`."
        )
    heads = [task for task, adapter in result.adapters.items() if adapter.trained]
    if heads:
        remarks.append(
            f"Heads of {', '.join(heads)}: `heads/<task>.safetensors`, by parameter name; load one with "
            "`model.load_state_dict(tensors, strict=False)`."
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
    remarks += [f"{task}: {note}" for task, adapter in result.adapters.items() for note in adapter.notes]
    return remarks
