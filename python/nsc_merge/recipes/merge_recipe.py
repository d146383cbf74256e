"""The recipe file of ``nsc-merge run``: read, checked and written."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nsc_merge.adapters import DORA
from nsc_merge.recipes.adapter_keys import (
    HubAdapter,
    absolute_adapter,
    absolute_labels,
    adapters_in,
    labels_in,
)
from nsc_merge.recipes.calibration_keys import (
    CalibrationSource,
    absolute_data,
    absolute_source,
    calibration_in,
    refuse_without_effect,
)
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
    output_folder,
    read_document,
    refuse_unknown,
    text,
    text_or_none,
)
from nsc_merge.results.layout import FORMATS, OPTIONS_OF_RUN, RECORD
from nsc_merge.utils.option_checks import is_repo, is_size

_KEYS = (
    "model",
    "revision",
    "trust_remote_code",
    "adapters",
    "calibration",
    "data",
    "batch_size",
    "method",
    "options",
    "shared_modules",
    "dora",
    "added_tokens",
    *PLACEMENT_KEYS,
    "full_hash",
    "labels",
    "output",
    RECORD,
)
_OUTPUT_KEYS = (
    "dir",
    "formats",
    "rank",
    "max_shard_size",
    "dequantize",
    "plots",
    "head",
    "push_to_hub",
    "private",
)
# What the text of a task stands for where it could be keys and values.
_SHORT = {"adapters": "adapter", "calibration": "source"}


@dataclass(frozen=True)
class Recipe(Placed):
    """A checked recipe; paths are absolute. What it says of the base model's place is in :class:`Placed`.

    Attributes:
        model: folder of the base model, or a hub id.
        local: whether ``model`` is a folder.
        revision: branch, tag or commit of a model on the hub; None for the newest.
        trust_remote_code: whether code that comes with the base model, its tokenizer and its processor may be run.
        adapters: task -> PEFT folder, or place on the hub.
        calibration: task -> raw data, safetensors file of stacked inputs, or folder of batches; empty for methods
            without data.
        batch_size: rows of a calibration file, or samples of raw data, per batch.
        method: a key of :data:`nsc_merge.methods.METHODS`.
        options: of the method.
        shared_modules: as in :func:`nsc_merge.merge`.
        dora: as in :func:`nsc_merge.merge`.
        added_tokens: as in :func:`nsc_merge.merge`.
        full_hash: whether the base's files are read once more for the SHA-256 of all their bytes.
        labels: task -> names of the classes of its head.
        label_files: task -> the file that they are read from, where they are.
        out: output folder.
        formats: what to write into it.
        rank: truncation of format ``"lora"``.
        max_shard_size: of format ``"model"``; None for files like the base's.
        dequantize: whether format ``"model"`` may hold a quantised base's weights as plain numbers.
        plots: whether to draw coefficients and ratios.
        head: the task whose head formats ``"lora"`` and ``"model"`` have; None for none.
        push_to_hub: ``owner/name`` that the output is uploaded to once it is written; None for none.
        private: whether a repository that is made for it is private.
        dropped: options that the file gives to its own method, where an override asks for another.
    """

    model: str
    local: bool
    adapters: dict[str, Path | HubAdapter]
    calibration: dict[str, CalibrationSource]
    out: Path
    revision: str | None = None
    trust_remote_code: bool = False
    batch_size: int = 32
    method: str = "nsc"
    options: dict[str, Any] = field(default_factory=dict)
    shared_modules: str = "lambda"
    dora: str = "exact"
    added_tokens: str = "refuse"
    full_hash: bool = False
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    label_files: dict[str, Path] = field(default_factory=dict)
    formats: tuple[str, ...] = ("coefficients", "lora")
    rank: int | None = None
    max_shard_size: str | None = None
    dequantize: bool = False
    plots: bool = True
    head: str | None = None
    push_to_hub: str | None = None
    private: bool = False
    dropped: tuple[str, ...] = ()

    @property
    def offline(self) -> bool:
        """Whether nothing that it reads or writes is on the hub, so that nothing may touch the network."""
        places = self.local and not any(isinstance(place, HubAdapter) for place in self.adapters.values())
        data = all(source.offline for source in self.calibration.values())
        return places and data and self.push_to_hub is None


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
    document = read_document(Path(path), overrides, _absolute, _SHORT)
    own = read_document(Path(path), (), _absolute, _SHORT)
    refuse_without_effect(overrides, document)
    options = own.get("options")
    same = document.get("method", Recipe.method) == own.get("method", Recipe.method)
    if same or not isinstance(options, dict):
        return _checked(document)
    checked = _checked(read_document(Path(path), ["options=", *overrides], _absolute, _SHORT))
    return replace(checked, dropped=tuple(map(str, options)))


_BY_TASK = {"adapters": absolute_adapter, "calibration": absolute_source, "labels": absolute_labels}


def _absolute(document: dict[str, Any], base: Path) -> dict[str, Any]:
    document = dict(document)
    for key, absolute in _BY_TASK.items():
        if isinstance(document.get(key), dict):
            document[key] = {task: absolute(value, base) for task, value in document[key].items()}
    if "data" in document:
        document["data"] = absolute_data(document["data"], base)
    if "model" in document:
        document["model"] = absolute_model(document["model"], base)
    output = document.get("output")
    if isinstance(output, dict) and isinstance(output.get("dir"), str):
        document["output"] = {**output, "dir": str(base / Path(output["dir"]).expanduser())}
    return document


def _checked(document: dict[str, Any]) -> Recipe:
    refuse_unknown("", document, _KEYS)
    model, revision = text(document, "model"), text_or_none(document, "revision")
    local = Path(model).is_absolute()
    if local and not Path(model).is_dir():
        raise RecipeError(f"model: expected a folder or a hub id, {model} is no folder")
    if local and revision is not None:
        raise RecipeError(f"revision: is of a model on the hub, but model is the folder {model}; expected none")
    trusted = flag(document, "trust_remote_code", "", False)
    adapters = adapters_in(document)
    options = numbers(mapping(document, "options"))
    for name in OPTIONS_OF_RUN:
        if name in options:
            raise RecipeError(f"options.{name}: is chosen by nsc-merge run, which keeps the state beside output.dir")
    return Recipe(
        model=model,
        local=local,
        revision=revision,
        trust_remote_code=trusted,
        adapters=adapters,
        calibration=calibration_in(document, adapters, trust_remote_code=trusted),
        batch_size=count(document.get("batch_size", 32), "batch_size"),
        method=text(document, "method", default="nsc"),
        options=options,
        shared_modules=choice(document, "shared_modules", ("lambda", "mean", "first")),
        dora=choice(document, "dora", DORA),
        added_tokens=choice(document, "added_tokens", ("refuse", "mean", "first", "base")),
        full_hash=flag(document, "full_hash", "", False),
        labels=labels_in(document, adapters),
        label_files={task: Path(one) for task, one in by_task(document, "labels") if isinstance(one, str)},
        **placement_keys(document),
        **_output(mapping(document, "output"), adapters),
    )


def _output(output: dict[str, Any], tasks: Collection[str]) -> dict[str, Any]:
    """What a recipe says of its output."""
    refuse_unknown("output.", output, _OUTPUT_KEYS)
    formats = output.get("formats", list(Recipe.formats))
    formats = [formats] if isinstance(formats, str) else formats
    if not isinstance(formats, list) or not formats or not set(map(str, formats)) <= set(FORMATS):
        raise RecipeError(f"output.formats: expected some of {list(FORMATS)}, found {formats!r}")
    out = output_folder(output)
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
    head, push_to_hub = (text_or_none(output, key, "output.") for key in ("head", "push_to_hub"))
    if head is not None and head not in tasks:
        raise RecipeError(f"output.head: expected a task ({', '.join(tasks)}), found {head!r:.60}")
    if head is not None and not {"lora", "model"} & set(formats):
        raise RecipeError(f"output.head: only formats 'lora' and 'model' have a head, found {formats}")
    if push_to_hub is not None and not is_repo(push_to_hub):
        raise RecipeError(f"output.push_to_hub: expected owner/name, found {push_to_hub!r:.80}")
    private = flag(output, "private", "output.", False)
    if private and push_to_hub is None:
        raise RecipeError("output.private: expected output.push_to_hub: owner/name beside it, found none")
    return {
        "out": out,
        "formats": tuple(formats),
        "rank": rank,
        "max_shard_size": max_shard_size,
        "dequantize": dequantize,
        "plots": flag(output, "plots", "output.", True),
        "head": head,
        "push_to_hub": push_to_hub,
        "private": private,
    }
