"""How a process that times things is set up."""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def wait_passively() -> None:
    """Start this program anew with OpenMP threads that sleep while they wait, unless the caller said how they are to.

    OpenMP asks once, when torch is loaded, and importing the package has loaded it.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        passive = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], passive)


def keep_freed_memory() -> None:
    """Tell glibc to hand no block back, however large: the page faults of fetching it again would be timed as well."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # Mappings of their own, which blocks from 32 MiB on have whatever the threshold, are never kept.
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
