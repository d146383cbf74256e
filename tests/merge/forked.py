"""Processes that tests start: of one server that has imported the libraries, which each would otherwise do anew."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch

MODELS = ("llama", "llava", "vit", "clip")
LIBRARIES = ["nsc_merge.api", "peft", *(f"transformers.models.{name}.modeling_{name}" for name in MODELS)]


def start(function: Callable[..., None], arguments: tuple[Any, ...], count: int) -> Any:
    """``count`` processes, as ``torch.multiprocessing.spawn`` starts them: ``function`` has their number first."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(LIBRARIES)
    return torch.multiprocessing.start_processes(function, arguments, count, join=False, start_method="forkserver")
