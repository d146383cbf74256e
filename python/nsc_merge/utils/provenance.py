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
    """SHA-256 of a file, or of the weights and configurations in a folder, by file name."""
    if place.is_file():
        return {place.name: _hash(place)}
    kept = [*place.glob("*.safetensors"), *place.glob("*config.json")]
    return {file.name: _hash(file) for file in sorted(kept) if file.is_file()}


def _hash(file: Path) -> str:
    status = file.stat()
    return _hash_once(str(file), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _hash_once(file: str, size: int, modified: int) -> str:
    """A large base is read once, however many formats are saved."""
    return sha256(file)


def sha256(path: str | os.PathLike[str]) -> str:
    """Hexadecimal digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
