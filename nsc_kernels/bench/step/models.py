"""The models whose steps are measured, by name: six adapters of rank 16 on q and v."""

from __future__ import annotations

from typing import Any

from .problem import Shape

MODELS = {
    "small-llama": Shape(),
    "vit-b": Shape(layers=12, d=768, intermediate=3072, heads=12, kv_heads=12, tokens=197, classes=10),
    "vit-l": Shape(layers=24, d=1024, intermediate=4096, heads=16, kv_heads=16, tokens=197, classes=10),
    "llama3.2-1b": Shape(16, 2048, 8192, 32, 8, vocabulary=128256, rows=1, tokens=256),
    "llama3-8b": Shape(32, 4096, 14336, 32, 8, vocabulary=128256, rows=1, tokens=256),
    "llava-7b": Shape(32, 4096, 11008, 32, 32, vocabulary=32064, rows=1, tokens=640, vision_layers=24),
}
# A size at which a script is tried.
TINY: dict[str, Any] = {
    "layers": 2,
    "d": 64,
    "intermediate": 96,
    "heads": 4,
    "kv_heads": 2,
    "vocabulary": 64,
    "tasks": 2,
    "rank": 4,
    "tokens": 9,
    "batches": 2,
}
