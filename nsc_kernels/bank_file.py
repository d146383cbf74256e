"""The file of an AdapterBank: safetensors with both packed factors, and the offsets in its metadata."""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT, VERSION = "nsc_kernels.AdapterBank", "1"
TENSORS = ("A", "Bt")
# Ten times the offsets of as many adapters as a bank may have.
MAX_HEADER = 1 << 20


def write_bank(path: str | os.PathLike[str], A: Tensor, Bt: Tensor, offsets: Sequence[int]) -> None:
    """Write the file: to a temporary one first, renamed when complete."""
    from safetensors.torch import save_file

    path = Path(path)
    # Of the temporary file's name, which the errors of writing and renaming would have, nobody knows.
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "expected the name of a file, found a folder", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "expected a folder to write into, found none", str(path.parent))
    metadata = {"format": FORMAT, "version": VERSION, "offsets": json.dumps(offsets)}
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}")
    temporary.touch(exist_ok=False)
    try:
        mode = stat.S_IMODE(temporary.stat().st_mode)
        save_file({"A": A, "Bt": Bt}, temporary, metadata)
        # What safetensors puts there is for its owner alone.
        temporary.chmod(mode)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_bank(path: str | os.PathLike[str], device: torch.device | str) -> tuple[Tensor, Tensor, list[int]]:
    """``A``, ``Bt`` and the offsets.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or of another format; the message leaves out its name.
    """
    from safetensors import SafetensorError, safe_open

    with open(path, "rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        if not 2 <= length <= MAX_HEADER:
            raise ValueError(f"expected a header of 2 to {MAX_HEADER} bytes, found {length}")
        metadata = _checked(raw.read(length))
    try:
        with safe_open(os.fspath(path), framework="pt", device=str(device)) as file:
            # Copies: what safetensors gives is the file in memory, and would change with it.
            A, Bt = (file.get_tensor(name).clone() for name in TENSORS)
    except SafetensorError as error:
        raise ValueError(f"no valid safetensors: {error}") from None
    return A, Bt, _offsets(metadata.get("offsets"))


def _checked(header: bytes) -> dict[str, Any]:
    """The metadata of a header that holds what :func:`write_bank` writes, and nothing twice: safetensors takes the last
    of two equal keys, and time by the square of a shape's length.
    """
    try:
        entries = json.loads(header, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("the header is nested too deep") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"the header is no JSON: {error}") from None
    metadata = entries.pop("__metadata__", None) if isinstance(entries, dict) else None
    metadata = metadata if isinstance(metadata, dict) else {}
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        found = f"{metadata.get('format')!s:.60} version {metadata.get('version')!s:.20}"
        raise ValueError(f"expected format {FORMAT} version {VERSION}, found {found}")
    if set(entries) != set(TENSORS):
        raise ValueError(f"expected tensors {' and '.join(TENSORS)}, found {sorted(entries)!r:.80}")
    for name, entry in entries.items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, list) or len(shape) != 2:
            raise ValueError(f"{name} must be a matrix, found shape {shape!r:.60}")
    return metadata


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the header has the key {name!r:.60} twice")
        found[name] = value
    return found


def _offsets(text: Any) -> list[int]:
    if text is None:
        raise ValueError("the metadata hold no offsets")
    try:
        offsets = json.loads(text)
    except (ValueError, RecursionError, TypeError):
        offsets = None
    if not isinstance(offsets, list) or not all(type(o) is int for o in offsets):
        raise ValueError(f"offsets must be a list of ints, found {text!r:.80}")
    return offsets
