"""A page per merge method, made of the registry, of docstrings and of the measured rows."""

from __future__ import annotations

import inspect
import re
import statistics
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any

from docstrings import markdown_of

from bench.quality.records import RESULTS, SUITES, key_of, read_records
from bench.quality.summary import NAMES, START
from nsc_merge.methods import METHODS, Method
from nsc_merge.methods.registry import describe_methods

_NEEDS = {
    "data": "unlabelled inputs of every task",
    "gradients": "gradients through the model",
    "outputs": "the tasks' heads",
    "labels": "labels",
}
_GIVES = {
    "coefficients": "a coefficient per task and module; saved as an adapter, its rank is the sum of the adapters'",
    "low rank": "an update of low rank per module",
    "full rank": "an update of full rank per module; an adapter holds it only truncated (`save(rank=...)`)",
    "nothing": "nothing: a reference",
}
# What refers to the class above, and to another method.
_SEE = re.compile(r"see there|as all that follow|as in ")
_OTHERS = {
    r"of TIES\.$|as in `.*TiesOptions`": ("ties",),
    r"of DARE\.$|as in `DareOptions`": ("dare", "dare_ties"),
    r"see there\.$": ("knots_ties",),
}


def pages() -> Iterator[tuple[str, str]]:
    """Place in the site and text of every page."""
    described = describe_methods()
    yield "methods/index.md", _index(described)
    records = _records()
    for name, method in METHODS.items():
        yield f"methods/{name}.md", _page(method, described[name], records)


def _index(described: dict[str, dict[str, Any]]) -> str:
    lines = [
        "# Methods",
        "",
        "`nsc_merge.merge(model, adapters, calibration, method=...)`, `method:` of a recipe, `nsc-merge methods`.",
        "Which to use when is in [the results](../results.md); what each does is on its page.",
        "",
        "| method | what it does | needs | from |",
        "|---|---|---|---|",
    ]
    for name, about in described.items():
        needs = ", ".join(need for need in _NEEDS if need in about["needs"]) or "adapters alone"
        lines.append(f"| [`{name}`]({name}.md) | {about['summary']} | {needs} | {about['paper']} |")
    tree = ["```{toctree}", ":hidden:", "", *described, "```"]
    return "\n".join([*lines, "", *tree, ""])


def _page(method: Method, about: dict[str, Any], records: list[dict[str, Any]]) -> str:
    module = inspect.getmodule(method.options)
    assert module is not None
    needs = [_NEEDS[need] for need in _NEEDS if need in method.needs]
    parts = [
        f"# {method.name}",
        "",
        f"*{about['summary'][0].upper()}{about['summary'][1:]}.* From: {method.paper}.",
        "",
        "```python",
        f'result = nsc_merge.merge(model, adapters{", calibration" if needs else ""}, method="{method.name}")',
        "```",
        "",
        f"* **Needs** {', '.join(needs) or 'the adapters alone'}.",
        f"* **Gives** {_GIVES[method.gives]}.",
    ]
    if method.tuned:
        parts.append(
            f"* **Tuned**: papers choose `{method.tuned}` on labelled validation data "
            "(`nsc_merge.methods.scale_tuning.tune_scale`, `nsc-merge eval --tune`)."
        )
    parts += ["", "## Definition", "", "```{eval-rst}", inspect.getdoc(module) or "", "```", "", *_options(method)]
    parts += _presets(module, method, about)
    parts += _measured(method.name, records)
    parts.append(f"Source: `{module.__name__.replace('.', '/')}.py`.")
    return "\n".join([*parts, ""])


def _options(method: Method) -> list[str]:
    told = option_texts(method.options)
    lines = ["## Options", "", "| option | default | meaning |", "|---|---|---|"]
    for option in fields(method.options):
        default = "" if option.default is MISSING else f"`{option.default!r}`"
        text = _whole(option.name, told.get(option.name, "")).replace("|", "\\|")
        lines.append(f"| `{option.name}` | {default} | {text} |")
    return [*lines, ""] if len(lines) > 4 else ["It has no options.", ""]


def _whole(option: str, text: str) -> str:
    """The text of an option, taken from another method's page where it refers there."""
    for other in next((names for words, names in _OTHERS.items() if re.search(words, text)), ()):
        found = option_texts(METHODS[other].options).get(option)
        if found:
            return f"{found} As of [`{other}`]({other}.md)."
    return text


def option_texts(options: type) -> dict[str, str]:
    """Option -> what its class says of it, or the class above where it refers there."""
    found: dict[str, str] = {}
    for one in reversed(options.__mro__[:-1]):
        for name, text in _attributes(one.__doc__ or "").items():
            if name not in found or not _SEE.match(text):
                found[name] = text
    return found


def _attributes(docstring: str) -> dict[str, str]:
    """Name -> text, of the section "Attributes"."""
    _, found, section = inspect.cleandoc(docstring).partition("Attributes:\n")
    texts: dict[str, list[str]] = {}
    for line in section.splitlines() if found else []:
        start = re.match(r"    (\w+(?:, \w+)*): (.*)", line)
        if start:
            for name in start[1].split(", "):
                texts[name] = [start[2]]
        elif line.startswith("     ") and texts:
            last = list(texts)[-1]
            texts[last].append(line.strip())
        elif line.strip():
            break
    return {name: markdown_of(" ".join(lines)) for name, lines in texts.items()}


def _presets(module: Any, method: Method, about: dict[str, Any]) -> list[str]:
    """Where public codebases differ, and what the method's own recipes set."""
    presets: dict[str, dict[str, Any]] = {}
    if "preset" in method.option_names:
        # Names alone where the options' own text says what they are.
        found = getattr(module, "PRESETS", {})
        presets = found if isinstance(found, dict) else {}
        kind = "preset"
    else:
        presets = {name: one["options"] for name, one in about["recipes"].items()}
        kind = "recipe"
    if not presets:
        return []
    names = list(dict.fromkeys(name for one in presets.values() for name in one))
    lines = [f"## Where codebases differ: `{kind}`", "", f"| {kind} | {' | '.join(f'`{name}`' for name in names)} |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for name, settings in presets.items():
        cells = [f"`{settings[option]!r}`" if option in settings else "" for option in names]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return [*lines, ""]


def _records() -> list[dict[str, Any]]:
    """Every row of the quality suites; of those measured twice the last."""
    found = {}
    for folder in (RESULTS / "bounded", RESULTS):
        for suite in SUITES:
            found.update({key_of(one): one for one in read_records(folder / f"{suite}.jsonl")})
    return list(found.values())


def _measured(name: str, records: list[dict[str, Any]]) -> list[str]:
    mine = [one for one in records if one["method"] == name]
    if not mine:
        return ["## On the suites", "", "Not measured there.", ""]
    columns = list(dict.fromkeys((one["suite"], len(one["tasks"])) for one in records))
    columns.sort(key=lambda column: (SUITES.index(column[0]), -column[1]))
    rows = list(dict.fromkeys(one["row"] for one in mine))
    lines = [
        "## On the suites",
        "",
        "Percent of the tasks' own models, mean over tasks and seeds (number of seeds); the last row is task "
        "arithmetic at 0.4, where learnt methods start. What the suites are, and controls: [results](../results.md).",
        "",
        f"| | {' | '.join(f'{NAMES[suite]}, K = {count}' for suite, count in columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    shown = [*rows, START] if START not in rows else rows
    for row in shown:
        cells = []
        for suite, count in columns:
            values = [
                one["average"]
                for one in records
                if one["row"] == row and one["suite"] == suite and len(one["tasks"]) == count
            ]
            cells.append(f"{statistics.mean(values):.1f}\u00a0({len(values)})" if values else "")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    whole = [one for one in mine if one["suite"] == "vit" and len(one["tasks"]) == 8]
    seconds = [one["seconds"] for one in whole if one["tuned"] is None]
    if seconds and statistics.median(seconds) > 1:
        cost = f"{statistics.median(seconds):.0f} s (median) of one core"
        lines += ["", f"**Cost**: {cost} for eight tasks on the small ViT."]
    return [*lines, ""]
