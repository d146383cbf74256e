"""Which GPU architectures a backend's kernels have been shown correct on, and at which source.

``nsc_kernels/triton/verified.json`` is the ledger: a list of entries, one per backend, architecture and source, written
by ``bench/hardware/report.py --accept`` from a correctness run on that hardware. An entry counts only while the source
it names is the source in use. A file of the user's (:func:`own_ledger`) has in the same form what
``python -m nsc_kernels.verify`` has shown on a machine, which counts for the version of Triton that it was shown with.

What withdraws an entry of triton: any edit of the files in ``SOURCES`` or of a table of configurations, and a table
that comes or goes. They decide what the kernel computes (its code and steps, the layout of the rank axis) and how it is
launched (the records it is called with, outputs, workspace and counters, tiles and schedule). A file is hashed by its
content under a label and not under its name: where it lies and what it is called withdraw nothing, as long as no line
of a hashed file, such as an import of the one that moves, has to change with it.

What withdraws an entry of cuda: any edit of a file directly in csrc/cuda, or another name for one, once the library is
built from it. Its digest is the library's own, made when it is built. The Python that calls the library is not in it:
the binding refuses tensors that do not fit.

What withdraws none: edits and moves of anything else, such as which backend a call goes to, what a backend rejects, the
reference, the operators, autograd. Files in ``SOURCES`` import nothing of the project but each other, so that no move
elsewhere is an edit here; tests/triton_kernels/test_triton_backend.py holds them to it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import warnings
from functools import cache
from pathlib import Path
from typing import Any

from . import native

PACKAGE = Path(__file__).parent
CUDA = PACKAGE.parent / "csrc" / "cuda"
VERIFIED = PACKAGE / "triton" / "verified.json"
TABLES = PACKAGE / "triton" / "tables"
# label -> where the file is today. Entries depend on labels and their order, not on places.
SOURCES = {
    "kernel": PACKAGE / "triton" / "kernels.py",
    "steps": PACKAGE / "triton" / "steps.py",
    "columns": PACKAGE / "triton" / "columns.py",
    "configurations": PACKAGE / "triton" / "configs.py",
    "launch": PACKAGE / "triton" / "launch.py",
    "counters": PACKAGE / "counters.py",
    "records": PACKAGE / "contract.py",
}
BACKENDS = ("triton", "cuda")


@cache
def triton_source() -> str:
    """sha256 of the sources that decide what the kernel computes, tables of configurations included."""
    tables = {f"table {path.name}": path for path in sorted(TABLES.glob("*.json"))}
    digest = hashlib.sha256()
    for label, path in (SOURCES | tables).items():
        content = path.read_bytes()
        digest.update(f"{label} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def source(backend: str) -> str | None:
    """The digest that names a backend's kernels; None where the CUDA library is not loaded."""
    return native.cuda_source() if backend == "cuda" else triton_source()


def checkout_source(backend: str) -> str | None:
    """The digest that a backend built from this checkout has, whether or not it can be loaded; None without one.

    For ``csrc/cuda`` what CMakeLists.txt computes, so that a result from a machine with a GPU can be entered here.
    """
    if backend != "cuda":
        return triton_source()
    files = sorted(path for path in CUDA.glob("*") if path.is_file())
    lines = (f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n" for path in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest() if files else None


def own_ledger() -> Path:
    """The file of this user's entries: ``NSC_VERIFIED``, else ``nsc_kernels/verified.json`` in the user's cache folder
    (``XDG_CACHE_HOME``, else ``~/.cache``). It need not be there."""
    if given := os.environ.get("NSC_VERIFIED"):
        return Path(given)
    cached = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cached) / "nsc_kernels" / "verified.json"


def read(ledger: Path) -> list[dict[str, Any]]:
    """The entries of a file: ``backend``, ``arch``, ``device``, ``source``, ``torch``, ``triton``, ``cases``.

    Of one that is no ledger none, with a warning: the kernels then count as not shown correct. One in a folder that is
    closed to this user, as another's home is, is not there.
    """
    if not os.path.exists(ledger):
        return []
    try:
        found = json.loads(ledger.read_text())
        if not (isinstance(found, list) and all(isinstance(e, dict) and {"arch", "source"} <= e.keys() for e in found)):
            raise ValueError("expected a list of entries, each with arch and source")
    except (OSError, ValueError) as error:
        warnings.warn(f"{ledger} counts for nothing, delete it: {error}", RuntimeWarning, stacklevel=2)
        return []
    return found


@cache
def entries() -> tuple[dict[str, Any], ...]:
    """The entries that count where their source is the one in use: the release's, and this user's own."""
    own = (e for e in read(own_ledger()) if backend_of(e) != "triton" or e.get("triton") == triton_version())
    return (*read(VERIFIED), *own)


@cache
def triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def backend_of(entry: dict[str, Any]) -> str:
    """The backend that an entry is about: Triton's where it does not say."""
    return entry.get("backend", "triton")


def verified(arch: str, backend: str = "triton") -> dict[str, Any] | None:
    """The entry that shows the kernels in use correct on ``arch`` ("sm_90"), or None."""
    current = source(backend)
    return next(
        (e for e in entries() if backend_of(e) == backend and e["arch"] == arch and e["source"] == current), None
    )


def unproven(arch: str, backend: str) -> str | None:
    """Why the automatic choice passes over a backend that could serve on ``arch``; None where it was shown correct."""
    if verified(arch, backend) is not None:
        return None
    return (
        f"not yet shown correct on {arch} at this version of the kernel: python -m nsc_kernels.verify does that, or "
        f"says what is wrong, and NSC_BACKEND={backend} uses it without"
    )
