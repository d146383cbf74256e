"""How a base model is held: in which dtype, on which devices, quantised or not, whole or in shards."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nsc_merge.models.bases.architecture import quantisation_of, quantised_as


@dataclass(frozen=True)
class Placement:
    """Of a base model that is loaded.

    Attributes:
        dtype: a name such as ``"float32"``, or ``"auto"`` for that of its files.
        device: of a model on one device; a name as :func:`device_of` takes it.
        device_map: as accelerate's: ``"auto"`` and the like, or module path -> device, ``"cpu"`` or ``"disk"``.
        max_memory: of ``device_map``: number of a GPU or ``"cpu"`` -> the most to put there, such as ``"20GiB"``.
        quantization: how linears are quantised on loading, a key of :data:`KINDS`; or :data:`PLAIN`.
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


@dataclass(frozen=True)
class Kind:
    """A way to quantise the linears of a base model while it is loaded.

    Attributes:
        library: that does it, by the name that it is imported and installed by.
        config: given the dtype that activations have, transformers' configuration.
    """

    library: str
    config: Callable[[torch.dtype], Any]


def _bitsandbytes_8bit(dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    # It says with every product of every step that its input is cast to float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return BitsAndBytesConfig(load_in_8bit=True)


def _bitsandbytes_4bit(dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _torchao_int8(dtype: torch.dtype) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _torchao_int4(dtype: torch.dtype) -> Any:
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    # Its packed formats run in kernels without a gradient.
    four_bits = torch.int4  # type: ignore[attr-defined]
    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=four_bits, granularity=PerGroup(32)))


def _fp8(dtype: torch.dtype) -> Any:
    from torchao.quantization import Float8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Float8WeightOnlyConfig())


KINDS = {
    # LLM.int8(): inputs are rounded, too, but for outliers.
    "bitsandbytes-8bit": Kind("bitsandbytes", _bitsandbytes_8bit),
    # NF4 of QLoRA, which computes in the dtype of the activations.
    "bitsandbytes-4bit": Kind("bitsandbytes", _bitsandbytes_4bit),
    "torchao-int8": Kind("torchao", _torchao_int8),
    # Groups of 32. Four bits of information in a byte each: small in accuracy, not in memory.
    "torchao-int4": Kind("torchao", _torchao_int4),
    # float8_e4m3fn with a scale per row; activations stay as they are.
    "fp8": Kind("torchao", _fp8),
}


# In the place of a kind: files that are quantised are read as the numbers that they stand for.
PLAIN = "dequantize"
# Method of files -> what its library is told, on a GPU and on a CPU: to take kernels that have gradients, of which
# those for CPUs lose them once they ran without; or to decompress while it reads rather than, to the same size, when
# the model first runs.
_READ_WITH: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gptq": ({"backend": "auto_trainable"}, {"backend": "torch"}),
    "awq": ({"backend": "auto_trainable"}, {"backend": "torch_awq"}),
    "compressed-tensors": ({PLAIN: True}, {PLAIN: True}),
}


def loading_settings(
    name: str | None, config: Any, dtype: str | torch.dtype, device: torch.device
) -> dict[str, Any] | None:
    """For ``from_pretrained`` of a base whose linears are quantised, in its files or as it is loaded; None of others.

    How files are read is also written into ``config``.

    Args:
        name: a key of :data:`KINDS`; :data:`PLAIN`; None loads quantised files as they are, where they have gradients.
        config: of the base.
        dtype: of everything that is not quantised, ``"auto"`` for that of the files.
        device: to load to; libraries may not let a model move afterwards.

    Raises:
        ValueError: if there is no such kind, if the base is quantised already, or not, or not so that it can be read as
            plain numbers, or if the library is not installed.
    """
    held = quantised_as(config)
    place = {} if device.type == "cpu" else {"device_map": {"": device}}
    if name is None and held is None:
        return None
    if name in (None, PLAIN):
        if name == PLAIN:
            check_plain(held)
        on_gpu, on_cpu = _READ_WITH.get(held or "", ({}, {}))
        own = on_cpu if device.type == "cpu" else on_gpu
        quantisation_of(config).update({PLAIN: True} if name == PLAIN else own)
        return {"dtype": dtype, **place}
    if name not in KINDS:
        raise ValueError(f"quantization: expected one of {[*KINDS, PLAIN]}, found {name!r}")
    if held is not None:
        raise ValueError(f"quantization: expected none for a base whose files are quantised ({held}), found {name!r}")
    kind = KINDS[name]
    if importlib.util.find_spec(kind.library) is None:
        raise ValueError(
            f"quantization: {name} needs {kind.library}, which is not installed: pip install {kind.library}"
        )
    if not isinstance(dtype, torch.dtype):
        dtype = getattr(config, "dtype", None) or torch.bfloat16
    return {"dtype": dtype, "quantization_config": kind.config(dtype), **place}


def read_as_plain() -> list[str]:
    """The methods by which files are quantised that transformers also reads as plain numbers."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as known

    return [name for name, kind in known.items() if PLAIN in inspect.signature(kind.__init__).parameters]


def is_choice(held: str | None) -> bool:
    """Whether files quantised by method ``held`` are read as plain numbers only where :data:`PLAIN` says so."""
    return held in read_as_plain() and held not in _READ_WITH


def check_plain(held: str | None) -> None:
    """Refuse :data:`PLAIN` for files quantised by method ``held`` unless transformers reads them so.

    Raises:
        ValueError: naming the method, or that there is none.
    """
    able = read_as_plain()
    if held not in able:
        found = "one in plain numbers" if held is None else f"one quantised by {held}; leave the key out"
        raise ValueError(
            f"quantization: {PLAIN} is for a base whose files transformers reads as plain numbers ({', '.join(able)}), "
            f"found {found}"
        )
