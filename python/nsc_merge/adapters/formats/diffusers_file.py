"""The one file that diffusers writes adapters to, as the configuration and the tensors that PEFT would have written.

A pipeline's file has the adapters of several of its models, each key beginning with the model's name in the pipeline; a
model's own (``save_lora_adapter``) has keys of its modules. Settings are in the header since diffusers 0.34; before, an
adapter has a scaling of 1, or ``alpha`` beside its factors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nsc_merge.adapters.peft_keys import PREFIX
from nsc_merge.utils.json_text import from_json
from nsc_merge.utils.safetensors_checks import read_checked

FILE = "pytorch_lora_weights.safetensors"
CURE = (
    "load it into the pipeline (pipe.load_lora_weights) or the model (model.load_lora_adapter), and give that model, "
    "such as pipe.unet or pipe.transformer, as adapter"
)
_SETTINGS = "lora_adapter_metadata"
_ALPHA = "alpha"
# What a configuration says the adapter is for: a folder of this machine, for example.
_ABOUT = ("base_model_name_or_path", "revision", "auto_mapping", "task_type")
# As pipelines call what denoises, of which a file has one, and what reads the prompt.
_DENOISERS = ("unet", "transformer")
_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
# Of single families: LTX-2, MiniMax-H3, Würstchen, Anima.
_OTHERS = ("connectors", "transformer_ref", "prior", "text_conditioner")
# As ComfyUI and the models' authors call what denoises; its modules have other names there, and some are in one.
_OF_COMFYUI = "diffusion_model"
_KEY = re.compile(
    r"(?P<path>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_magnitude_vector|"
    r"lora\.down\.weight|lora\.up\.weight|alpha)"
)
_TODAY = {"lora.down.weight": "lora_A.weight", "lora.up.weight": "lora_B.weight"}


@dataclass(frozen=True)
class DiffusersFile:
    """Of one model of the file.

    Attributes:
        config: as ``adapter_config.json`` has it.
        weights: PEFT's keys -> tensors.
        sha256: of the file.
        notes: what else is in it.
    """

    config: dict[str, Any]
    weights: dict[str, Tensor]
    sha256: str
    notes: tuple[str, ...]


def read(folder: Path) -> DiffusersFile:
    """The adapter of the model that denoises; of a file that has none such, that of its only model.

    Raises:
        ValueError: if the file is damaged, has keys that diffusers translates first, a scaling that only some
            pipelines know, or adapters of several models none of which denoises.
    """
    file = read_checked(folder / FILE)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in file.tensors.items():
        first, _, rest = key.partition(".")
        part, rest = (first, rest) if first in (*_DENOISERS, *_ENCODERS, *_OTHERS) else ("", key)
        found = _KEY.fullmatch(rest)
        if found is None or first == _OF_COMFYUI:
            raise ValueError(
                f"{folder / FILE}: {key!r:.120} is no key of PEFT's layers; expected <model>.<module>.lora_A.weight "
                f"and the like. diffusers translates those of kohya, ComfyUI and its own first releases: {CURE}"
            )
        today = _TODAY.get(found["part"], found["part"])
        parts.setdefault(part, {})[f"{found['path']}.{today}"] = value
    chosen = next((part for part in _DENOISERS if part in parts), None)
    if chosen is None or "" in parts:
        if len(parts) != 1:
            several = sorted(part or "a model without a name" for part in parts)
            raise ValueError(f"{folder / FILE}: expected an adapter of one model, found those of {several}; {CURE}")
        (chosen,) = parts
    notes = tuple(
        f"{FILE}: {part} has an adapter, too, which is left out; to merge it, load the file into the pipeline "
        f"(pipe.load_lora_weights) and give pipe.{part} as adapter"
        for part in parts
        if part != chosen
    )
    settings = _settings(folder, file.metadata, chosen)
    weights = parts[chosen]
    if settings is None and _ALPHA in file.metadata:
        raise ValueError(
            f"{folder / FILE}: {_ALPHA} is in its header ({file.metadata[_ALPHA]:.40}), by which diffusers scales "
            f"MiniMax-H3's and no others; expected settings ({_SETTINGS}), or alpha beside the factors: {CURE}"
        )
    # One of a module without factors stays, and is refused with other tensors that nothing would use.
    adapted = [key.removesuffix(".lora_A.weight") for key in weights if key.endswith(".lora_A.weight")]
    alphas = {path: weights.pop(f"{path}.alpha") for path in adapted if f"{path}.alpha" in weights}
    if alphas:
        notes += (
            f"{FILE}: alpha beside the factors counts, as what trained them means it, and diffusers for Flux and "
            "Chroma; its other pipelines load no such file today, or left alpha out, with a scaling of 1",
        )
    if settings is not None and alphas:
        raise ValueError(
            f"{folder / FILE}: {next(iter(alphas))}.alpha is given beside the settings in the header ({_SETTINGS}), "
            f"expected one of them, as diffusers does; {CURE}"
        )
    config = _config(weights, alphas) if settings is None else {"peft_type": "LORA", **settings}
    return DiffusersFile(config, {f"{PREFIX}{key}": value for key, value in weights.items()}, file.sha256, notes)


def write_beside(folder: Path, part: str) -> None:
    """Write the adapter in a folder of PEFT's once more, as pipelines load it: in PEFT's file they find no key that is
    theirs, and go on without it.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``, LoRA alone.
        part: what pipelines call the model, ``"unet"`` or ``"transformer"``.
    """
    from safetensors.torch import load_file

    config = from_json((folder / "adapter_config.json").read_bytes(), str(folder))
    tensors = load_file(folder / "adapter_model.safetensors")
    write(folder / FILE, {part: ({key.removeprefix(PREFIX): value for key, value in tensors.items()}, config)})


def write(path: Path, parts: Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, Any]]]) -> None:
    """Write adapters of one or several models of a pipeline into one file, as pipelines load them.

    Args:
        path: of the file.
        parts: what pipelines call a model -> tensors, by keys of its own, and settings of PEFT in plain values.
    """
    from safetensors.torch import save_file

    named = {f"{part}.{key}": value for part, (tensors, _) in parts.items() for key, value in tensors.items()}
    # Without them the ranks are taken from the shapes, and one scaling for all.
    meant = {f"{part}.{key}": value for part, (_, config) in parts.items() for key, value in _kept(config).items()}
    settings = json.dumps(meant, indent=2, sort_keys=True)
    save_file(named, path, metadata={"format": "pt", _SETTINGS: settings})


def _kept(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _ABOUT}


def _settings(folder: Path, metadata: Mapping[str, str], part: str) -> dict[str, Any] | None:
    if _SETTINGS not in metadata:
        return None
    held = from_json(metadata[_SETTINGS], f"{folder / FILE}: {_SETTINGS}")
    if not isinstance(held, dict):
        raise ValueError(f"{folder / FILE}: {_SETTINGS}: expected a JSON object, found {json.dumps(held):.40}")
    begin = f"{part}." if part else ""
    # A pipeline may be saved with the settings of some models alone.
    return {key.removeprefix(begin): value for key, value in held.items() if key.startswith(begin)} or None


def _config(weights: Mapping[str, Tensor], alphas: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of a file without settings: by the shapes, each module with its own rank."""
    end = ".lora_A.weight"
    ranks = {key.removesuffix(end): len(value) for key, value in weights.items() if key.endswith(end)}
    whole = {path: f"^{re.escape(path)}" for path in ranks}
    return {
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 1,
        "rank_pattern": {whole[path]: rank for path, rank in ranks.items()},
        "alpha_pattern": {whole[path]: float(alphas[path]) if path in alphas else rank for path, rank in ranks.items()},
        "target_modules": list(ranks),
        "use_dora": any(key.endswith("lora_magnitude_vector") for key in weights),
        "lora_bias": any(key.endswith("lora_B.bias") for key in weights),
    }
