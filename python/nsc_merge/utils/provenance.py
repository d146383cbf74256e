"""What a result came from: versions of packages, and digests of files.

Files of weights are large, and to read one only for its SHA-256 may take longer than the merge. A digest is therefore
one of two: SHA-256 of the whole file, or what :func:`quick` finds without reading the numbers. Digests of whole files
that somebody asked for are kept in ``$XDG_CACHE_HOME/nsc_merge/digests.json`` (``~/.cache`` if unset), each with
inode, size and times of the file that it is of, and not looked at once one of these differs.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from nsc_merge.utils.atomic_file import write_text
from nsc_merge.utils.json_text import from_json
from nsc_merge.utils.safetensors_checks import MAX_HEADER

Digest = str | Mapping[str, str | int]
"""SHA-256 of a whole file, or ``header_sha256`` and ``size`` (in bytes) of a safetensors file."""

# Of files that are read in a moment, digests are not kept.
WORTH_KEEPING = 1 << 25
_MOST_KEPT = 1000
# A file may be written to twice within one step of the file system's clock, and have the same times after both.
_SETTLED_NS = 2_000_000_000


def versions() -> dict[str, str]:
    """Of Python and of the packages that results depend on."""
    import platform

    import torch

    packages = ("nsc-kernels", "transformers", "peft", "safetensors")
    found = {"python": platform.python_version(), **{name: version_of(name) for name in packages}}
    # torch's own word: a package index may leave out of its version which build (+cpu, +cu130) it is.
    return found | {"torch": str(torch.__version__)}


@functools.cache
def version_of(package: str) -> str:
    """What is installed of a package; looked up once, as it takes milliseconds."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def hashes(place: Path) -> dict[str, str]:
    """SHA-256 of a file, or of the weights and configurations in a folder, by file name: of what lies there now."""
    return {file.name: whole(file) for file in _files(place)}


def digests(place: Path, digest: Callable[[Path], Digest]) -> dict[str, Digest]:
    """Of the files that :func:`hashes` reads, by file name, as ``digest`` finds them: :func:`quick`, :func:`whole`, or
    :func:`in_form_of` a record.
    """
    return {file.name: digest(file) for file in _files(place)}


def leads_away(file: Path, folder: Path) -> bool:
    """Whether a file of a model's folder is a link to one of another name elsewhere, but for those of the hub's cache:
    whoever made the folder would have some file of this machine saved, and uploaded, as a part of the model.
    """
    target = file.resolve()
    own = target.name == file.name or target.is_relative_to(folder.resolve())
    return not own and target.parent.name != "blobs"


def marks(place: Path) -> dict[str, tuple[int, ...]]:
    """Of the files that :func:`hashes` reads, what is another once one is replaced or written to."""
    return {file.name: _mark(file) for file in _files(place)}


def modified(mark: tuple[int, ...]) -> int:
    """When a file of :func:`marks` was last written to, in ns."""
    return mark[2]


def quick(file: Path) -> Digest:
    """What tells a file from others without reading its weights.

    Of a safetensors file: SHA-256 of its header (names, dtypes, shapes) and its size. Where other numbers take the
    place of those in it, both stay the same. In the cache of huggingface_hub a file's name is its SHA-256, and is
    taken at its word. All other files are read.
    """
    if file.suffix != ".safetensors":
        return whole(file)
    target = file.resolve()
    named = file.is_symlink() and target.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", target.name)
    return target.name if named else _of_header(file)


def whole(file: Path) -> str:
    """SHA-256 of the file's bytes, read once as long as nothing is written to it."""
    return _hash_once(str(file.resolve()), _mark(file))


def in_form_of(recorded: Mapping[str, Digest]) -> Callable[[Path], Digest]:
    """A digest of each file that can be compared with the one in ``recorded``, by file name."""

    def digest(file: Path) -> Digest:
        known, found = recorded.get(file.name), quick(file)
        if isinstance(known, str) and not isinstance(found, str):
            return whole(file)
        return _of_header(file) if isinstance(known, Mapping) and isinstance(found, str) else found

    return digest


def sha256(path: str | os.PathLike[str]) -> str:
    """Hexadecimal digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _of_header(path: Path) -> Digest:
    with path.open("rb") as file:
        length = file.read(8)
        header = file.read(min(int.from_bytes(length, "little"), MAX_HEADER))
        size = os.fstat(file.fileno()).st_size
    return {"header_sha256": hashlib.sha256(length + header).hexdigest(), "size": size}


def _files(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    kept = {file for pattern in ("*.safetensors", "*config.json", "*.index.json") for file in place.glob(pattern)}
    return sorted(file for file in kept if file.is_file())


def _mark(file: Path) -> tuple[int, ...]:
    return mark_of(file.stat())


def mark_of(status: os.stat_result) -> tuple[int, ...]:
    """What is another once the file that ``status`` is of is replaced or written to."""
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@functools.lru_cache(maxsize=4096)
def _hash_once(file: str, mark: tuple[int, ...]) -> str:
    """A large base is read once, however many formats are saved."""
    _, size, *times = mark
    if size < WORTH_KEEPING:
        return sha256(file)
    kept = _kept().get(file)
    if isinstance(kept, dict) and kept.get("mark") == list(mark) and isinstance(kept.get("sha256"), str):
        return kept["sha256"]
    settled = time.time_ns() - max(times) > _SETTLED_NS
    found = sha256(file)
    if settled and _mark(Path(file)) == mark:
        entries = {path: entry for path, entry in _kept().items() if path != file}
        entries[file] = {"mark": list(mark), "sha256": found}
        # Without a place to keep it, the file is read again next time.
        with suppress(OSError, RuntimeError):
            write_text(_store(), json.dumps(dict([*entries.items()][-_MOST_KEPT:]), indent=1) + "\n")
    return found


def _store() -> Path:
    asked = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (asked if asked.is_absolute() else Path.home() / ".cache") / "nsc_merge" / "digests.json"


def _kept() -> dict[str, Any]:
    """Path -> digest of the whole file and the mark that it is of; nothing if what is there is none of ours."""
    try:
        found = from_json(_store().read_bytes(), "digests.json")
    except (OSError, RuntimeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
