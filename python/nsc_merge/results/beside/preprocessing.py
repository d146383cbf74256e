"""What turns raw data into a model's inputs, guides its generation and makes embeddings of its outputs, copied from the
base: its tokenizer, chat templates, processors, generation configuration and sentence-transformers' modules, which
may lie beside the adapters alone. The base's licence comes along.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from nsc_merge.adapters.hub import snapshot_of
from nsc_merge.models.bases.loading import base_files, base_name, commit_of
from nsc_merge.models.bases.sharded import own_class
from nsc_merge.models.traits import type_of
from nsc_merge.models.vocabulary import grown_modules
from nsc_merge.results.beside.serving.older_keys import keep_older_keys
from nsc_merge.results.beside.serving.sentence_modules import (
    Modules,
    adapter_notes,
    is_of_modules,
    modules_beside,
    pickled_notes,
)
from nsc_merge.results.layout import LICENSES, PREPROCESSING, is_license, is_preprocessing
from nsc_merge.results.merged_model import is_of_diffusers
from nsc_merge.results.merged_update import MergedUpdate
from nsc_merge.utils.atomic_folder import files_in
from nsc_merge.utils.errors import logger
from nsc_merge.utils.json_text import from_json
from nsc_merge.utils.option_checks import is_hub_id
from nsc_merge.utils.provenance import leads_away

_TEMPLATES = "additional_chat_templates"
_SERIES = "past_values"
_GENERATION = "generation_config.json"
_TOKENIZER = ("tokenizer_config.json", "tokenizer.json", "chat_template.jinja")
# Configurations that may name code of their own.
_NAMING_CODE = (
    *("tokenizer_config.json", "processor_config.json", "preprocessor_config.json"),
    *("video_preprocessor_config.json", "image_processor_config.json"),
)
# Larger than any vocabulary: what is beyond it is none.
LARGEST = 256 << 20
# Files of a folder within the base's that are looked at.
_MOST_INSIDE = 100
# transformers makes the modules of code that came with a model below this name.
_CODE_OF_MODELS = "transformers_modules."


def write_preprocessing(result: MergedUpdate, folder: Path) -> None:
    """Copy, byte by byte, what lies beside the base into ``folder``.

    It comes from the folder that the base was read from, or, where it was named by a hub id, from the hub at the commit
    that it was read at. What is in ``folder`` already stays: transformers writes a model's generation configuration as
    it is in memory. Python files come along only where ``trust_remote_code`` was given, here or to transformers. Of
    the base's ``config.json`` those keys stay that other readers know and transformers writes by other names.
    """
    found = _files(result)
    for name, file in {**found, **_sentence_modules(result, found).files}.items():
        if not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)
    _forget_missing_code(folder / "config.json")
    there = base_folder(result.model)
    if there is not None and all((one / "config.json").is_file() for one in (there, folder)):
        keep_older_keys(result.model, there / "config.json", folder / "config.json")


def leave_out_licenses(staging: Path, out: Path, earlier: Set[str]) -> None:
    """Take the base's licence out of what is about to be put into ``out``, where somebody has put one of that name.

    Args:
        earlier: what earlier merges wrote there, which is replaced.
    """
    for path in files_in(staging):
        if is_license(path.name) and os.path.lexists(out / path) and path.as_posix() not in earlier:
            (staging / path).unlink()


def _forget_missing_code(file: Path) -> None:
    """Take out of a saved model's configuration code that does not lie beside it: the model was merged in a class of
    transformers, and who loads it with ``trust_remote_code=True`` would be told that a file is missing.
    """
    fields = from_json(file.read_bytes(), str(file), not_finite=True) if file.is_file() else {}
    named = fields.pop("auto_map", None) if isinstance(fields, dict) else None
    if not isinstance(named, dict):
        return
    there = {auto: at for auto, at in named.items() if _is_there(at, file.parent)}
    if there != named:
        fields |= {"auto_map": there} if there else {}
        file.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _is_there(place: Any, folder: Path) -> bool:
    """Whether code lies in a folder, or on the hub as owner/name--module.Class does; of a slow and a fast tokenizer,
    either of which may be none, all that is named.
    """
    places = [str(one) for one in (place if isinstance(place, list) else [place]) if one is not None]
    return all("--" in one or (folder / f"{one.rpartition('.')[0]}.py").is_file() for one in places)


def preprocessing_notes(result: MergedUpdate) -> list[str]:
    """What a person should know of the tokenizer and processor beside a merge, one line each; nothing of a model of
    diffusers, whose pipeline has them, nor of one that needs none.
    """
    if is_of_diffusers(result.model):
        return []
    found = _files(result)
    notes = []
    if not any(is_preprocessing(name) for name in found.keys() - {_GENERATION}):
        # transformers keeps the processor of timm's models in their configuration; time series are taken as they are.
        series = getattr(result.model, "main_input_name", "") == _SERIES
        notes += [] if series or type_of(result.model) == "timm_wrapper" else [_absence(result.model)]
    code = [name for name in _NAMING_CODE if name in found and _names_code(found[name])]
    copied = [name for name in found if name.endswith(".py")]
    if copied:
        notes.append(
            f"the base's own code ({', '.join(copied)}) lies here: who loads this with trust_remote_code=True runs it"
        )
    elif code:
        notes.append(
            f"{code[0]} names code in the base's folder (auto_map), which is not copied: if you trust it, put its .py "
            "files beside it and load with trust_remote_code=True"
        )
    if away := next(_beside(result, linked=True), None):
        notes.append(
            f"{away[0]} in the base's folder is a link to a file of another name elsewhere and is not copied: put the "
            "file itself there if it is the model's"
        )
    modules = _sentence_modules(result, found)
    copies = {**modules.files, **found}
    notes += [*modules.notes, *pickled_notes(copies), *adapter_notes(result.model, copies)]
    large = [name for name, file in _beside(result) if file.stat().st_size > LARGEST]
    if large:
        notes.append(
            f"{large[0]} of the base is larger than {LARGEST >> 20} MB and is not copied: copy it if it is needed"
        )
    return notes + _other_tokenizers(result, found)


def _absence(model: nn.Module) -> str:
    name = _named(model)
    if not name:
        where = "the base was handed over in memory, and no folder is known in which its tokenizer or processor lies"
    elif is_hub_id(name):
        where = f"no tokenizer or processor of {name} was found, or none could be fetched, at the base's commit"
    elif not Path(name).is_dir():
        where = f"the base was read from {name}, which is no folder here, so that no tokenizer or processor was found"
    else:
        where = "the base's folder holds no tokenizer and no processor"
    return f"{where}: pipelines and servers need one beside the merge, so put it there with its save_pretrained"


class _Tokenizer(NamedTuple):
    """What a merge depends on of a tokenizer."""

    size: int
    template: str


def _other_tokenizers(result: MergedUpdate, found: Mapping[str, Path]) -> list[str]:
    """A line for every adapter whose folder has a tokenizer that is another than the base's."""
    notes = []
    for task, adapter in result.adapters.items():
        files = [adapter.source / name for name in _TOKENIZER] if adapter.source else []
        files = [file for file in files if file.is_file() and not _is_same(file, found.get(file.name))]
        base = found.get(_TOKENIZER[0], found.get(_TOKENIZER[1]))
        if not files or base is None:
            continue
        own, theirs = _tokenizer(files[0].parent), _tokenizer(base.parent)
        if own is None or theirs is None or own == theirs:
            continue
        other = (
            f"{own.size} tokens where the base's has {theirs.size}"
            if own.size != theirs.size
            else "another chat template than the base's"
        )
        notes.append(
            f"{' '.join(task.split())}: its folder has a tokenizer of its own, with {other}; the base's is used here: "
            "compare them before you serve prompts of this task"
        )
    return notes


def _is_same(file: Path, other: Path | None) -> bool:
    return other is not None and file.stat().st_size == other.stat().st_size and file.read_bytes() == other.read_bytes()


def _tokenizer(folder: Path) -> _Tokenizer | None:
    """Of a folder; None if transformers cannot load it without running code."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # Whatever is wrong with it, the merge does not depend on it.
        logger.info("no tokenizer was read from %s: %s", folder, error)
        return None
    return _Tokenizer(len(loaded), str(getattr(loaded, "chat_template", None)))


def _files(result: MergedUpdate) -> dict[str, Path]:
    """Path within a model's folder -> file that is copied there."""
    found = {name: file for name, file in _beside(result) if file.stat().st_size <= LARGEST}
    if grown_modules(result.model):
        # The base's tokenizer does not know the new tokens; that of the most tokens knows them all.
        sources = [one.source for one in result.adapters.values() if one.source is not None]
        read = {source: tokenizer for source in sources if (tokenizer := _tokenizer(source)) is not None}
        largest = max(read, key=lambda source: read[source].size, default=None)
        if largest is not None:
            found |= {
                file.name: file
                for file in largest.iterdir()
                if is_preprocessing(file.name) and not is_of_modules(file.name)
                if file.is_file() and not leads_away(file, largest)
            }
    return found


def _sentence_modules(result: MergedUpdate, base: Mapping[str, Path]) -> Modules:
    """Those that lie beside the adapters, where what is copied of the base has none."""
    return modules_beside(base, {task: adapter.source for task, adapter in result.adapters.items()})


def _beside(result: MergedUpdate, *, linked: bool = False) -> Iterator[tuple[str, Path]]:
    """Path within the base's folder -> file, of all that is copied, or of what would be if it were no link that leads
    away; a pipe or a device is nothing that a model is saved with.
    """
    source, trusted = base_folder(result.model), _is_trusted(result)
    if source is None:
        return
    places = [*source.iterdir()]
    for folder in [source / _TEMPLATES, *source.glob("[1-9]_*")]:
        places += sorted(folder.iterdir())[:_MOST_INSIDE] if folder.is_dir() else []
    for place in sorted(places):
        name = place.relative_to(source).as_posix()
        code = trusted and place.suffix == ".py" and place.parent == source
        meant = (is_preprocessing(name) or is_license(name) or code) and place.is_file()
        if meant and leads_away(place, source) == linked:
            yield name, place


def base_folder(model: nn.Module) -> Path | None:
    """Where the files beside a base lie; None if that is not known, or if they cannot be had."""
    name = _named(model)
    if name and Path(name).is_dir():
        return Path(name)
    commit = commit_of(model)
    return _fetched(name, commit) if commit and is_hub_id(name) else None


def _named(model: nn.Module) -> str:
    """The folder or hub id that a model was read from, empty if that is not known."""
    read = base_files(model)
    return str(read.folder) if read else base_name(model)


@functools.lru_cache
def _fetched(name: str, commit: str) -> Path | None:
    """A base's folder in the hub's cache: what is missing there of its tokenizer and processor is fetched."""
    try:
        return snapshot_of(name, commit, (*PREPROCESSING, *LICENSES))
    except Exception as error:
        # A merge is not lost for them, whatever goes wrong on the way.
        logger.warning("model: no tokenizer or processor of %s was fetched: %s", name, " ".join(str(error).split()))
        return None


def _names_code(file: Path) -> bool:
    try:
        fields = from_json(file.read_bytes(), str(file), not_finite=True)
    except ValueError:
        return False
    return isinstance(fields, dict) and bool(fields.get("auto_map"))


def _is_trusted(result: MergedUpdate) -> bool:
    """Whether the recipe lets code that comes with the base run, or whoever loaded it did."""
    ran = own_class(result.model).__module__.startswith(_CODE_OF_MODELS)
    return ran or result.inputs.get("trust_remote_code") is True
