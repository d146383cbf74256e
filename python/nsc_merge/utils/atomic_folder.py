"""Folders whose content changes as a whole: what reads one, or finds it after a crash, sees the old or the new."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def replacing_folder(out: Path, obsolete: Callable[[Path, set[Path]], bool]) -> Iterator[Path]:
    """A temporary folder that takes the place of ``out`` if the block succeeds, for one process at a time.

    Files of ``out`` that the block does not write are kept. On Linux the two folders change places in one system call.
    Elsewhere, and on filesystems without that call, a crash between two renames can leave no ``out`` for a moment's
    work; the next writer brings it back first. A folder that the process itself runs in cannot be moved from under it:
    its files are replaced one by one, and a crash meanwhile leaves some of them missing until the next writer has
    brought the old ones back. What a crash leaves lies beside ``out``, in ``.<name>.unfinished``, until then.

    Args:
        out: the folder; made if needed, followed if it is a symbolic link.
        obsolete: of a file of ``out``, given its path within and the paths written: whether to drop it.

    Raises:
        OSError: if someone else is writing ``out``, or if it cannot be replaced, which is then as it was.
    """
    check_replaceable(out)
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with _workshop(out) as work:
        staging = work / "new"
        staging.mkdir()
        mode = stat.S_IMODE(staging.stat().st_mode)
        yield staging
        written = set(files_in(staging))
        for path in written:
            _widen(staging / path, mode & 0o666)
        if not out.exists():
            os.rename(staging, out)
            return
        there = set(files_in(out))
        gone = {path for path in there if path in written or obsolete(path, written)}
        kept = there - gone
        _refuse_clash(out, kept, written)
        if _runs_in(out):
            _replace_one_by_one(work, staging, out, gone)
            return
        _carry_over(out, staging, kept)
        _swap(staging, out)
        # What someone else put there meanwhile is not ours to delete.
        late = {path for path in files_in(staging) if path not in there and not obsolete(path, written)}
        _move(staging, out, late)


def check_replaceable(out: Path, written: Iterable[Path] = ()) -> None:
    """Refuse what :func:`replacing_folder` would: a folder that cannot be replaced, or has folders where files are to
    be ``written``, by their paths within, or files where folders are.

    Raises:
        OSError: naming the place.
    """
    out, written = out.resolve(), set(written)
    above = next((parent for parent in out.parents if os.path.lexists(parent)), out)  # the root has none
    if out.is_symlink() or above.is_symlink():  # Python 3.13 leaves a loop as it is; before, resolve() raises of it
        raise OSError(f"out: expected a folder that can be made, found {str(out)!r:.80}: a loop of links")
    if not above.is_dir():
        raise NotADirectoryError(f"out: no folder can be made in {above}, which is none; expected a place in a folder")
    if os.path.ismount(out):
        raise OSError(f"out: {out} is a mount point, which cannot be replaced as a whole; expected a folder within it")
    if out.exists() and not os.access(out, os.W_OK | os.X_OK):
        raise PermissionError(f"out: {out} is read-only; expected a folder that can be written to")
    if out.exists() and _is_fixed(out) and not _runs_in(out):
        raise PermissionError(
            f"out: {out} is another user's, and in {out.parent} only its owner may replace it; expected a new folder"
        )
    folders = {parent for path in written for parent in path.parents[:-1]}
    _refuse_clash(out, [path for path in folders if _is_no_folder(out / path)], written)


def _is_fixed(out: Path) -> bool:
    """Whether it cannot be moved by this user, whatever may be written in it: another's in a folder such as /tmp."""
    beside = out.parent.stat()
    return bool(beside.st_mode & stat.S_ISVTX) and os.geteuid() not in (0, beside.st_uid, out.stat().st_uid)


def _is_no_folder(path: Path) -> bool:
    return os.path.lexists(path) and (path.is_symlink() or not path.is_dir())


def files_in(folder: Path) -> list[Path]:
    """Everything in a folder that is no folder, by its path within."""
    return sorted(
        (Path(parent) / name).relative_to(folder)
        for parent, folders, names in os.walk(folder)
        for name in [*names, *(one for one in folders if (Path(parent) / one).is_symlink())]
    )


@contextmanager
def _workshop(out: Path) -> Iterator[Path]:
    """An empty folder beside ``out`` to work in, for one process at a time; what a dead one left there goes."""
    work = _beside(out, "unfinished")
    with only_writer(out):
        try:
            _recover(work, out)
            work.mkdir(0o700)
            yield work
        finally:
            _remove(work)


@contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Keep every other process from writing ``out``, until the block ends or the process does.

    Raises:
        BlockingIOError: if another one is at work.
        OSError: if that cannot be told there.
    """
    out = out.resolve()
    busy = f"out: another writer is at work on {out}; expected one at a time: write again when it is done"
    with _holding(_beside(out, "lock"), out, busy):
        yield


@contextmanager
def only_run(out: Path) -> Iterator[None]:
    """Keep every other process that asks for the same from working towards ``out``, until the block ends or the
    process does.

    Raises:
        BlockingIOError: if another one is at work.
        OSError: if that cannot be told there.
    """
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    busy = f"out: another run into {out} is at work; expected one at a time: wait for its end, or choose another folder"
    with _holding(_beside(out, "run.lock"), out, busy):
        yield


def _beside(out: Path, ending: str) -> Path:
    name = out.name if len(os.fsencode(out.name)) < 200 else hashlib.sha256(os.fsencode(out.name)).hexdigest()
    return out.with_name(f".{name}.{ending}")


@contextmanager
def _holding(lock: Path, out: Path, busy: str) -> Iterator[None]:
    handle = _locked(lock, out, busy)
    try:
        yield
    finally:
        # While it is still ours: whoever opened it meanwhile finds it gone, and makes another.
        lock.unlink(missing_ok=True)
        fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _locked(lock: Path, out: Path, busy: str) -> int:
    """An open file that this process alone has locked, until it closes it or ends."""
    while True:
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise type(error)(f"out: {out.parent} cannot be written to: {error.strerror}") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(lock)):
                    return handle
            os.close(handle)
        except BlockingIOError:
            os.close(handle)
            raise BlockingIOError(busy) from None
        except OSError as error:
            os.close(handle)
            raise OSError(
                f"out: the filesystem of {out.parent} cannot lock a file ({error.strerror}), so that two writers "
                "could mix; expected one that can: save there, and move the folder"
            ) from None


def _recover(work: Path, out: Path) -> None:
    """Bring back what a writer that died had put aside, and remove the rest of its work."""
    aside = _aside(work)
    if aside.is_dir() and not out.exists():
        os.rename(aside, out)
    _undo(work, out)
    _remove(work)
    _remove(aside)


def _remove(folder: Path) -> None:
    """A folder with all that is in it, be it read-only."""
    for parent, _, _ in os.walk(folder):
        with suppress(OSError):
            os.chmod(parent, 0o700)
    shutil.rmtree(folder, ignore_errors=True)


def _widen(file: Path, mode: int) -> None:
    """Temporary files of libraries are for their owner alone; those that are kept are for whom any new file is for."""
    found = stat.S_IMODE(file.lstat().st_mode)
    if mode & ~found and not file.is_symlink():
        file.chmod(found | mode)


def _refuse_clash(out: Path, kept: Iterable[Path], written: set[Path]) -> None:
    folders = {parent for path in written for parent in path.parents}
    for path in folders.intersection(kept):
        raise FileExistsError(f"out: {out / path} is no folder, and one of that name is to be written")
    for path in written:
        if (out / path).is_dir() and not (out / path).is_symlink():
            raise FileExistsError(f"out: {out / path} is a folder, and a file of that name is to be written")


def _runs_in(folder: Path) -> bool:
    try:
        return Path.cwd().is_relative_to(folder)
    except FileNotFoundError:
        return False


def _carry_over(out: Path, staging: Path, kept: Iterable[Path]) -> None:
    """Put into ``staging`` what is kept of ``out``: files, folders that were empty, owners and permissions."""
    for path in kept:
        _link(out / path, staging / path)
    for parent, folders, names in os.walk(out, topdown=False):
        place = staging / Path(parent).relative_to(out)
        if not folders and not names:
            place.mkdir(parents=True, exist_ok=True)
        if place.is_dir():
            status = os.stat(parent)
            for owner in (status.st_uid, -1):  # the group can be kept by those in it, the owner by root alone
                with suppress(PermissionError):
                    os.chown(place, owner, status.st_gid)
                    break
            shutil.copystat(parent, place)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(source, target, follow_symlinks=False)


def _move(source: Path, target: Path, paths: Iterable[Path]) -> None:
    for path in sorted(paths):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(source / path, target / path)


def _replace_one_by_one(work: Path, staging: Path, out: Path, gone: set[Path]) -> None:
    """Old files are put aside before new ones come, so that there is never some of both; names of folders say how far
    it got.
    """
    aside, replaced = work / "aside", work / "replaced"
    aside.mkdir()
    try:
        _move(out, aside, gone)
        os.rename(aside, replaced)
        for path in files_in(staging):
            _link(staging / path, out / path)
        os.rename(replaced, work / "old")
    except BaseException:
        _undo(work, out)
        raise
    for folder in {parent for path in gone for parent in path.parents[:-1]}:
        # One that other files are left in stays.
        with suppress(OSError):
            os.removedirs(out / folder)


def _undo(work: Path, out: Path) -> None:
    """Take back what :func:`_replace_one_by_one` did, if it did not come to its end."""
    aside, replaced = work / "aside", work / "replaced"
    if replaced.is_dir():
        for path in files_in(work / "new"):
            (out / path).unlink(missing_ok=True)
        os.rename(replaced, aside)
    if aside.is_dir():
        _move(aside, out, files_in(aside))


def _aside(work: Path) -> Path:
    """Where a whole old folder waits for a new one to take its place."""
    return work.with_name(f"{work.name}-old")


def _swap(one: Path, other: Path) -> None:
    """Let two folders of one filesystem change places."""
    if _exchange(one, other):
        return
    aside = _aside(one.parent)
    os.rename(other, aside)
    try:
        os.rename(one, other)
    except BaseException:
        os.rename(aside, other)
        raise
    os.rename(aside, one)


def _exchange(one: Path, other: Path) -> bool:
    """In one step, if the system can; whether it could."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    return renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0
