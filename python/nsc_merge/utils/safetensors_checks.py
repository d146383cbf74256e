"""Reading safetensors files that may be damaged or hostile: checked in full before anything is allocated."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from torch import Tensor

# The limit of the format's own reader; a longer header is refused before it is read.
MAX_HEADER = 100_000_000

_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


def check_safetensors(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Check header length, JSON, dtypes, shapes and offsets of a file against its size.

    Only the header is read. The tensors must fill the rest of the file exactly, without gaps or overlaps,
    which is what the format prescribes.

    Returns:
        The header without its metadata: name -> ``dtype``, ``shape`` and ``data_offsets``.

    Raises:
        ValueError: naming the file, the tensor, what was found and what was expected.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little") if size >= 8 else -1
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise _broken(path, f"header length {length} in a file of {size} bytes")
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        raise _broken(path, "the header is not JSON") from None
    if not isinstance(header, dict):
        raise _broken(path, "the header is not a JSON object")
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    spans = sorted((*_span(path, name, entry), name) for name, entry in entries.items())
    position = 0
    for begin, end, name in spans:
        if begin != position:
            raise _broken(path, f"{name!r} begins at byte {begin}, expected {position}")
        position = end
    if position != size - 8 - length:
        raise _broken(path, f"tensors of {position} bytes in a file with {size - 8 - length} bytes of data")
    return entries


def _span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    if not isinstance(entry, dict):
        raise _broken(path, f"the entry of {name!r} is not an object")
    fields: dict[str, Any] = entry
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _broken(path, f"{name!r} has unknown dtype {dtype!r:.40}")
    if not _is_naturals(shape):
        raise _broken(path, f"{name!r} has shape {shape!r:.60}")
    if not _is_naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _broken(path, f"{name!r} has data_offsets {offsets!r:.60}")
    count = 1
    for extent in shape:
        count *= extent
    if count * _BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        raise _broken(
            path,
            f"{name!r} is {dtype} {shape!r:.60}, {count * _BITS[dtype] // 8} bytes, but occupies "
            f"{offsets[1] - offsets[0]}",
        )
    return offsets[0], offsets[1]


def _is_naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _broken(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} is not valid safetensors: {what}")


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a checked file, on the CPU.

    Raises:
        ValueError: if the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    check_safetensors(path)
    try:
        with safe_open(os.fspath(path), framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a mapping
    except SafetensorError as error:
        raise _broken(Path(path), str(error)) from None
