"""Reading safetensors files that may be damaged or hostile: checked in full before anything is allocated."""

from __future__ import annotations

import hashlib
import math
import os
import reprlib
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from nsc_merge.utils.json_text import from_json

# A tensor takes some hundred bytes of it: room for 80,000 of them, checked in a second. The format allows 100 MB.
MAX_HEADER = 16_000_000
MAX_DIMENSIONS = 64

# As a header names them.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


@dataclass(frozen=True)
class CheckedFile:
    """A safetensors file that was read in full.

    Attributes:
        tensors: by name, on the CPU, each in memory of its own: what happens to the file later does not reach them.
        metadata: that the header carries.
        sha256: hexadecimal digest of the very bytes that the above were made of.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    sha256: str


def check_safetensors(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Check header length, JSON, dtypes, shapes and offsets of a file against its size.

    Only the header is read. The tensors must fill the rest of the file exactly, without gaps or overlaps,
    which is what the format prescribes.

    Returns:
        The header without its metadata: name -> ``dtype``, ``shape`` and ``data_offsets``, in the order of the data.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, the tensor, what was found and what was expected.
    """
    path = Path(path)
    with _opened(path) as file:
        return _entries(path, file, _header(path, file)[1])


def read_checked(path: str | os.PathLike[str]) -> CheckedFile:
    """Everything in a file, which is read once from its beginning to its end.

    Memory for one tensor at a time is taken, once it is known that the file is as long as its header says.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged.
    """
    path = Path(path)
    with _opened(path) as file:
        raw, header = _header(path, file)
        digest = hashlib.sha256(len(raw).to_bytes(8, "little") + raw)
        tensors = {
            name: _tensor(path, file, name, entry, digest) for name, entry in _entries(path, file, header).items()
        }
    return CheckedFile(tensors, _metadata(path, header), digest.hexdigest())


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors alone of :func:`read_checked`."""
    return read_checked(path).tensors


def _opened(path: Path) -> BufferedReader:
    # A pipe would be waited for, a device never ends.
    if path.exists() and not path.is_file():
        raise _broken(path, "expected a file, found a " + ("folder" if path.is_dir() else "pipe or device"))
    return path.open("rb")


def _header(path: Path, file: BufferedReader) -> tuple[bytes, dict[str, Any]]:
    """The header as it is written, and its fields."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little") if size >= 8 else -1
    if not 2 <= length <= min(MAX_HEADER, size - 8):
        raise _broken(path, f"header length {length} in a file of {size} bytes")
    raw = file.read(length)
    try:
        header = from_json(raw, "the header")
    except ValueError as error:
        raise _broken(path, str(error)) from None
    if not isinstance(header, dict):
        raise _broken(path, "the header is not a JSON object")
    return raw, header


def _metadata(path: Path, header: dict[str, Any]) -> dict[str, str]:
    found = header.get("__metadata__", {})
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise _broken(path, f"expected text by name as __metadata__, found {reprlib.repr(found):.60}")
    return found


def _entries(path: Path, file: BufferedReader, header: dict[str, Any]) -> dict[str, Any]:
    """The tensors' entries in the order of their data, which fills the file from where it was read to."""
    _metadata(path, header)
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    spans = sorted((*_span(path, name, entry), name) for name, entry in entries.items())
    position = 0
    for begin, end, name in spans:
        if begin != position:
            raise _broken(path, f"{name!r:.100} begins at byte {begin}, expected {position}")
        position = end
    held = os.fstat(file.fileno()).st_size - file.tell()
    if position != held:
        raise _broken(path, f"tensors of {position} bytes in a file with {held} bytes of data")
    return {name: entries[name] for _, _, name in spans}


def _span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    if not isinstance(entry, dict):
        raise _broken(path, f"the entry of {name!r:.100} is not an object")
    fields: dict[str, Any] = entry
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _broken(path, f"{name!r:.100} has unknown dtype {reprlib.repr(dtype):.40}")
    if not _is_naturals(shape) or len(shape) > MAX_DIMENSIONS:
        raise _broken(path, f"{name!r:.100} has shape {reprlib.repr(shape):.60}")
    if not _is_naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _broken(path, f"{name!r:.100} has data_offsets {reprlib.repr(offsets):.60}")
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if expected != offsets[1] - offsets[0]:
        found = offsets[1] - offsets[0]
        raise _broken(path, f"{name!r:.100} is {dtype} {shape!r:.60}, {expected} bytes, but occupies {found}")
    return offsets[0], offsets[1]


def _is_naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _tensor(path: Path, file: BufferedReader, name: str, entry: dict[str, Any], digest: hashlib._Hash) -> Tensor:
    """The next tensor of the file."""
    begin, end = entry["data_offsets"]
    raw = torch.empty(end - begin, dtype=torch.uint8, device="cpu")
    buffer = raw.numpy().data
    if file.readinto(buffer) != len(buffer):
        raise _broken(path, f"it became shorter while {name!r:.100} was read")
    digest.update(buffer)
    if entry["dtype"] == "BOOL" and (raw > 1).any():
        raise _broken(path, f"{name!r:.100} is BOOL and holds other bytes than 0 and 1")
    return raw.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])


def _broken(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} is not valid safetensors: {what}")


def bytes_of(tensor: Tensor) -> Tensor:
    """The numbers of a tensor as safetensors has them, row after row: ``[bytes]``, uint8. A view where they lie so."""
    flat = tensor.detach().contiguous().reshape(-1)
    # A tensor of one entry is contiguous whatever its stride, and is viewed as bytes with a stride of 1 alone.
    return (flat if flat.stride(0) == 1 else flat.clone(memory_format=torch.contiguous_format)).view(torch.uint8)
