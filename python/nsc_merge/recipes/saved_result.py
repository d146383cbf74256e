"""Reads a saved merge back, to export it again or to draw it."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nsc_merge.methods import METHODS
from nsc_merge.models.attachment import adapted_linears
from nsc_merge.models.bases.loading import files_of, load_model
from nsc_merge.models.bases.placement import Placement
from nsc_merge.models.fitting import fit
from nsc_merge.models.own_base import own_base
from nsc_merge.models.vocabulary import with_vocabulary
from nsc_merge.recipes.adapter_keys import HubAdapter
from nsc_merge.recipes.inputs import read_adapter
from nsc_merge.recipes.merge_recipe import load_recipe
from nsc_merge.recipes.yaml_keys import RecipeError
from nsc_merge.results.beside.record import digests_in
from nsc_merge.results.layout import (
    COEFFICIENTS_FILE,
    COEFFICIENTS_FORMAT,
    HISTORY_FILE,
    RECIPE_FILE,
    RECORD,
    earlier_merge,
)
from nsc_merge.results.result import MergeResult
from nsc_merge.utils.errors import naming
from nsc_merge.utils.json_text import from_json
from nsc_merge.utils.option_checks import is_number
from nsc_merge.utils.provenance import Digest, in_form_of, whole
from nsc_merge.utils.yaml_text import from_yaml


def read_document(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """``coefficients.json`` and ``history.jsonl`` of a saved merge.

    Raises:
        FileNotFoundError, ValueError: naming the file, what was found and what was expected.
    """
    file = folder / COEFFICIENTS_FILE
    if not file.is_file():
        if earlier_merge(folder)[0] is None:
            raise FileNotFoundError(f"result: {file} is missing; expected a folder written by nsc-merge run")
        again = shlex.join(["nsc-merge", "run", str(folder / RECIPE_FILE), "output.dir=DIR", "output.formats=[lora]"])
        raise FileNotFoundError(
            f"result: {file} is missing, so that nothing can be made of this merge anew: its method gives no "
            f"coefficients, or they were not saved; {again} merges again, and writes what is asked for"
        )
    document = from_json(file.read_bytes(), f"result: {file}", not_finite=True)
    kind = document.get("format") if isinstance(document, dict) else None
    if kind != COEFFICIENTS_FORMAT:
        raise ValueError(f"result: {file}: expected format {COEFFICIENTS_FORMAT} version 1, found {kind!r:.60}")
    if document.get("version") != 1:
        found = document.get("version")
        raise ValueError(
            f"result: {file}: expected version 1 of the format, found {found!r:.60}; read it with the nsc_merge that "
            "wrote it, or a newer one"
        )
    tasks, coefficients, dead = (document.get(key) for key in ("tasks", "coefficients", "dead"))
    if not isinstance(document.get("method"), str) or not isinstance(document.get("options"), dict):
        raise ValueError(f"result: {file}: expected a method's name and its options")
    if not _is_names(tasks) or not tasks:
        raise ValueError(f"result: {file}: expected names of tasks, each once, found {tasks!r:.60}")
    rows = list(coefficients.values()) if isinstance(coefficients, dict) else []
    if not rows or not all(isinstance(row, dict) and list(row) == tasks for row in rows):
        raise ValueError(f"result: {file}: expected one coefficient for each of {tasks} in every module")
    for path, row in coefficients.items():
        for task, value in row.items():
            if not is_number(value) or not math.isfinite(value):
                raise ValueError(f"result: {file}: {path}: {task}: expected a number, found {value!r:.60}")
    if not isinstance(dead, dict) or not all(_is_names(names) and set(names) <= set(tasks) for names in dead.values()):
        raise ValueError(f"result: {file}: dead: expected names of tasks by module, found {dead!r:.60}")
    # Merges that were saved by earlier releases do not say.
    moved = document.setdefault("objective", {})
    if moved != {} and not _is_comparison(moved):
        raise ValueError(f"result: {file}: objective: expected before, after and batches, found {moved!r:.60}")
    return document, _history(folder / HISTORY_FILE, tasks)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value) and len(set(value)) == len(value)


def _history(file: Path, tasks: Sequence[str]) -> list[dict[str, Any]]:
    lines = file.read_bytes().splitlines() if file.is_file() else []
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        entry = from_json(line, f"result: {file}: line {number}", not_finite=True)
        if not _is_step(entry, tasks) or _measured(entry) != _measured(entries[0] if entries else entry):
            raise ValueError(
                f"result: {file}: line {number}: expected numbers for step, objective, and omega or loss of the same "
                f"tasks in every line, found {entry!r:.60}"
            )
        entries.append(entry)
    return entries


def _measured(entry: Mapping[str, Any]) -> tuple[str, set[str]]:
    """What a step measured, and of which tasks."""
    name = "omega" if "omega" in entry else "loss"
    return name, set(entry[name])


def _is_step(entry: Any, tasks: Sequence[str]) -> bool:
    """Whether it is one of :attr:`nsc_merge.MergeResult.history`."""
    values = entry.get("omega", entry.get("loss")) if isinstance(entry, dict) else None
    if not isinstance(values, dict) or not set(values) <= set(tasks):
        return False
    return all(map(is_number, (entry.get("step"), entry.get("objective"), *values.values())))


def _is_comparison(moved: Any) -> bool:
    """Whether it is what :attr:`nsc_merge.MergeResult.objective` holds."""
    numbers = [moved.get(name) for name in ("before", "after")] if isinstance(moved, dict) else []
    count = moved.get("batches") if numbers else None
    return all(map(is_number, numbers)) and type(count) is int and count > 0


def load_result(folder: str | Path, *, numbers: bool = True, trust_remote_code: bool = False) -> MergeResult:
    """The result that was saved into ``folder``, with its base model and adapters read again.

    Args:
        folder: of the result.
        numbers: False leaves the weights of a base in a folder in their files, from which ``save`` takes them one
            after another: a model of any size takes hardly any memory. It can then be neither run nor changed.
        trust_remote_code: run the code that came with the base, where the merge did: the folder may be another's.

    Raises:
        FileNotFoundError, ValueError: if a file is missing, or if base or adapters are not those that were
            merged, by the SHA-256 of what is read; of a base whose record has SHA-256 of headers, by these and the
            sizes, which do not show that only numbers changed.
    """
    folder = Path(folder)
    document, history = read_document(folder)
    # A merge that was saved from Python has no output of its own; JSON's quotes are YAML's.
    try:
        recipe = load_recipe(folder / RECIPE_FILE, [f"output.dir={json.dumps(str(folder))}"])
    except RecipeError as error:
        raise RecipeError(
            f"{error} (so it stands in {folder / RECIPE_FILE}: where base, adapters or data were moved, change their "
            "paths there)"
        ) from None
    written = from_yaml((folder / RECIPE_FILE).read_text(encoding="utf-8"))
    if document["method"] != recipe.method:
        raise ValueError(
            f"result: {folder} holds parts of two merges: {COEFFICIENTS_FILE} is of method {document['method']!r}, "
            f"{RECIPE_FILE} of {recipe.method!r}"
        )
    if recipe.trust_remote_code and not trust_remote_code:
        raise ValueError(
            f"result: {folder / RECIPE_FILE} says trust_remote_code: true, so that code which comes with "
            f"{recipe.model} would be run: expected trust_remote_code=True (--trust-remote-code), too, if you trust it"
        )
    record = _mapping(written, RECORD, folder)
    known = _mapping(record, "sha256", folder)
    known_adapters = _mapping(known, "adapters", folder)
    adapters = {}
    for task, place in recipe.adapters.items():
        adapters[task] = read_adapter(place, task, recipe.dora)
        _refuse_changed(f"adapters.{task}", place, adapters[task].sha256, known_adapters.get(task))
    with naming(f"result: {folder / RECIPE_FILE}"):
        expected = digests_in(record)
    # What was asked to be read in full is read in full again.
    digest = whole if recipe.full_hash else in_form_of(expected)
    grows = recipe.added_tokens in ("mean", "first")
    placement = Placement(dtype=recipe.dtype, device="cpu", quantization=recipe.quantization, numbers=grows or numbers)
    model = load_model(
        recipe.model,
        local=recipe.local,
        placement=placement,
        digest=digest,
        revision=recipe.revision,
        trust_remote_code=recipe.trust_remote_code,
    )
    if recipe.local:
        _refuse_changed("model", Path(recipe.model), files_of(model), expected or None)
    others = set(document["tasks"]) ^ set(adapters)
    if others:
        raise ValueError(
            f"result: {folder}: {COEFFICIENTS_FILE} and {RECIPE_FILE} disagree on the tasks {sorted(others)}"
        )
    loaded = {task: adapters[task] for task in document["tasks"]}
    model, adapters = own_base(*with_vocabulary(model, loaded, recipe.added_tokens))
    fitted = fit(adapters, model, recipe.shared_modules)
    missing = sorted(set(adapted_linears(model, fitted)) ^ set(document["coefficients"]))
    if missing:
        raise ValueError(f"result: {folder / COEFFICIENTS_FILE} and the adapters disagree on {missing[0]}")
    inputs = {key: value for key, value in written.items() if key not in _OF_THE_RESULT}
    counts = _mapping(record, "samples", folder)
    inputs[RECORD] = {"sha256": {"calibration": _mapping(known, "calibration", folder)}, "samples": counts}
    if type(record.get("processes")) is int:
        inputs[RECORD]["processes"] = record["processes"]
    return MergeResult(
        method=document["method"],
        coefficients=document["coefficients"],
        history=history,
        adapters=fitted,
        options=document["options"],
        dead=document["dead"],
        model=model,
        inputs=inputs,
        about=METHODS[document["method"]].paragraph if document["method"] in METHODS else "",
        objective=document["objective"],
    )


def _mapping(document: Mapping[str, Any], key: str, folder: Path) -> dict[str, Any]:
    found = document.get(key) or {}
    if not isinstance(found, dict):
        raise ValueError(f"result: {folder / RECIPE_FILE}: {key}: expected keys and values, found {found!r:.60}")
    return found


def _refuse_changed(name: str, place: Path | HubAdapter, found: Mapping[str, Digest], expected: Any) -> None:
    """Refuse files that are not those of the record, if there is one."""
    if expected is not None and dict(found) != expected:
        raise ValueError(f"{name}: {place} has changed since it was merged (its digests differ)")


_OF_THE_RESULT = ("model", "revision", "adapters", "method", "options", RECORD)
