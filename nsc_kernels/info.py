"""``python -m nsc_kernels.info``: what is built, what was loaded, and why a backend is off."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import native, verified_hardware
from ._version import __version__
from .dispatch import available_backends, chosen
from .printing import exit_status


def collect() -> dict[str, Any]:
    """Everything the command prints, as JSON-ready values."""
    record = Path(__file__).parent / "_build.json"
    return {
        "nsc_kernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        # torch's own word: a package index may leave out of its version which build (+cpu, +cu130) it is.
        "versions": {"torch": torch.__version__, **{n: _version(n) for n in ("triton", "numpy", "safetensors")}},
        "backends": _backends(),
        "backend_choice": chosen(),
        "cpu": {
            "instruction_sets": list(native.cpu_instruction_sets()),
            "threads": torch.get_num_threads(),
        },
        "cuda": {
            "torch_built_for": torch.version.cuda,
            "devices": [_device(i) for i in range(torch.cuda.device_count())],
        },
        **{f"{name}_kernel": _kernel(name) for name in verified_hardware.BACKENDS},
        "own_ledger": _own_ledger(),
        "build": json.loads(record.read_text()) if record.exists() else "no native library was built",
    }


def _backends() -> dict[str, bool | str]:
    """As of ``available_backends``, and what every call of the CPU library would end with."""
    found = available_backends()
    forced, known = os.environ.get("NSC_CPU_ISA"), native.cpu_instruction_sets()
    if forced and known and forced not in known:
        found["cpu"] = f"NSC_CPU_ISA={forced}: expected one of {', '.join(known)}, or unset; every call on a CPU raises"
    return found


def _kernel(backend: str) -> dict[str, Any] | str:
    source = verified_hardware.source(backend)
    if source is None:  # What the ledger holds is of a source, and only the library says which it was built from.
        return "not loaded, and with it unknown on what it was shown correct"
    archs = {
        e["arch"]
        for e in verified_hardware.entries()
        if verified_hardware.backend_of(e) == backend and e["source"] == source
    }
    return {"source": source[:16], "shown_correct_on": sorted(archs)}


def _own_ledger() -> str:
    ledger = verified_hardware.own_ledger()
    # Not by pathlib, which raises of a folder that is closed to this user.
    return str(ledger) if os.path.isfile(ledger) else f"{ledger} is not there; python -m nsc_kernels.verify writes it"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
    }


def _text(value: Any) -> str:
    if value is True:
        return "yes"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _lines(facts: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for key, value in facts.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}", *_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key:<18} {_text(value)}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m nsc_kernels.info",
        description="What is built, what was loaded, and why a backend is off.",
        epilog="examples: python -m nsc_kernels.info; python -m nsc_kernels.info --json",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    facts = collect()
    print(json.dumps(facts, indent=1) if arguments.json else "\n".join(_lines(facts)))
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_status(main))
