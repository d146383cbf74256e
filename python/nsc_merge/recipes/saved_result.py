"""Reads a saved merge back, to export it again or to draw it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nsc_merge.adapters import load_adapter
from nsc_merge.methods import METHODS
from nsc_merge.models.attachment import adapted_linears
from nsc_merge.models.fitting import fit
from nsc_merge.models.loading import load_model
from nsc_merge.recipes.merge_recipe import load_recipe
from nsc_merge.results.layout import COEFFICIENTS_FILE, COEFFICIENTS_FORMAT, HISTORY_FILE, RECIPE_FILE, RECORD
from nsc_merge.results.result import MergeResult
from nsc_merge.utils.option_checks import is_number
from nsc_merge.utils.provenance import hashes
from nsc_merge.utils.yaml_text import from_yaml


def read_document(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """``coefficients.json`` and ``history.jsonl`` of a saved merge.

    Raises:
        FileNotFoundError, ValueError: naming the file, what was found and what was expected.
    """
    file = folder / COEFFICIENTS_FILE
    if not file.is_file():
        raise FileNotFoundError(f"result: {file} is missing; expected a folder written by nsc-merge run")
    history = folder / HISTORY_FILE
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        lines = history.read_text(encoding="utf-8").splitlines() if history.is_file() else []
        entries = [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"result: {folder} holds invalid JSON: {error}") from None
    kind = document.get("format") if isinstance(document, dict) else None
    if kind != COEFFICIENTS_FORMAT or document.get("version") != 1:
        raise ValueError(f"result: {file}: expected format {COEFFICIENTS_FORMAT} version 1, found {kind!r}")
    coefficients = document.get("coefficients")
    rows = list(coefficients.values()) if isinstance(coefficients, dict) else []
    tasks = document.get("tasks")
    if not rows or not all(isinstance(row, dict) and list(row) == tasks for row in rows):
        raise ValueError(f"result: {file}: expected one coefficient for each of {tasks} in every module")
    # Merges that were saved by earlier releases do not say.
    moved = document.setdefault("objective", {})
    if moved != {} and not _is_comparison(moved):
        raise ValueError(f"result: {file}: objective: expected before, after and batches, found {moved!r:.60}")
    return document, entries


def _is_comparison(moved: Any) -> bool:
    """Whether it is what :attr:`nsc_merge.MergeResult.objective` holds."""
    numbers = [moved.get(name) for name in ("before", "after")] if isinstance(moved, dict) else []
    count = moved.get("batches") if numbers else None
    return all(map(is_number, numbers)) and type(count) is int and count > 0


def load_result(folder: str | Path) -> MergeResult:
    """The result that was saved into ``folder``, with its base model and adapters read again.

    Raises:
        FileNotFoundError, ValueError: if a file is missing, or if base or adapters are not those that were
            merged, by their SHA-256.
    """
    folder = Path(folder)
    document, history = read_document(folder)
    # A merge that was saved from Python has no output of its own; JSON's quotes are YAML's.
    recipe = load_recipe(folder / RECIPE_FILE, [f"output.dir={json.dumps(str(folder))}"])
    written = from_yaml((folder / RECIPE_FILE).read_text(encoding="utf-8"))
    if document["method"] != recipe.method:
        raise ValueError(
            f"result: {folder} holds parts of two merges: {COEFFICIENTS_FILE} is of method {document['method']!r}, "
            f"{RECIPE_FILE} of {recipe.method!r}"
        )
    known = (written.get(RECORD) or {}).get("sha256") or {}
    known_adapters = known.get("adapters") or {}
    places = {f"adapters.{task}": (place, known_adapters.get(task)) for task, place in recipe.adapters.items()}
    if recipe.local:
        places["model"] = (Path(recipe.model), known.get("model"))
    for name, (place, expected) in places.items():
        if expected is not None and hashes(place) != expected:
            raise ValueError(f"{name}: {place} has changed since it was merged (its SHA-256 differ)")
    adapters = {task: load_adapter(place, task, dora=recipe.dora) for task, place in recipe.adapters.items()}
    model = load_model(recipe.model, local=recipe.local, dtype=recipe.dtype, device="cpu")
    fitted = fit({task: adapters[task] for task in document["tasks"]}, model, recipe.shared_modules)
    missing = sorted(set(adapted_linears(model, fitted)) ^ set(document["coefficients"]))
    if missing:
        raise ValueError(f"result: {folder / COEFFICIENTS_FILE} and the adapters disagree on {missing[0]}")
    inputs = {key: value for key, value in written.items() if key not in _OF_THE_RESULT}
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


_OF_THE_RESULT = ("model", "adapters", "method", "options", RECORD)
