"""The files of an adapter's folder, as they lie there: what they mean is the reader's matter."""

from __future__ import annotations

import hashlib
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsc_merge.utils.json_text import from_json
from nsc_merge.utils.safetensors_checks import DTYPES, check_safetensors, read_checked

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class AdapterFiles:
    """What a PEFT folder holds.

    Attributes:
        config: of ``adapter_config.json``.
        weights: PEFT's keys -> tensors, in memory of their own; float8 in float32.
        sha256: file name -> SHA-256 of the very bytes that the above were made of.
    """

    config: dict[str, Any]
    weights: dict[str, Tensor]
    sha256: dict[str, str]


def read_folder(folder: Path, name: str) -> AdapterFiles:
    """Read both files of the adapter called ``name``, each of them once.

    Raises:
        FileNotFoundError: if one is missing; other weight formats are never opened.
        ValueError: if one is damaged, naming it.
    """
    raw, config = _config(folder, name)
    try:
        weights = read_checked(folder / WEIGHTS_FILE)
    except ValueError as error:
        raise ValueError(f"adapters[{name!r}]: {error}") from None
    sha256 = {CONFIG_FILE: hashlib.sha256(raw).hexdigest(), WEIGHTS_FILE: weights.sha256}
    return AdapterFiles(config, {key: widened(value) for key, value in weights.tensors.items()}, sha256)


def read_headers(folder: Path, name: str) -> AdapterFiles:
    """As :func:`read_folder`, with tensors on the meta device and no digests: of the weights only the header is read.

    Raises:
        FileNotFoundError, ValueError: as there.
    """
    _, config = _config(folder, name)
    try:
        header = check_safetensors(folder / WEIGHTS_FILE)
    except ValueError as error:
        raise ValueError(f"adapters[{name!r}]: {error}") from None
    weights = {
        key: torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]], device="meta") for key, entry in header.items()
    }
    return AdapterFiles(config, weights, {})


def _config(folder: Path, name: str) -> tuple[bytes, dict[str, Any]]:
    """The configuration, of a folder that has both files."""
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else "no such folder"
            what = "is no file" if (folder / file).exists() else "is missing"
            raise FileNotFoundError(f"adapters[{name!r}]: {folder / file} {what} (found: {found}){_cure(folder)}")
    raw = (folder / CONFIG_FILE).read_bytes()
    config = from_json(raw, f"adapters[{name!r}]: {folder / CONFIG_FILE}")
    if not isinstance(config, dict):
        raise ValueError(f"adapters[{name!r}]: {folder / CONFIG_FILE}: expected a JSON object, found {config!r:.40}")
    return raw, config


def _cure(folder: Path) -> str:
    """How to make the weights of a folder that holds them otherwise; nothing where it holds none."""
    if (folder / _DIFFUSERS_FILE).is_file():
        return (
            f"; {_DIFFUSERS_FILE} is what diffusers writes: load it into the pipeline (pipe.load_lora_weights) or the "
            "model (model.load_lora_adapter), and give that model, such as pipe.unet or pipe.transformer, as adapter"
        )
    held, out = folder / "adapter_model.bin", str(folder / WEIGHTS_FILE)
    if held.is_file():
        code = (
            f"import torch; from safetensors.torch import save_file; w = torch.load({str(held)!r}, weights_only=True); "
            f"save_file({{k: v.contiguous() for k, v in w.items()}}, {out!r})"
        )
    elif any(folder.glob("adapter_model-*-of-*.safetensors")):
        code = (
            "from pathlib import Path; from safetensors.torch import load_file, save_file; "
            f"parts = sorted(Path({str(folder)!r}).glob('adapter_model-*-of-*.safetensors')); "
            f"save_file({{k: v for p in parts for k, v in load_file(p).items()}}, {out!r})"
        )
    else:
        return ""
    return f"; pickles are never opened, and parts not put together; to convert: python -c {shlex.quote(code)}"


def widened(value: Tensor) -> Tensor:
    """A float8 tensor in float32, which holds each of its values and is calculated with; any other as it is.

    PEFT takes float8 factors for plain numbers, without scales, too.
    """
    return value.float() if value.is_floating_point() and value.itemsize == 1 else value
