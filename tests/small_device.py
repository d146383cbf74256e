"""A process with the device of :mod:`device_without_float64`, which a process names once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# A process that has such a device ends as it stands: while Python is taken down, torch's thread of the device may reach
# for it once more, which ends the process as a crash does.
END = "\nimport os, sys\nsys.stdout.flush()\nos._exit(0)"


def run(code: str) -> str:
    """What the code prints; it finds the modules beside this one."""
    pytest.importorskip("torch.utils.backend_registration")
    command = [sys.executable, "-c", code + END]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout
