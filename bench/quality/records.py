"""What was measured, as JSON lines: where it lies, and of which suites."""

from __future__ import annotations

import importlib
import json
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

SUITES = ("vit", "siglip", "llama", "llava", "smollm2")
WORK = Path(__file__).parent / "work"
RESULTS = Path(__file__).parents[1] / "results" / "quality"


def suite_module(name: str) -> ModuleType:
    """The module of one of :data:`SUITES`, imported when asked for: each takes seconds."""
    return importlib.import_module(f".suites.{name}", __package__)


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("nsc-kernels", "torch", "transformers", "peft")}


def read_records(path: Path) -> list[dict[str, Any]]:
    """Lines of a result file; of those about the same suite, seed, tasks and row the last counts."""
    if not path.is_file():
        return []
    records = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        records[key_of(record)] = record
    return list(records.values())


def key_of(record: dict[str, Any]) -> tuple[Any, ...]:
    return record["suite"], record["seed"], tuple(record["tasks"]), record["row"]
