"""A recipe from a configuration of mergekit whose models are LoRA adapters on one base."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsc_merge.adapters import CONFIG_FILE
from nsc_merge.methods import Method, method_of
from nsc_merge.recipes.first.mergekit.methods import IN_MERGEKIT, Parameters, Translation, translated
from nsc_merge.recipes.first.tasks import Task, find_tasks
from nsc_merge.recipes.placement_keys import DTYPES
from nsc_merge.recipes.yaml_keys import RecipeError, mapping, read_document, text
from nsc_merge.utils.option_checks import is_hub_id

_KEYS = (
    *("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype"),
    *("slices", "modules", "tokenizer_source", "tokenizer", "chat_template"),
)
_NO_PLACE = {
    "slices": "picks layers, and a recipe merges all of them; where one slice takes all layers, put its sources under "
    "models",
    "modules": "merges the parts of a model apart, and a recipe merges all alike; expected models",
    "chat_template": "changes the tokenizer, and a recipe leaves the base's as it is; put the template into the "
    "tokenizer_config.json of the result",
}
_FORM = "expected base+adapter, a folder on this machine or owner/name on the hub each, with @revision or without"


@dataclass(frozen=True)
class Imported:
    """A configuration of mergekit in our terms.

    Attributes:
        file: that it was read from.
        merge_method: mergekit's name.
        base: absolute path, or hub id.
        revision: of a base on the hub.
        tasks: the adapters.
        method: of ours.
        options: of the method.
        dtype: of the base, ``"auto"`` for that of its files.
        notes: what is not the same, or was left out.
    """

    file: Path
    merge_method: str
    base: str
    revision: str | None
    tasks: list[Task]
    method: Method
    options: dict[str, Any]
    dtype: str
    notes: list[str]

    @property
    def formats(self) -> list[str]:
        """What the merge is written as: an adapter, too, where one holds it."""
        gives = self.method.gives_with(self.options)
        return [*(["lora"] if gives in ("coefficients", "low rank") else []), "model"]


@dataclass(frozen=True)
class Reference:
    """A model of a configuration.

    Attributes:
        base: absolute path or hub id, and revision; None where an adapter stands alone.
        adapter: as :func:`nsc_merge.recipes.first.tasks.find_tasks` takes it; None for the base itself.
    """

    base: tuple[str, str | None] | None
    adapter: str | None


def from_mergekit(file: Path) -> Imported:
    """Read a configuration; paths in it are relative to the working folder, as for mergekit.

    Raises:
        RecipeError: naming the key that has no counterpart, with why and what there is instead.
        ValueError, OSError: if there is no adapter that can be merged.
    """
    document = read_document(file, (), lambda document, _: document)
    notes = [f"mergekit has no key {key}, either: left out." for key in document if key not in _KEYS]
    for key, why in _NO_PLACE.items():
        if document.get(key):
            raise RecipeError(f"{key}: {why}; {IN_MERGEKIT}")
    merge_method = text(document, "merge_method")
    given = document.get("models")
    if not isinstance(given, list) or not given:
        raise RecipeError(f"models: expected a list of models, found {given!r:.60}")
    references = [_reference(f"models[{number}]", one) for number, one in enumerate(given)]
    base, revision = _base(document, references)
    _check_tokenizer(document, (base, revision))
    adapters = {one.adapter: number for number, one in enumerate(references) if one.adapter is not None}
    if not adapters:
        raise RecipeError(f"models: {_FORM}, found the base alone")
    if len(adapters) < sum(one.adapter is not None for one in references):
        raise RecipeError("models: expected every adapter once, found one twice")
    tasks = find_tasks(list(adapters))
    top = _values("parameters", mapping(document, "parameters"))
    own = [
        _values(f"models[{number}].parameters", mapping(one, "parameters", f"models[{number}]."))
        for number, one in enumerate(given)
    ]
    among = next((number for number, one in enumerate(references) if one.adapter is None), None)
    if among is not None or (merge_method == "linear" and document.get("base_model")):
        of_base: dict[str, Any] | None = {**top, **(own[among] if among is not None else {})}
    else:
        of_base = None
    by_task = {task.name: {**top, **own[number]} for task, number in zip(tasks, adapters.values(), strict=True)}
    _check_base(merge_method, document)
    found = translated(merge_method, Parameters(top, by_task, of_base))
    method = _checked(found, tasks)
    notes += [*found.notes, *_beside(merge_method, method.gives_with(found.options), tasks)]
    return Imported(
        file, merge_method, base, revision, tasks, method, found.options, _dtype(document), notes
    )


def _beside(merge_method: str, gives: str, tasks: list[Task]) -> list[str]:
    """What a method of more than a sum leaves to a sum here, where mergekit's merges every tensor alike."""
    held = {path: None for task in tasks for path in task.whole}
    held |= {f"biases of {path}": None for task in tasks for path, one in task.updates.items() if one.bias is not None}
    if gives == "coefficients" or not held:
        return []
    first, more = next(iter(held)), len(held) - 1
    return [
        f"{first}{f' and {more} more' if more else ''}: no update of low rank, which a recipe adds up, where mergekit "
        f"runs {merge_method} over all tensors; {IN_MERGEKIT}."
    ]


def _checked(found: Translation, tasks: list[Task]) -> Method:
    method = method_of(found.method)
    try:
        method.resolved(found.options, [task.name for task in tasks])
    except (TypeError, ValueError) as error:
        raise RecipeError(f"parameters.{error}") from None
    return method


def _check_base(merge_method: str, document: Mapping[str, Any]) -> None:
    if merge_method != "linear" and not document.get("base_model"):
        raise RecipeError(f"base_model: {merge_method} adds differences to it; expected one, found none")


def _reference(key: str, entry: Any) -> Reference:
    if not isinstance(entry, dict) or "model" not in entry:
        raise RecipeError(f"{key}: expected model: with base+adapter, found {entry!r:.60}")
    return _model(f"{key}.model", entry["model"])


def _model(key: str, value: Any) -> Reference:
    """A model as mergekit writes it: text, or keys and values."""
    if isinstance(value, dict):
        if value.get("override_architecture"):
            raise RecipeError(f"{key}.override_architecture: a recipe reads the base as what it is; {IN_MERGEKIT}")
        parts = [_with_revision(f"{key}.{part}", value[part]) for part in ("model", "lora") if value.get(part)]
    elif isinstance(value, str):
        parts = value.split("+")
    else:
        parts = []
    if not all(parts) or len(parts) not in (1, 2):
        raise RecipeError(f"{key}: {_FORM}, found {value!r:.100}")
    places = [_place(key, part) for part in parts]
    if len(places) == 2:
        return Reference(places[0], _joined(*places[1]))
    local = Path(places[0][0])
    if local.is_absolute() and (local / CONFIG_FILE).is_file() and not (local / "config.json").is_file():
        return Reference(None, str(local))
    return Reference(places[0], None)


def _with_revision(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return _joined(text(value, "path", f"{key}."), value.get("revision"))
    if not isinstance(value, str):
        raise RecipeError(f"{key}: expected a path or an id on the hub, found {value!r:.60}")
    return value


def _joined(place: str, revision: Any) -> str:
    return place if revision is None else f"{place}@{revision}"


def _place(key: str, written: str) -> tuple[str, str | None]:
    """Absolute path or hub id, and revision."""
    if Path(written).expanduser().is_dir():
        return os.path.abspath(Path(written).expanduser()), None
    name, _, revision = written.partition("@")
    if is_hub_id(name):
        return name, revision or None
    raise RecipeError(f"{key}: {_FORM}, found {written!r:.100}, which is no folder here")


def _base(document: Mapping[str, Any], references: list[Reference]) -> tuple[str, str | None]:
    """The one base of all models."""
    bases = [one.base for one in references if one.base is not None]
    if document.get("base_model"):
        written = _model("base_model", document["base_model"])
        if written.adapter is not None or written.base is None:
            raise RecipeError(
                f"base_model: expected the model that the adapters were trained on, found one with an adapter, "
                f"{document['base_model']!r:.80}; {IN_MERGEKIT}"
            )
        bases.insert(0, written.base)
    if not bases:
        raise RecipeError("base_model: expected the model that the adapters were trained on, found none")
    other = next((base for base in bases if base != bases[0]), None)
    if other is not None:
        raise RecipeError(
            f"models: expected adapters on one base, found {_joined(*bases[0])} and {_joined(*other)}; a model that is "
            f"no adapter has no place in a recipe; {IN_MERGEKIT}"
        )
    return bases[0]


def _values(prefix: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Parameter -> its one value for all tensors."""
    return {name: _value(f"{prefix}.{name}", setting) for name, setting in settings.items()}


def _value(key: str, setting: Any) -> Any:
    if isinstance(setting, dict):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if not all(isinstance(one, dict) for one in setting):
        if all(one == setting[0] for one in setting):
            return setting[0]
        raise RecipeError(
            f"{key}: changes from layer to layer ({setting!r:.60}), and an option of a recipe holds for all; expected "
            f"one value; {IN_MERGEKIT}"
        )
    if not setting:
        return None
    # The first that fits a tensor counts; one without a filter fits all.
    if (filtered := setting[0].get("filter")) not in (None, "*"):
        raise RecipeError(
            f"{key}: is of tensors called {filtered!r} alone, and an option of a recipe holds for all; expected one "
            f"value; {IN_MERGEKIT}"
        )
    return _value(key, setting[0].get("value"))


def _check_tokenizer(document: Mapping[str, Any], base: tuple[str, str | None]) -> None:
    """Refuse another tokenizer than the base's, which stays beside what is written."""
    written = document.get("tokenizer")
    source = written.get("source", "base") if isinstance(written, dict) else document.get("tokenizer_source")
    extra = [key for key in written if key != "source" and written[key]] if isinstance(written, dict) else []
    same = source in (None, "base") or (
        source != "union" and _model("tokenizer_source", source) == Reference(base, None)
    )
    if not same or extra:
        raise RecipeError(
            f"tokenizer: a recipe keeps the base's, expected base or none, found {extra[0] if extra else source!r}; of "
            f"tokens that adapters added a recipe has the key added_tokens; {IN_MERGEKIT}"
        )


def _dtype(document: Mapping[str, Any]) -> str:
    name = document.get("out_dtype") or document.get("dtype") or "auto"
    found = str(name).removeprefix("torch.")
    if found not in DTYPES:
        raise RecipeError(f"dtype: expected one of {list(DTYPES)}, found {name!r:.60}")
    return found
