"""Loads a base model onto a device."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nsc_merge.utils.safetensors_checks import check_safetensors


def device_of(name: str) -> torch.device:
    """The device of a name: ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.

    Raises:
        ValueError: if there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, found {name!r}")
    device, count = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(
            f"device: expected cpu or one of the {count} GPUs that PyTorch {torch.__version__} finds, found {name}"
        )
    return device


def load_model(name: str, *, local: bool, dtype: str = "auto", device: str = "auto") -> nn.Module:
    """The base model, in the class that its configuration names; nothing is ever unpickled or run from it.

    Args:
        name: folder or hub id.
        local: never touch the network.
        dtype: a name such as ``"float32"``, or ``"auto"`` for that of its files.
        device: ``"auto"`` for a GPU if there is one.

    Raises:
        ValueError, OSError: if there is no such device, or if it cannot be loaded, naming what is missing.
    """
    import transformers

    place = device_of(device)
    if local:
        if not (Path(name) / "config.json").is_file():
            raise FileNotFoundError(f"model: {name} holds no config.json")
        for file in sorted(Path(name).glob("*.safetensors")):
            check_safetensors(file)
    config = transformers.AutoConfig.from_pretrained(name, local_files_only=local)
    names = getattr(config, "architectures", None) or ["AutoModel"]
    kind: Any = getattr(transformers, names[0], None)
    if kind is None:
        raise ValueError(f"model: transformers has no {names[0]}, which {name} asks for")
    settings: dict[str, Any] = {
        "config": config,
        "dtype": dtype if dtype == "auto" else getattr(torch, dtype),
        "local_files_only": local,
        "use_safetensors": True,
        "output_loading_info": True,
    }
    model, info = kind.from_pretrained(name, **settings)
    missing = sorted(info["missing_keys"])
    if missing and all(key.startswith("pooler.") for key in missing):
        model, info = kind.from_pretrained(name, add_pooling_layer=False, **settings)
        missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"model: {name} lacks {len(missing)} tensors, for example {missing[0]}")
    return model.to(place).eval()
