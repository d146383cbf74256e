"""LoRA adapters: read, held and written in the PEFT format, and the algebra of their updates."""

from __future__ import annotations

from nsc_merge.adapters.adapter import About, Adapter, Factor
from nsc_merge.adapters.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from nsc_merge.adapters.peft_reader import DORA, AdapterSource, load_adapter, load_from_hub, outline_of

__all__ = [
    "CONFIG_FILE",
    "DORA",
    "WEIGHTS_FILE",
    "About",
    "Adapter",
    "AdapterSource",
    "Factor",
    "load_adapter",
    "load_from_hub",
    "outline_of",
]
