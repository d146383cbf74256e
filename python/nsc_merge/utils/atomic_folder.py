"""Folders whose content changes as a whole: what reads one, or finds it after a crash, sees the old or the new."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def replacing_folder(out: Path, obsolete: Callable[[Path, set[Path]], bool]) -> Iterator[Path]:
    """A temporary folder beside ``out`` that takes its place if the block succeeds.

    Files of ``out`` that the block does not write are kept. On Linux the two folders change places in one system call.
    Elsewhere, and on filesystems without that call, a crash between two renames can leave no ``out`` for a moment's
    work, but both versions whole beside it. A folder that the process itself runs in cannot be moved from under it:
    its files are replaced one by one.

    Args:
        out: the folder; made if needed, followed if it is a symbolic link.
        obsolete: of a file of ``out``, given its path within and the paths written: whether to drop it.
    """
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        yield staging
        written = set(files_in(staging))
        if not out.exists():
            staging.chmod(0o777 & ~_umask())
            os.rename(staging, out)
        elif Path.cwd().is_relative_to(out):
            _move(staging, out, written)
            _drop(out, written, obsolete)
        else:
            shutil.copystat(out, staging)
            kept = {path for path in files_in(out) if path not in written and not obsolete(path, written)}
            for path in kept:
                _link(out / path, staging / path)
            _swap(staging, out)
            # What someone else put there meanwhile is not ours to delete.
            late = {path for path in files_in(staging) if path not in written | kept and not obsolete(path, written)}
            _move(staging, out, late)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def files_in(folder: Path) -> list[Path]:
    """Everything in a folder that is no folder, by its path within."""
    return sorted(
        (Path(parent) / name).relative_to(folder)
        for parent, folders, names in os.walk(folder)
        for name in [*names, *(one for one in folders if (Path(parent) / one).is_symlink())]
    )


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(source, target, follow_symlinks=False)


def _move(source: Path, target: Path, paths: set[Path]) -> None:
    for path in sorted(paths):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(source / path, target / path)


def _drop(out: Path, written: set[Path], obsolete: Callable[[Path, set[Path]], bool]) -> None:
    for path in files_in(out):
        if path not in written and obsolete(path, written):
            (out / path).unlink()
            for folder in path.parents[:-1]:
                # One that other files are left in stays.
                with suppress(OSError):
                    (out / folder).rmdir()


def _swap(one: Path, other: Path) -> None:
    """Let two folders of one filesystem change places."""
    if _exchange(one, other):
        return
    aside = one.with_name(f"{one.name}.old")
    os.rename(other, aside)
    try:
        os.rename(one, other)
    except BaseException:
        os.rename(aside, other)
        raise
    os.rename(aside, one)


def _exchange(one: Path, other: Path) -> bool:
    """In one step, if the system can; whether it could."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if renameat2 is None:
        return False
    return renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
