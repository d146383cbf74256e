"""Files of images and of audio: found in folders; read, with one digest over all that was read."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from nsc_merge.calibration.raw.drawing import Row, Source


def files_in(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """All files of some suffixes in a folder and the folders in it, linked ones too, but hidden ones, in the order of
    their names.
    """
    found = []
    for at, folders, names in os.walk(folder, followlinks=True):
        # A link to a folder around it has no end.
        folders[:] = [name for name in folders if name[0] != "." and not _is_around(Path(at, name), Path(at))]
        found += [Path(at, name) for name in names if name[0] != "." and Path(name).suffix.lower() in suffixes]
    return sorted((file for file in found if file.is_file()), key=lambda file: file.relative_to(folder).as_posix())


def _is_around(folder: Path, inner: Path) -> bool:
    return folder.is_symlink() and inner.resolve().is_relative_to(folder.resolve())


def rows_of_files(folder: Path, files: Sequence[Path], column: str) -> Source:
    """A source with one row per file; names of folders, such as those of classes, do not matter."""
    names = [file.relative_to(folder).as_posix() for file in files]

    def rows(numbers: Sequence[int]) -> list[Row]:
        return [{column: names[number]} for number in numbers]

    return Source(str(folder), len(names), (column,), rows, {}, folder)


class MediaReader:
    """Reads what rows hold of images or of audio, and remembers the digest of what it read.

    Args:
        folder: that paths are relative to.
    """

    # How messages call one, several, and what a row may hold of one.
    one: str
    several: str
    expected: str

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._digest = hashlib.sha256()
        self._opened = False

    @property
    def sha256(self) -> str | None:
        """SHA-256 over names and bytes of the files, in the order in which they were opened; None if none were."""
        return self._digest.hexdigest() if self._opened else None

    def bytes_of(self, value: Any, where: str) -> tuple[str, bytes]:
        """The name of a file, and its bytes, by a path, by what ``datasets`` stores of it, or by a ``data:`` address.

        Raises:
            FileNotFoundError, ValueError: naming it, if it is missing or not here.
        """
        if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
            return self._read(str(value.get("path") or f"the {self.one}"), value["bytes"])
        if isinstance(value, dict):
            value = value.get("path")
        if isinstance(value, str) and value.startswith("data:"):
            try:
                raw = base64.b64decode(value.partition(",")[2], validate=True)
            except binascii.Error as error:
                raise ValueError(f"{where}: the {self.one} in the row is not base64: {error}") from None
            return self._read(f"the {self.one} in the row", raw)
        if not isinstance(value, (str, Path)) or not str(value):
            found = " ".join(repr(value).split())
            raise ValueError(f"{where}: expected {self.expected}, found {found:.60}")
        if "://" in str(value):
            raise ValueError(f"{where}: {value} is not here; download it and write its path: nothing is fetched")
        file = (self._folder or Path()) / value
        if not file.is_file():
            raise FileNotFoundError(
                f"{where}: {file} is missing; paths of {self.several} are relative to the file they are in"
            )
        return self._read(str(value), file.read_bytes(), str(file))

    def _read(self, name: str, raw: bytes, shown: str = "") -> tuple[str, bytes]:
        self._opened = True
        self._digest.update(f"{len(name.encode())}:{name}:{len(raw)}:".encode() + raw)
        return shown or name, raw
