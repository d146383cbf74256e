"""The files of an adapter's folder, as they lie there: what they mean is the reader's matter."""

from __future__ import annotations

import hashlib
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsc_merge.adapters.formats import diffusers_file
from nsc_merge.adapters.formats.foreign_files import way_from
from nsc_merge.utils.errors import naming
from nsc_merge.utils.json_text import from_json
from nsc_merge.utils.safetensors_checks import DTYPES, check_safetensors, read_checked

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterFiles:
    """What a PEFT folder holds, or one of diffusers.

    Attributes:
        config: of ``adapter_config.json``.
        weights: PEFT's keys -> tensors, in memory of their own; float8 in float32.
        sha256: file name -> SHA-256 of the very bytes that the above were made of.
        notes: what else is in the files.
    """

    config: dict[str, Any]
    weights: dict[str, Tensor]
    sha256: dict[str, str]
    notes: tuple[str, ...] = ()


def read_folder(folder: Path, name: str) -> AdapterFiles:
    """Read both files of the adapter called ``name``, each of them once, or the one of diffusers.

    Raises:
        FileNotFoundError: if one is missing; other weight formats are never opened.
        ValueError: if one is damaged, naming it.
    """
    if is_of_diffusers(folder):
        return _of_diffusers(folder, name)
    raw, config = _config(folder, name)
    with naming(f"adapters[{name!r}]"):
        weights = read_checked(folder / WEIGHTS_FILE)
    sha256 = {CONFIG_FILE: hashlib.sha256(raw).hexdigest(), WEIGHTS_FILE: weights.sha256}
    return AdapterFiles(config, {key: widened(value) for key, value in weights.tensors.items()}, sha256)


def read_headers(folder: Path, name: str) -> AdapterFiles:
    """As :func:`read_folder`, with tensors on the meta device and no digests: of the weights only the header is read.

    Raises:
        FileNotFoundError, ValueError: as there.
    """
    if is_of_diffusers(folder):
        # Its configuration may be among the numbers.
        files = _of_diffusers(folder, name)
        return replace(files, weights={key: value.to("meta") for key, value in files.weights.items()})
    _, config = _config(folder, name)
    with naming(f"adapters[{name!r}]"):
        header = check_safetensors(folder / WEIGHTS_FILE)
    weights = {
        key: torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]], device="meta") for key, entry in header.items()
    }
    return AdapterFiles(config, weights, {})


def is_of_diffusers(folder: Path) -> bool:
    """Whether a folder holds diffusers' file and not PEFT's."""
    return (folder / diffusers_file.FILE).is_file() and not (folder / CONFIG_FILE).exists()


def _of_diffusers(folder: Path, name: str) -> AdapterFiles:
    with naming(f"adapters[{name!r}]"):
        found = diffusers_file.read(folder)
    weights = {key: widened(value) for key, value in found.weights.items()}
    return AdapterFiles(found.config, weights, {diffusers_file.FILE: found.sha256}, found.notes)


def _config(folder: Path, name: str) -> tuple[bytes, dict[str, Any]]:
    """The configuration, of a folder that has both files."""
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else _what_is_at(folder)
            what = "is no file" if (folder / file).exists() else "is missing"
            raise FileNotFoundError(f"adapters[{name!r}]: {folder / file} {what} (found: {found}){_cure(folder)}")
    raw = (folder / CONFIG_FILE).read_bytes()
    config = from_json(raw, f"adapters[{name!r}]: {folder / CONFIG_FILE}")
    if not isinstance(config, dict):
        raise ValueError(f"adapters[{name!r}]: {folder / CONFIG_FILE}: expected a JSON object, found {config!r:.40}")
    return raw, config


def _what_is_at(folder: Path) -> str:
    return "a file" if folder.exists() else "no such folder"


def _cure(folder: Path) -> str:
    """How to make the weights of a folder that holds them otherwise; nothing where it holds none."""
    if folder.is_file():
        return (
            f"; expected the folder of an adapter, with {CONFIG_FILE} and {WEIGHTS_FILE}, or with "
            f"{diffusers_file.FILE} where diffusers wrote it, whatever the file is called now"
            f"{way_from([folder.name], folder.parent)}"
        )
    held, out = folder / "adapter_model.bin", str(folder / WEIGHTS_FILE)
    if held.is_file():
        code = (
            "import torch; from safetensors.torch import save_file; "
            f"w = torch.load({str(held)!r}, map_location='cpu', weights_only=True); "
            f"save_file({{k: v.contiguous().clone() for k, v in w.items()}}, {out!r})"
        )
    elif any(folder.glob("adapter_model-*-of-*.safetensors")):
        code = (
            "from pathlib import Path; from safetensors.torch import load_file, save_file; "
            f"parts = sorted(Path({str(folder)!r}).glob('adapter_model-*-of-*.safetensors')); "
            f"save_file({{k: v for p in parts for k, v in load_file(p).items()}}, {out!r})"
        )
    else:
        # Also of runs with checkpoints, and in a repository of huggingface_hub's cache; the last, by its number.
        for below in ("*", "*/*"):
            inside = [str(file.parent) for file in folder.glob(f"{below}/{CONFIG_FILE}")]
            if inside:
                last = max(inside, key=lambda one: (len(one), one))
                return f"; expected the folder of one adapter, such as {last}"
        if any(folder.glob("model*.safetensors")):
            return (
                "; a whole model is no adapter: where it was trained from the base, mergekit-extract-lora makes an "
                "adapter of what it changed"
            )
        return way_from([file.name for file in folder.glob("*")], folder)
    return f"; pickles are never opened, and parts not put together; to convert: python -c {shlex.quote(code)}"


def widened(value: Tensor) -> Tensor:
    """A float8 tensor in float32, which holds each of its values and is calculated with; any other as it is.

    PEFT takes float8 factors for plain numbers, without scales, too.
    """
    return value.float() if value.is_floating_point() and value.itemsize == 1 else value
