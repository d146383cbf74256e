"""What the ``pipeline`` command writes: the merged adapter, what it was made of, a card, and pictures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nsc_merge.adapters.formats.diffusers_file import FILE
from nsc_merge.commands.pipeline.given import MERGED, SECOND, Given, on_hub
from nsc_merge.integrations.diffusers import save
from nsc_merge.integrations.peft import Merged
from nsc_merge.utils.atomic_folder import replacing_folder
from nsc_merge.utils.json_text import finite_or_none
from nsc_merge.utils.plot_style import write_picture
from nsc_merge.utils.provenance import hashes, version_of, versions
from nsc_merge.utils.yaml_text import to_yaml

DOCUMENT, PICTURES = "merge.json", "images.png"


def write(
    pipe: Any,
    arguments: argparse.Namespace,
    given: Sequence[Given],
    options: Mapping[str, Any],
    prompts: Mapping[str, Any] | None,
    merged: Mapping[str, Merged],
    pictures: Any,
) -> dict[str, Any]:
    """Write the folder as a whole, and return what ``merge.json`` holds.

    Args:
        pictures: a figure of pyplot, or None.
    """
    document = _document(arguments, given, options, prompts, merged)
    with replacing_folder(arguments.out, _is_outdated) as staging:
        save(pipe, MERGED, staging)
        (staging / DOCUMENT).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        (staging / "README.md").write_text(_card(document, type(pipe).__name__, staging), encoding="utf-8")
        if pictures is not None:
            write_picture(pictures, staging / PICTURES)
    return document


def _is_outdated(path: Path, written: set[Path]) -> bool:
    """Of an earlier merge in the same folder: pictures, or the adapter of a model that this one has none of."""
    return str(path) in (PICTURES, f"{SECOND}/{FILE}")


def _document(
    arguments: argparse.Namespace,
    given: Sequence[Given],
    options: Mapping[str, Any],
    prompts: Mapping[str, Any] | None,
    merged: Mapping[str, Merged],
) -> dict[str, Any]:
    adapters = {}
    for one in given:
        first = {} if one.place is None else _source(one.place, one.weight)
        second = {} if one.second is None else {SECOND: _source(one.second, one.second_weight)}
        adapters[one.name] = {**first, **second}
    settings = {key: getattr(arguments, key) for key in ("calls", "seed", "steps")}
    settings["size"] = str(arguments.size) if arguments.size else None
    if arguments.argument:
        settings["arguments"] = arguments.argument
    drawn = {"prompts": dict(prompts), **settings} if prompts else {}
    about = {
        "base": arguments.base,
        "dtype": arguments.dtype,
        "adapters": adapters,
        "method": arguments.method,
        "options": dict(options),
        "rank": arguments.rank,
        **drawn,
        "components": {component: _component(one) for component, one in merged.items()},
        "versions": {**versions(), "diffusers": version_of("diffusers")},
    }
    found: dict[str, Any] = finite_or_none(about)
    return found


def _source(place: str, weight: float) -> dict[str, Any]:
    local = {} if on_hub(place) else {"sha256": _hashes(Path(place))}
    return {"source": place, "weight": weight, **local}


def _hashes(place: Path) -> dict[str, str]:
    second = place / SECOND
    within = {f"{SECOND}/{name}": value for name, value in hashes(second).items()} if second.is_dir() else {}
    return {**hashes(place), **within}


def _component(one: Merged) -> dict[str, Any]:
    every = one.coefficients.values()
    tasks = dict.fromkeys(name for values in every for name in values)
    held = {name: [values[name] for values in every if name in values] for name in tasks}
    return {
        "modules": len(one.errors),
        "mean_coefficients": {name: sum(values) / len(values) for name, values in held.items()},
        "largest_error": max(one.errors.values(), default=0.0),
        "coefficients": one.coefficients,
    }


def _card(document: Mapping[str, Any], kind: str, folder: Path) -> str:
    base = document["base"]
    hub = on_hub(base)
    named, revision = (hub.repo, hub.options.get("revision")) if hub else ("BASE", None)
    pinned = f', revision="{revision}"' if revision else ""
    about = {"base_model": named, "base_model_relation": "adapter"} if hub else {}
    lines = ["---", to_yaml({**about, "library_name": "diffusers", "tags": ["merge", "lora"]}).rstrip(), "---", ""]
    lines += [f"# {len(document['adapters'])} LoRA adapters merged: {', '.join(document['adapters'])}", ""]
    lines += [f"By `{document['method']}`, for a `{kind}`, with nsc-kernels {document['versions']['nsc-kernels']}.", ""]
    lines += ["| adapter | from | weight |", "|---|---|---|"]
    # Where it lies on this machine is nobody else's.
    for name, about in document["adapters"].items():
        for title, one in ((name, about), (f"{name}, {SECOND}", about.get(SECOND, {}))):
            if "source" in one:
                source = one["source"] if on_hub(one["source"]) else Path(one["source"]).name
                lines.append(f"| {title} | `{source}` | {one['weight']:g} |")
    lines += ["", "```python", "from diffusers import DiffusionPipeline", ""]
    lines += [f'pipe = DiffusionPipeline.from_pretrained("{named}"{pinned})', 'pipe.load_lora_weights("FOLDER")']
    if (folder / SECOND).is_dir():
        lines.append(f'pipe.load_lora_weights("FOLDER/{SECOND}", load_into_transformer_2=True)')
    return "\n".join([*lines, "```", ""])
