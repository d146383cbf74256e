"""Files that appear or change only once they are complete."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``, of the same ending and nobody else's, that takes its place if the block
    succeeds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if (cure := no_room(error, path.parent)) is None:
            raise
        raise OSError(f"{path} cannot be written: {error.strerror}; expected {cure}") from None
    finally:
        temporary.unlink(missing_ok=True)


def no_room(error: OSError, folder: Path) -> str | None:
    """What to expect where a disk is full, or its files (of FAT, or by ``ulimit -f``) grow no larger; None of other
    errors. None of these names a file by itself.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"room for it in {folder}: make some"
    return f"files as large to be allowed in {folder}" if error.errno == errno.EFBIG else None


def write_text(path: Path, text: str) -> None:
    """Write a whole text file."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
