"""Keys of tensors that PEFT's ``save_pretrained`` did not write, made what it writes where that can be one thing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

PREFIX = "base_model.model."
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

Value = TypeVar("Value")
# What stands behind a LoRA tensor's name in the state dict of a model: the adapter's own.
_NAMED = re.compile(
    r"(?P<part>\.(?:lora_[ABE]|lora_magnitude_vector|lora_embedding_[AB]))\.(?P<name>(?!weight$|bias$)[^.]+)"
    r"(?P<end>(?:\.weight|\.bias)?)"
)
# A module has one magnitude, which PEFT's files had, and PEFT reads, as the weight of a module, with an adapter's name.
_MAGNITUDE = re.compile(r"(?<=\.lora_magnitude_vector)\.(?:[^.]+\.weight|[^.]+)$")


def as_peft_writes(weights: Mapping[str, Value]) -> tuple[dict[str, Value], tuple[str, ...]]:
    """The tensors under the keys that PEFT's files have, and a sentence for all that was taken off or put before.

    Names of wrappers (``torch.compile``'s ``_orig_mod``, FSDP's, those of checkpointing, DataParallel's ``module``) go
    wherever they stand; so does the adapter's name in a state dict, if there is one for all tensors; and PEFT's prefix
    comes before keys of which none has it, as ``inject_adapter_in_model`` saves them, and stands there once.

    Returns:
        What was given, and no sentence, where two tensors would get one key.
    """
    keys = {key: key for key in weights}
    notes = []

    def changed(key: str, value: str, note: str) -> None:
        if keys[key] != value:
            keys[key] = value
            notes.append(note)

    for key in keys:
        parts = [part for part in key.split(".") if part not in WRAPPERS]
        changed(key, ".".join(parts), f"{', '.join(WRAPPERS)}: taken out of the keys, being names of wrappers")
    # DataParallel's may have stood inside of another wrapper's.
    if all(key.startswith("module.") for key in keys.values()):
        for key in keys:
            changed(key, keys[key].removeprefix("module."), "module.: taken off the keys, being a wrapper's name")
    names = {match["name"] for key in keys.values() if (match := _NAMED.search(key))}
    bare = any(re.search(r"\.lora_[AB]\.(weight|bias)$", key) for key in keys.values())
    if len(names) == 1 and not bare:
        (name,) = names
        for key in keys:
            changed(key, _NAMED.sub(_unnamed, keys[key]), f".{name}.: taken out of the keys, being the adapter's name")
    for key in keys:
        changed(key, _MAGNITUDE.sub("", keys[key]), "lora_magnitude_vector: what followed it in the keys is taken off")
    bare = not any(key.startswith("base_model.") for key in keys.values())
    for key in keys:
        while keys[key].startswith(2 * PREFIX):
            changed(key, keys[key].removeprefix(PREFIX), f"{PREFIX} stood before the keys more than once")
        if bare:
            changed(key, f"{PREFIX}{keys[key]}", f"{PREFIX}: put before the keys, none of which had it")
    if len(set(keys.values())) < len(keys):
        return dict(weights), ()
    return {keys[key]: value for key, value in weights.items()}, tuple(dict.fromkeys(notes))


def _unnamed(match: re.Match[str]) -> str:
    # Magnitudes and embeddings' factors are parameters, and of no ".weight".
    plain = match["part"].endswith(("lora_A", "lora_B"))
    return match["part"] + (match["end"] if plain else "")
