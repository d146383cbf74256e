"""Quality suites small enough to train in a test."""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path

from bench.quality.suites import llama, llava, vit

VIT = vit.Settings(
    train_scenes=128,
    val_scenes=32,
    test_scenes=48,
    probe_scenes=64,
    probe_steps=20,
    steps=6,
    kept_steps=4,
)
TEXT = llama.Settings(pretrain_steps=4, train=48, val=24, test=40, probe_steps=10, steps=3, batch=8)
PICTURES = llava.Settings(
    pretrain_pictures=64, pretrain_steps=4, pretrain_batch=8, train=48, val=24, test=40, steps=3, batch=8
)
# Parts of the packages, as all of them take half a minute to read.
PARTS = {
    "python": "email",
    "numpy": "lib",
    "scipy": "cluster",
    "sklearn": "neighbors",
    "torch": "optim",
    "transformers": "generation",
    "sympy": "ntheory",
    "matplotlib": "projections",
    "networkx": "classes",
}


def part_of(source: str) -> Path:
    if source == "python":
        return Path(sysconfig.get_path("stdlib")) / PARTS[source]
    spec = importlib.util.find_spec(source)
    return Path(spec.origin).parent / PARTS[source]
