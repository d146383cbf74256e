"""The recipe file of ``nsc-merge run``: read, checked and written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nsc_merge.recipes.placement_keys import PLACEMENT_KEYS, Placed, placement_keys
from nsc_merge.recipes.yaml_keys import (
    RecipeError,
    absolute_model,
    by_task,
    choice,
    count,
    flag,
    mapping,
    numbers,
    read_document,
    refuse_unknown,
    text,
    text_path,
)
from nsc_merge.results.layout import FORMATS, OPTIONS_OF_RUN, RECORD

_KEYS = (
    "model",
    "adapters",
    "calibration",
    "batch_size",
    "method",
    "options",
    "shared_modules",
    "dora",
    *PLACEMENT_KEYS,
    "full_hash",
    "output",
    RECORD,
)
_OUTPUT_KEYS = ("dir", "formats", "rank", "max_shard_size", "dequantize", "plots")
# As transformers reads it.
_SIZE = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*[KMGT]B\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Recipe(Placed):
    """A checked recipe; paths are absolute. What it says of the base model's place is in :class:`Placed`.

    Attributes:
        model: folder of the base model, or a hub id.
        local: whether ``model`` is a folder, so that nothing may touch the network.
        adapters: task -> PEFT folder.
        calibration: task -> safetensors file of stacked inputs, or folder of batches; empty for methods
            without data.
        batch_size: rows of a calibration file per batch.
        method: a key of :data:`nsc_merge.methods.METHODS`.
        options: of the method.
        shared_modules: as in :func:`nsc_merge.merge`.
        dora: as in :func:`nsc_merge.merge`.
        full_hash: whether the base's files are read once more for the SHA-256 of all their bytes.
        out: output folder.
        formats: what to write into it.
        rank: truncation of format ``"lora"``.
        max_shard_size: of format ``"model"``; None for files like the base's.
        dequantize: whether format ``"model"`` may hold a quantised base's weights as plain numbers.
        plots: whether to draw coefficients and ratios.
        dropped: options that the file gives to its own method, where an override asks for another.
    """

    model: str
    local: bool
    adapters: dict[str, Path]
    calibration: dict[str, Path]
    out: Path
    batch_size: int = 32
    method: str = "nsc"
    options: dict[str, Any] = field(default_factory=dict)
    shared_modules: str = "lambda"
    dora: str = "refuse"
    full_hash: bool = False
    formats: tuple[str, ...] = ("coefficients", "lora")
    rank: int | None = None
    max_shard_size: str | None = None
    dequantize: bool = False
    plots: bool = True
    dropped: tuple[str, ...] = ()


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: a YAML file. Relative paths in it are relative to its folder.
        overrides: ``"key.sub=value"``, the value in YAML; relative paths are relative to the working folder. One that
            changes ``method`` drops the options that the file has for its own (:attr:`Recipe.dropped`): what they mean
            differs from method to method, even where the names are the same.

    Raises:
        RecipeError: naming the key, what was found and what was expected.
    """
    document = read_document(Path(path), overrides, _absolute)
    own = read_document(Path(path), (), _absolute)
    options = own.get("options")
    same = document.get("method", Recipe.method) == own.get("method", Recipe.method)
    if same or not isinstance(options, dict):
        return _checked(document)
    checked = _checked(read_document(Path(path), ["options=", *overrides], _absolute))
    return replace(checked, dropped=tuple(map(str, options)))


def is_size(text: str) -> bool:
    """Whether a text is a number of bytes as transformers reads it, such as 5GB."""
    return _SIZE.fullmatch(text) is not None


def _absolute(document: dict[str, Any], base: Path) -> dict[str, Any]:
    document = dict(document)
    for key in ("adapters", "calibration"):
        if isinstance(document.get(key), dict):
            document[key] = {
                task: str(base / Path(value).expanduser()) if isinstance(value, str) else value
                for task, value in document[key].items()
            }
    if "model" in document:
        document["model"] = absolute_model(document["model"], base)
    output = document.get("output")
    if isinstance(output, dict) and isinstance(output.get("dir"), str):
        document["output"] = {**output, "dir": str(base / Path(output["dir"]).expanduser())}
    return document


def _checked(document: dict[str, Any]) -> Recipe:
    refuse_unknown("", document, _KEYS)
    output = mapping(document, "output")
    refuse_unknown("output.", output, _OUTPUT_KEYS)
    model = text(document, "model")
    local = Path(model).is_absolute()
    if local and not Path(model).is_dir():
        raise RecipeError(f"model: expected a folder or a hub id, {model} is no folder")
    adapters = {
        task: Path(text_path(f"adapters.{task}", value)) for task, value in by_task(document, "adapters")
    }
    if not adapters:
        raise RecipeError("adapters: expected at least one task, found none")
    calibration = {
        task: Path(text_path(f"calibration.{task}", value))
        for task, value in by_task(document, "calibration")
    }
    for task, folder in adapters.items():
        if not folder.is_dir():
            raise RecipeError(f"adapters.{task}: expected a PEFT folder, {folder} is none")
    for task, place in calibration.items():
        if task not in adapters:
            raise RecipeError(f"calibration.{task}: no such task (tasks: {', '.join(adapters)})")
        if not place.exists():
            raise RecipeError(
                f"calibration.{task}: expected a safetensors file or a folder, {place} is missing"
            )
    formats = output.get("formats", list(Recipe.formats))
    formats = [formats] if isinstance(formats, str) else formats
    if not isinstance(formats, list) or not formats or not set(map(str, formats)) <= set(FORMATS):
        raise RecipeError(f"output.formats: expected some of {list(FORMATS)}, found {formats!r}")
    out = Path(text(output, "dir", "output."))
    if out.exists() and not out.is_dir():
        raise RecipeError(f"output.dir: expected a folder, {out} is a file")
    rank = output.get("rank")
    if rank is not None:
        rank = count(rank, "output.rank")
        if "lora" not in formats:
            raise RecipeError("output.rank: only format 'lora' can be truncated")
    max_shard_size = output.get("max_shard_size")
    if max_shard_size is not None and not is_size(text(output, "max_shard_size", "output.")):
        raise RecipeError(f"output.max_shard_size: expected a size such as 5GB or 500MB, found {max_shard_size!r:.60}")
    dequantize = flag(output, "dequantize", "output.", False)
    if dequantize and "model" not in formats:
        raise RecipeError("output.dequantize: only format 'model' holds the base's weights")
    options = numbers(mapping(document, "options"))
    for name in OPTIONS_OF_RUN:
        if name in options:
            raise RecipeError(f"options.{name}: is chosen by nsc-merge run, which keeps the state beside output.dir")
    return Recipe(
        model=model,
        local=local,
        adapters=adapters,
        calibration=calibration,
        out=out,
        batch_size=count(document.get("batch_size", 32), "batch_size"),
        method=text(document, "method", default="nsc"),
        options=options,
        shared_modules=choice(document, "shared_modules", ("lambda", "mean", "first")),
        dora=choice(document, "dora", ("refuse", "convert")),
        full_hash=flag(document, "full_hash", "", False),
        formats=tuple(formats),
        rank=rank,
        max_shard_size=max_shard_size,
        dequantize=dequantize,
        **placement_keys(document),
        plots=flag(output, "plots", "output.", True),
    )
