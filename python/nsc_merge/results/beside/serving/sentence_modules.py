"""The modules that sentence-transformers puts behind a model, where they lie beside adapters: it saves them with every
adapter that it trains, and a base that is plain transformers' has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from nsc_merge.adapters.hub import SENTENCE_MODULES
from nsc_merge.models.bases.sharded import class_name
from nsc_merge.models.embeddings.files import MODULES, SETTINGS
from nsc_merge.utils.json_text import from_json
from nsc_merge.utils.provenance import leads_away
from nsc_merge.utils.safetensors_checks import read_checked

_OF_MODEL = "sentence_*_config.json"
_PROMPTS = ("prompts", "default_prompt_name")
# By what embeddings are compared; releases before 3 do not say it.
_SIMILARITY = "similarity_fn_name"
# Modules with weights of their own.
_WITH_WEIGHTS = ("Dense", "LayerNorm", "WeightedLayerPooling", "LSTM", "CNN", "SparseAutoEncoder", "CSRSparsity")
# How releases before 5 say what is pooled: one key a mode, such as pooling_mode_cls_token.
_MODE = "pooling_mode"

# Class that loads a folder -> a call of it with an example.
_CALLS = {
    **dict.fromkeys(("SentenceTransformer", "SparseEncoder", "MultiVectorEncoder"), 'encode("A sentence.")'),
    "CrossEncoder": 'predict([("A question?", "A sentence.")])',
}

# Path within a model's folder -> file.
Files = Mapping[str, Path]


class Modules(NamedTuple):
    """What a merge has of the modules beside its adapters.

    Attributes:
        files: what is copied of them.
        notes: what a person should know, one line each.
    """

    files: Files
    notes: list[str]


class Loaded(NamedTuple):
    """How sentence-transformers loads a folder.

    Attributes:
        kind: its class.
        call: a method of it with an example.
    """

    kind: str
    call: str


def loaded_by(folder: Path) -> Loaded | None:
    """None of a folder without modules."""
    if not (folder / MODULES).is_file():
        return None
    file = folder / SETTINGS
    told = _settings({SETTINGS: file} if file.is_file() else {}).get("model_type")
    kind = told if isinstance(told, str) and told in _CALLS else "SentenceTransformer"
    return Loaded(kind, _CALLS[kind])


def is_of_modules(name: str) -> bool:
    """Whether a file right in a model's folder is of its modules, by its name."""
    return any(fnmatchcase(name, pattern) for pattern in SENTENCE_MODULES)


def modules_beside(base: Files, adapters: Mapping[str, Path | None]) -> Modules:
    """The base's modules stay. Where it has none, those beside the adapters are taken if they are the same ones.

    Args:
        base: what is copied of the base's folder.
        adapters: task -> its folder, None of an adapter in memory.
    """
    found = {task: _files(folder) for task, folder in adapters.items() if folder is not None}
    own = {task: files for task, files in found.items() if MODULES in files}
    if not own:
        return Modules({}, [])
    if MODULES in base:
        others = {task: _difference(files, base) for task, files in own.items()}
        return Modules(
            {},
            [
                f"{_named(task)}: its folder has modules of sentence-transformers of its own, with another {other} "
                "than the base's; the base's are used here: compare them before you embed for this task"
                for task, other in others.items()
                if other is not None
            ],
        )
    first, *rest = own
    for task in rest:
        if other := _difference(own[first], own[task]):
            return Modules(
                {},
                [
                    f"the base has no modules of sentence-transformers, and the folders of {_named(first)} and "
                    f"{_named(task)} have each another {other}, so that none lie here, and SentenceTransformer would "
                    f"take the mean of all tokens: copy {MODULES} and what it names from one of these folders"
                ],
            )
    note = (
        f"pooling and prompts of sentence-transformers ({MODULES}) are those beside {_named(first)}, the base has none"
    )
    return Modules(own[first], [note])


def pickled_notes(copied: Files) -> list[str]:
    """A line where weights of the modules are no safetensors, so that sentence-transformers loads no merge."""
    listed = _listed(copied) if MODULES in copied else []
    without = [path for path, kind in listed if kind in _WITH_WEIGHTS and f"{path}/model.safetensors" not in copied]
    return [
        f"{path} has no model.safetensors, and pickled weights are never opened or copied, without which "
        "sentence-transformers does not load the merge: if you trust them, copy them, or save them anew with "
        "SentenceTransformer's save_pretrained, which writes safetensors"
        for path in without[:1]
    ]


def adapter_notes(model: nn.Module, copied: Files) -> list[str]:
    """A line where sentence-transformers loads the trunk of a base alone, in which modules are called otherwise, so
    that it finds none that an adapter of the base names.
    """
    listed = _listed(copied) if MODULES in copied else []
    if not listed or listed[0][1] != "Transformer" or getattr(model, "base_model", model) is model:
        return []
    tasks = [_read(file).get("transformer_task") for name, file in copied.items() if fnmatchcase(name, _OF_MODEL)]
    if any(task not in (None, "feature-extraction") for task in tasks):
        return []
    return [
        f"sentence-transformers loads this base without the head of {class_name(model)}, and so finds no module that "
        "format 'lora' names: give it the merge as a model"
    ]


def _files(folder: Path) -> dict[str, Path]:
    """Of the modules in a folder whose model lies there, and not in a folder of its own, too."""
    names = {file.relative_to(folder).as_posix(): file for one in SENTENCE_MODULES for file in folder.glob(one)}
    found = {name: file for name, file in names.items() if file.is_file() and not leads_away(file, folder)}
    listed = _read(found[MODULES]) if MODULES in found else None
    model = listed[0] if isinstance(listed, list) and listed else None
    return found if isinstance(model, dict) and model.get("path") == "" else {}


def _difference(one: Files, other: Files) -> str | None:
    """The first file of the modules that says something else in another folder, whichever release wrote it; None if
    there is none.
    """
    if _listed(one) != _listed(other):
        return MODULES
    settings = [_settings(one), _settings(other)]
    prompts, others = ([told.get(name) or None for name in _PROMPTS] for told in settings)
    similar, another = (told.get(_SIMILARITY) for told in settings)
    if prompts != others or (None not in (similar, another) and similar != another):
        return SETTINGS
    for name in sorted(one.keys() | other.keys()):
        if "/" not in name:
            continue
        if name.endswith(".safetensors"):
            if name not in one or name not in other or not _is_same(one[name], other[name]):
                return name
        elif name in one and name in other:
            left, right = _config(one[name]), _config(other[name])
            if any(left[key] != right[key] for key in left.keys() & right.keys()):
                return name
    return None


def _listed(files: Files) -> list[Any]:
    """Folders and classes, which releases import from different places."""
    listed = _read(files[MODULES])
    modules = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    return [(one.get("path"), str(one.get("type")).rpartition(".")[2]) for one in modules]


def _settings(files: Files) -> dict[str, Any]:
    found = _read(files[SETTINGS]) if SETTINGS in files else None
    # A prompt that is empty is none.
    prompts = found.get("prompts") if isinstance(found, dict) else None
    told = {name: text for name, text in prompts.items() if text} if isinstance(prompts, dict) else {}
    return {**found, "prompts": told} if isinstance(found, dict) else {}


def _config(file: Path) -> dict[str, Any]:
    """What a module's configuration says, with what is pooled as a list of modes."""
    found = _read(file)
    said = {key: value for key, value in found.items() if value is not None} if isinstance(found, dict) else {}
    keys = [key for key in said if key.startswith(f"{_MODE}_")]
    modes = said.pop(_MODE, None) or [key.removeprefix(f"{_MODE}_") for key in keys if said[key]]
    for key in keys:
        del said[key]
    modes = modes if isinstance(modes, list) else [modes]
    return {**said, _MODE: sorted(str(mode).removesuffix("_tokens").removesuffix("_token") for mode in modes)}


def _is_same(one: Path, other: Path) -> bool:
    if one.stat().st_size == other.stat().st_size and one.read_bytes() == other.read_bytes():
        return True
    try:
        left, right = read_checked(one).tensors, read_checked(other).tensors
    except (ValueError, OSError):
        return False
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def _read(file: Path) -> Any:
    """None if it is no JSON."""
    try:
        return from_json(file.read_bytes(), file.name, not_finite=True)
    except ValueError:
        return None


def _named(task: str) -> str:
    return " ".join(task.split())
