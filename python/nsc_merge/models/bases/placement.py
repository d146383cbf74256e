"""How a base model is held: in which dtype, on which devices, quantised or not, whole or in shards."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Placement:
    """Of a base model that is loaded.

    Attributes:
        dtype: a name such as ``"float32"``, or ``"auto"`` for that of its files.
        device: of a model on one device; a name as :func:`device_of` takes it.
        device_map: as accelerate's: ``"auto"`` and the like, or module path -> device, ``"cpu"`` or ``"disk"``.
        max_memory: of ``device_map``: number of a GPU or ``"cpu"`` -> the most to put there, such as ``"20GiB"``.
        quantization: how linears are quantised on loading, a key of :data:`nsc_merge.models.bases.quantised.KINDS`.
        shards: whether every process holds a shard of each weight (FSDP2).
        numbers: whether the weights are needed; without them, shapes and dtypes are all that a model has.
    """

    dtype: str = "auto"
    device: str = "auto"
    device_map: str | Mapping[str, str | int] | None = None
    max_memory: Mapping[str | int, str | int] | None = None
    quantization: str | None = None
    shards: bool = False
    numbers: bool = True


def device_of(name: str) -> torch.device:
    """The device of a name: ``"auto"`` (a GPU of CUDA's if there is one, else the CPU), ``"cpu"``, ``"cuda"``,
    ``"cuda:N"``, or ``"mps"`` (Apple's).

    Raises:
        ValueError: if there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise ValueError(f"device: expected auto, cpu, cuda, cuda:N or mps, found {name!r}")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device: expected one that PyTorch {torch.__version__} finds, found mps, which it does not")
    device, count = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(
            f"device: expected cpu or one of the {count} GPUs that PyTorch {torch.__version__} finds, found {name}"
        )
    return device
