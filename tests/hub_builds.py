"""Builds for Hugging Face ``kernels``, loaded without it."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import operator_cases as oc
from nsc_kernels import verified_hardware
from nsc_kernels.integrations.hf_kernels.layout import VARIANT

CASE = oc.Case("hub", T=9, d_in=48, d_out=40, ranks=(3, 0, 5))


def loaded(folder: Path) -> ModuleType:
    """A build, imported as kernels imports one: under its id, from its own files."""
    name = json.loads((folder / VARIANT / "metadata.json").read_bytes())["id"]
    spec = importlib.util.spec_from_file_location(name, folder / VARIANT / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def copied(folder: Path) -> Path:
    """A copy of the package's sources, to be edited."""
    ignored = shutil.ignore_patterns("__pycache__", "lib", "bench")
    return Path(shutil.copytree(verified_hardware.PACKAGE, folder / "nsc_kernels", ignore=ignored))


def outcome(package: Any, i: oc.Inputs, bank: Any) -> dict[str, Tensor]:
    """Outputs and gradients of ``merged_lora_nsc``, by name."""
    assert i.base is not None
    z, lam, base = (t.clone().requires_grad_() for t in (i.z, i.lam, i.base))
    found = package.merged_lora_nsc(z, bank, lam, base)
    grads = torch.autograd.grad(found, (z, lam, base), (i.dy, i.dquad, i.dsqnorm))
    return dict(zip(oc.OUTPUTS, (*found, *grads), strict=True))
