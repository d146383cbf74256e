"""The Triton tests run on the GPU where there is one, else in Triton's interpreter on the CPU (tests/conftest.py)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    # macOS and ARM have none. Skipping here would end pytest where this folder is among its arguments.
    collect_ignore_glob = ["test_*.py"]
elif os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter_bf16

    interpreter_bf16.apply()


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """Memory that a kernel leaves unwritten reads as NaN: torch fills it in deterministic mode."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
