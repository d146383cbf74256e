"""The keys of a recipe that say how the base model is held: dtype, device, device_map, max_memory, quantization."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from nsc_merge.recipes.yaml_keys import RecipeError, choice, text

if TYPE_CHECKING:
    from nsc_merge.models.bases.placement import Placement

DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
QUANTIZATIONS = ("none", "bitsandbytes-8bit", "bitsandbytes-4bit", "torchao-int8", "torchao-int4", "fp8", "dequantize")
# As accelerate reads it, but for the bits that it takes a small b for.
_MEMORY = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*[KMG]i?B\s*", re.IGNORECASE)
_PLACE = re.compile(r"cpu|disk|cuda(:\d+)?")


@dataclass(frozen=True, kw_only=True)
class Placed:
    """How a recipe holds its base model.

    Attributes:
        dtype: of the base model, ``"auto"`` for that of its files.
        device: of a model on one device, ``"auto"`` for a GPU if there is one.
        device_map: how accelerate spreads the model over devices: one of :data:`DEVICE_MAPS`, or module path -> number
            of a GPU, ``"cpu"`` or ``"disk"``; None for one device.
        max_memory: number of a GPU or ``"cpu"`` -> the most to put there, for a ``device_map`` that is no mapping.
        quantization: how linears are quantised on loading, or ``"dequantize"`` for the numbers that quantised files
            stand for; None leaves them as their files are.
    """

    dtype: str = "auto"
    device: str = "auto"
    device_map: str | dict[str, str | int] | None = None
    max_memory: dict[str | int, str | int] | None = None
    quantization: str | None = None

    @property
    def placement(self) -> Placement:
        """For :func:`nsc_merge.models.bases.loading.load_model`."""
        from nsc_merge.models.bases.placement import Placement

        return Placement(**self.placement_keys)

    @property
    def placement_keys(self) -> dict[str, Any]:
        """The keys with their values, as a recipe has them."""
        return {name: getattr(self, name) for name in PLACEMENT_KEYS}


PLACEMENT_KEYS = tuple(field.name for field in fields(Placed))


def placement_keys(document: Mapping[str, Any]) -> dict[str, Any]:
    """The checked values of :class:`Placed` in a document.

    Raises:
        RecipeError: naming the key, what was found and what was expected.
    """
    device = text(document, "device", default="auto")
    device_map = _device_map(document.get("device_map"))
    max_memory = _max_memory(document.get("max_memory"))
    if device_map is not None and device != "auto":
        raise RecipeError(
            f"device_map: spreads the model over devices, but device asks for {device!r}; expected one of the two keys"
        )
    if max_memory is not None and not isinstance(device_map, str):
        found = "none" if device_map is None else "a mapping, which says all there is to say"
        raise RecipeError(f"max_memory: bounds a device_map of {list(DEVICE_MAPS)}, found {found}")
    given = {**document, "quantization": document.get("quantization") or "none"}
    quantization = choice(given, "quantization", QUANTIZATIONS)
    return {
        "dtype": choice(document, "dtype", DTYPES),
        "device": device,
        "device_map": device_map,
        "max_memory": max_memory,
        "quantization": None if quantization == "none" else quantization,
    }


def _device_map(value: Any) -> str | dict[str, str | int] | None:
    if value is None or value in DEVICE_MAPS:
        return value
    if not isinstance(value, dict) or not value:
        raise RecipeError(
            f"device_map: expected one of {list(DEVICE_MAPS)}, or module paths with the device of each, "
            f"found {value!r:.60}"
        )
    for path, place in value.items():
        if not isinstance(path, str):
            raise RecipeError(f"device_map: expected module paths, found {path!r:.60}")
        if not _is_number_of_gpu(place) and not (isinstance(place, str) and _PLACE.fullmatch(place)):
            raise RecipeError(
                f"device_map.{path}: expected the number of a GPU, cuda:N, cpu or disk, found {place!r:.60}"
            )
    return value


def _max_memory(value: Any) -> dict[str | int, str | int] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not value:
        raise RecipeError(f"max_memory: expected devices with a size each, found {value!r:.60}")
    for place, size in value.items():
        if place != "cpu" and not _is_number_of_gpu(place):
            raise RecipeError(f"max_memory: expected cpu or the number of a GPU, found {place!r:.60}")
        is_bytes = isinstance(size, int) and not isinstance(size, bool) and size >= 0
        if not is_bytes and not (isinstance(size, str) and _MEMORY.fullmatch(size)):
            raise RecipeError(f"max_memory.{place}: expected a size such as 20GiB, found {size!r:.60}")
    return {place: size.strip().upper() if isinstance(size, str) else size for place, size in value.items()}


def _is_number_of_gpu(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
