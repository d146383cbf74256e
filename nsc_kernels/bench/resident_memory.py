"""The resident set of this process, and the highest it has been."""

from __future__ import annotations

from pathlib import Path

_STATUS = Path("/proc/self/status")


def reset_peak() -> None:
    """Let :func:`peak` count from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def resident() -> int:
    """Bytes in memory now."""
    return _field("VmRSS")


def peak() -> int:
    """The most bytes in memory since the start, or since :func:`reset_peak`."""
    return _field("VmHWM")


def _field(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])
