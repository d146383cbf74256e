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
    """Lines of a result file; of those about the same suite, seed, tasks and row the last counts. A line that an
    interruption cut short is passed over.
    """
    if not path.is_file():
        return []
    records = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        records[key_of(record)] = record
    return list(records.values())


def append_record(path: Path, record: dict[str, Any]) -> None:
    """One more line of a result file; one cut short by an interruption is ended first."""
    torn = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as lines:
        lines.write(("\n" if torn else "") + json.dumps(record) + "\n")


def key_of(record: dict[str, Any]) -> tuple[Any, ...]:
    return record["suite"], record["seed"], tuple(record["tasks"]), record["row"]
