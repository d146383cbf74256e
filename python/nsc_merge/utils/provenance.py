"""What a result came from: versions of packages, and SHA-256 of files."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path


def versions() -> dict[str, str]:
    """Of Python and of the packages that results depend on."""
    import platform

    import torch

    packages = ("nsc-kernels", "transformers", "peft", "safetensors")
    found = {"python": platform.python_version(), **{name: _version(name) for name in packages}}
    # torch's own word: a package index may leave out of its version which build (+cpu, +cu130) it is.
    return found | {"torch": str(torch.__version__)}


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def hashes(place: Path) -> dict[str, str]:
    """SHA-256 of a file, or of the weights and configurations in a folder, by file name: of what lies there now."""
    return {file.name: _hash_once(str(file), _mark(file)) for file in _files(place)}


def marks(place: Path) -> dict[str, tuple[int, ...]]:
    """Of the files that :func:`hashes` reads, what is another once one is replaced or written to."""
    return {file.name: _mark(file) for file in _files(place)}


def sha256(path: str | os.PathLike[str]) -> str:
    """Hexadecimal digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


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
    return sha256(file)
