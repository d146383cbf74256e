"""The emulator of the CUDA kernel, compiled once per session."""

from __future__ import annotations

import sys
from pathlib import Path

import harness
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "triton_kernels"))  # given.py, interpreter_bf16.py


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> harness.Emulator:
    if harness.compiler() is None:
        pytest.skip("needs a C++ compiler")
    return harness.Emulator(harness.build(tmp_path_factory.mktemp("emulator")))
