"""What the scripts here share with tests/: fixtures of their own, and a dry run's arithmetic."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch

from nsc_kernels.bench import measuring
from nsc_kernels.bench.contenders import compiled

TESTS = Path(__file__).resolve().parents[1] / "tests"


def module(path: str) -> ModuleType:
    """A module of tests/ under its plain name, by which the tests and their helpers import one another."""
    name = Path(path).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, TESTS / path)
        assert spec is not None, path
        assert spec.loader is not None, path
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def device(dry_run: bool) -> torch.device:
    """The GPU, or the CPU for a dry run, for which Triton's interpreter is taught bfloat16 first."""
    if dry_run:
        module("triton_kernels/interpreter_bf16.py").apply()
        compiled.options = {"backend": "aot_eager"}  # traced and not compiled, which takes half a minute on a CPU
    return measuring.device(dry_run)
