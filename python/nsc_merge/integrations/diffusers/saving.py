"""An adapter of a pipeline as the file that its ``load_lora_weights`` reads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftType, get_peft_model_state_dict
from torch import Tensor

from nsc_merge.adapters.formats import diffusers_file
from nsc_merge.integrations.diffusers.pipelines import adapted, check_in_memory, held_in, loaded_in
from nsc_merge.utils.atomic_file import replacing

# Of the pipelines of Wan, whose file has no place for it.
_SECOND = "transformer_2"
# Projections of which diffusers knows names of PEFT's in a text encoder.
_ATTENTION = (".q_proj.lora_", ".k_proj.lora_", ".v_proj.lora_", ".out_proj.lora_")
# diffusers' own for others, which it translates.
_OLDER = {".lora_A.weight": ".lora_linear_layer.down.weight", ".lora_B.weight": ".lora_linear_layer.up.weight"}


def save(pipe: Any, adapter_name: str, folder: str | os.PathLike[str]) -> Path:
    """Save an adapter of a pipeline, of all models that hold it, as ``pipe.load_lora_weights(folder)`` reads it.

    Written is ``pytorch_lora_weights.safetensors``, with PEFT's settings in its header, so that scalings and ranks are
    those of the adapter; weights given to ``set_adapters`` play no role. Of Wan's second transformer it is a file in
    the folder ``transformer_2`` of that folder, for ``pipe.load_lora_weights(..., load_into_transformer_2=True)``.
    Norms that a Control LoRA of Flux put into the transformer are in it, too: diffusers keeps one set of them, with
    which every adapter draws, and leaves the last one's.

    Args:
        pipe: a pipeline of diffusers with the adapter loaded, such as what :func:`merge` registered.
        adapter_name: of the adapter.
        folder: made where there is none; other files in it are left alone.

    Returns:
        The folder.

    Raises:
        TypeError, ValueError: if ``pipe`` is no pipeline that loads LoRA, or holds no LoRA of that name, or models
            that are offloaded to disk or module by module.
    """
    models: dict[str, Any] = dict(adapted(pipe))
    check_in_memory(models)
    held = held_in(models)
    configs = {part: models[part].peft_config[adapter_name] for part, names in held.items() if adapter_name in names}
    if not configs:
        raise ValueError(f"adapter_name: expected one of {loaded_in(held)}, found {adapter_name!r}")
    if other := sorted(part for part, config in configs.items() if config.peft_type != PeftType.LORA):
        raise ValueError(f"adapter_name: {adapter_name!r} is no LoRA in {other}, and nothing else is saved")
    out = Path(folder)
    every = {part: (_tensors(part, models[part], adapter_name), _plain(config)) for part, config in configs.items()}
    second = every.pop(_SECOND, None)
    for place, parts in ((out, every), (out / _SECOND, {"transformer": second} if second else {})):
        if parts:
            with replacing(place / diffusers_file.FILE) as temporary:
                diffusers_file.write(temporary, parts)
    return out


def _tensors(part: str, model: Any, adapter_name: str) -> dict[str, Tensor]:
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    # It holds those that were there before, to put them back.
    norms = getattr(model, "_transformer_norm_layers", None) or {}
    state |= {key: value for key, value in model.state_dict().items() if key in norms}
    found = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    if not part.startswith("text_encoder") or any(name in key for key in found for name in _ATTENTION):
        return found
    # PEFT's names of a text encoder are known by its attention. Without it, it takes those that it had before.
    for ours, theirs in _OLDER.items():
        found = {key.replace(ours, theirs): value for key, value in found.items()}
    return found


def _plain(config: PeftConfig) -> dict[str, Any]:
    """Settings as JSON takes them: PEFT has names of modules in sets."""
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
