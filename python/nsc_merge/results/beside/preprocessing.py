"""What turns raw data into a model's inputs and guides its generation, copied from the base: its tokenizer, chat
templates, processors and generation configuration.
"""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from nsc_merge.models.bases.loading import base_files
from nsc_merge.models.bases.sharded import own_class
from nsc_merge.results.layout import PREPROCESSING, is_preprocessing
from nsc_merge.utils.option_checks import is_hub_id

logger = logging.getLogger("nsc_merge")

_TEMPLATES = "additional_chat_templates"
# Larger than any vocabulary: a file beyond it is none.
_LARGEST = 256 << 20
_MOST_TEMPLATES = 100
# Modules of code that came with a model are made below this name by transformers.
_CODE_OF_MODELS = "transformers_modules."


def write_preprocessing(model: nn.Module, folder: Path) -> list[str]:
    """Copy, byte by byte, what lies beside the base into ``folder``, and return the names.

    They come from the folder that the base was read from, or, where it was named by a hub id, from the hub at the
    commit that it was read at. What is in ``folder`` already stays: transformers writes a model's generation
    configuration as it is in memory. Python files come along where the model itself runs code that came with it.
    """
    found = _files(model)
    for name, file in found.items():
        if not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)
    return sorted(found)


def _files(model: nn.Module) -> dict[str, Path]:
    """Path within a model's folder -> file that is copied there."""
    source = base_folder(model)
    if source is None:
        return {}
    found = {
        path.relative_to(source).as_posix(): path
        for path in _candidates(source)
        if is_preprocessing(path.relative_to(source).as_posix())
    }
    if _runs_code(model):
        found |= {path.name: path for path in source.glob("*.py")}
    # A link is followed, as all of the hub's cache are; a pipe or a device is none of a model's files.
    return {name: path for name, path in sorted(found.items()) if path.is_file() and path.stat().st_size <= _LARGEST}


def _candidates(folder: Path) -> Iterator[Path]:
    yield from folder.iterdir()
    if (folder / _TEMPLATES).is_dir():
        yield from sorted((folder / _TEMPLATES).iterdir())[:_MOST_TEMPLATES]


def base_folder(model: nn.Module) -> Path | None:
    """Where the files beside a base lie; None if that is not known, or if they cannot be had."""
    read = base_files(model)
    if read is not None:
        return read.folder if read.folder.is_dir() else None
    config: Any = getattr(model, "config", None)
    name = str(getattr(config, "_name_or_path", "") or "")
    if name and Path(name).is_dir():
        return Path(name)
    commit = getattr(config, "_commit_hash", None)
    return _fetched(name, commit) if commit and is_hub_id(name, Path.cwd()) else None


@functools.lru_cache
def _fetched(name: str, commit: str) -> Path | None:
    """A base's own files of the hub in its cache: what is missing there is fetched."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=commit, allow_patterns=list(PREPROCESSING)))
    except Exception as error:
        # A merge is not lost for them, whatever goes wrong on the way.
        logger.warning("model: no tokenizer or processor of %s was fetched: %s", name, " ".join(str(error).split()))
        return None


def _runs_code(model: nn.Module) -> bool:
    return own_class(model).__module__.startswith(_CODE_OF_MODELS)
