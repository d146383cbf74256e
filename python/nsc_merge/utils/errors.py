"""Errors that decide the exit status of a command, those of the hub and of missing packages, and text that a terminal
may be shown, as the package logs it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any


class UsageError(ValueError):
    """The command line, not the data, is at fault."""

    exit_status = 2


class FoundByAll(RuntimeError):
    """What all processes that share the work find alike, in numbers that they added up: one of them says it."""


@contextmanager
def naming(argument: str) -> Iterator[None]:
    """Values that are refused inside are refused under the name of the argument that they came in."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from None


def needed(module: str, argument: str) -> Any:
    """A module of an optional package that reads raw data.

    Raises:
        ValueError: naming ``argument``, the package, and how to install it.
    """
    try:
        return import_module(module)
    except ImportError:
        raise ValueError(
            f"{argument}: reading it needs {module.partition('.')[0]}: pip install 'nsc-kernels[data]'"
        ) from None


def printable(text: str) -> str:
    """Text in which a blank stands for every character that is not to be seen, line breaks aside: names and settings in
    others' files may hold what moves a terminal's cursor, changes its title, or hides a line.
    """
    return "".join(one if one.isprintable() or one == "\n" else " " for one in text)


def _as_text(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage()).replace("\n", " "), ()
    return True


logger = logging.getLogger("nsc_merge")
logger.addFilter(_as_text)


def hub_problem(error: BaseException, argument: str, repo: str, revision: str | None = None) -> str | None:
    """What an error of huggingface_hub, or one that it led to, means for the one who asked for ``repo``, in one line
    with what to do; None of other errors.
    """
    from huggingface_hub import constants, errors

    named = repo if revision is None else f"{repo}@{revision}"
    known = (errors.HTTPError, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, errors.EntryNotFoundError)
    chain: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in chain:
        chain.append(one)
        one = one.__cause__ or one.__context__
    found = [one for one in chain if isinstance(one, known)]
    if not found:
        return None
    log_in = "hf auth login, or HF_TOKEN"

    def among(*kinds: type[BaseException]) -> bool:
        return any(isinstance(one, kinds) for one in found)

    if among(errors.GatedRepoError):
        what = f"{named} is gated: ask for access at {constants.ENDPOINT}/{repo}, and say who you are by {log_in}"
    elif among(errors.RepositoryNotFoundError):
        what = (
            f"there is no {repo} at {constants.ENDPOINT}, or it is private: expected the id of a repository that you "
            f"may read ({log_in}), or a folder that is there"
        )
    elif among(errors.RevisionNotFoundError):
        what = f"{repo} has no revision {revision!r} at {constants.ENDPOINT}: expected a branch, a tag or a commit"
    elif constants.HF_HUB_OFFLINE:
        what = (
            f"{named} is not in the cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE forbids to fetch it: unset "
            "it, or name a folder"
        )
    elif among(errors.RemoteEntryNotFoundError):
        file = re.search(r"/resolve/[^/\s]+/(\S+?)\.?(\s|$)", str(found[-1]))
        what = f"{named} holds no {file[1] if file else 'such file'}: expected another repository"
    else:
        what = (
            f"{named} is not in the cache ({constants.HF_HUB_CACHE}), and {constants.ENDPOINT} does not give it "
            f"({type(found[-1]).__name__}: {' '.join(str(found[-1]).split()):.200}): try again, or name a folder"
        )
    return f"{argument}: {what}"
