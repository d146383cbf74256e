"""What files mean, by definition: an independent reader of NumPy, PyYAML and plain Python, and PEFT's own."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PREFIX = "base_model.model."
_SIMPLE = {"U8": "u1", "I8": "i1", "BOOL": "?", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8"}
_SIMPLE |= {"I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8", "C64": "<c8"}
# Bits of the exponent and of the mantissa, bias, and whether the largest exponent is that of infinities.
_SMALL = {"F8_E4M3": (4, 3, 7, False), "F8_E5M2": (5, 2, 15, True)}


class Tiny(nn.Module):
    """What the adapters are of."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"q": 5, "v": 4}
        self.layers = nn.ModuleList(
            [nn.ModuleDict({name: nn.Linear(6, size) for name, size in sizes.items()}) for _ in range(2)]
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs


class Invalid(AssertionError):
    """A file was read that is none: no reader has a right answer."""


def plain_json(raw: bytes) -> Any:
    """JSON of which every key is given once."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) != len(pairs):
            raise Invalid("a key is given twice")
        return dict(pairs)

    return json.loads(raw.decode("utf-8"), object_pairs_hook=once)


def tensors(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Values of a safetensors file as numbers of 64 bits, and its metadata; by https://huggingface.co/docs/safetensors.

    Raises:
        Invalid: if it is none.
    """
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or 8 + length > len(raw):
        raise Invalid("the header is longer than the file")
    header, data = plain_json(raw[8 : 8 + length]), raw[8 + length :]
    metadata = header.pop("__metadata__", {})
    found, covered = {}, np.zeros(len(data), dtype=int)
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if not 0 <= begin <= end <= len(data):
            raise Invalid(f"{name} lies outside of the file")
        covered[begin:end] += 1
        values = _numbers(entry["dtype"], data[begin:end])
        if min(entry["shape"], default=1) < 0 or math.prod(entry["shape"]) != len(values):
            raise Invalid(f"{name} has {len(values)} values and shape {entry['shape']}")
        found[name] = values.reshape(entry["shape"])
    if (covered != 1).any():
        raise Invalid("bytes that are no tensor's, or two tensors'")
    return found, metadata


def _numbers(dtype: str, raw: bytes) -> np.ndarray:
    if dtype in _SIMPLE:
        return _wide(np.frombuffer(raw, dtype=_SIMPLE[dtype]))
    if dtype == "BF16":
        return _wide((np.frombuffer(raw, dtype="<u2").astype("<u4") << 16).view("<f4"))
    if dtype in _SMALL:
        return np.array([_small(value, *_SMALL[dtype]) for value in raw], dtype=np.float64)
    if dtype == "F8_E8M0":
        return np.array([math.nan if value == 255 else 2.0 ** (value - 127) for value in raw], dtype=np.float64)
    raise Invalid(f"no dtype of this oracle: {dtype}")


def _small(value: int, exponent_bits: int, mantissa_bits: int, bias: int, infinities: bool) -> float:
    """A number of 8 bits: sign, exponent, mantissa."""
    sign = -1.0 if value >> 7 else 1.0
    exponent = (value >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = value & ((1 << mantissa_bits) - 1)
    if exponent == (1 << exponent_bits) - 1:
        if infinities:
            return math.nan if mantissa else sign * math.inf
        if mantissa == (1 << mantissa_bits) - 1:
            return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)


def _wide(values: np.ndarray) -> np.ndarray:
    kinds = {"f": np.float64, "c": np.complex128, "i": np.int64, "u": np.uint64, "b": np.int64}
    return values.astype(kinds[values.dtype.kind])


def as_numbers(value: Tensor) -> np.ndarray:
    """A tensor as :func:`tensors` gives values."""
    return _wide((value.double() if value.dtype.is_floating_point else value).numpy())


def deltas(folder: Path) -> dict[str, np.ndarray]:
    """s B A of every module of an adapter, in float64, by PEFT's definition of s."""
    config = plain_json((folder / "adapter_config.json").read_bytes())
    values, _ = tensors(folder / "adapter_model.safetensors")
    ending = ".lora_A.weight"
    paths = {key.removeprefix(PREFIX).removesuffix(ending) for key in values if key.endswith(ending)}
    found = {}
    for path in paths:
        rank, alpha = _setting(config, "rank_pattern", "r", path), _setting(config, "alpha_pattern", "lora_alpha", path)
        scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        A, B = (_flat(values[f"{PREFIX}{path}.lora_{part}.weight"]) for part in "AB")
        if A.shape[0] != rank or B.shape[1] != rank:
            raise Invalid(f"{path}: factors of rank {A.shape[0]}, configured as {rank}")
        found[path] = scaling * (B @ A)
    return found


def _flat(values: np.ndarray) -> np.ndarray:
    """A convolution's factor as a matrix: its kernel belongs to the inputs."""
    return values.reshape(len(values), -1) if values.ndim > 2 else values


def _setting(config: dict[str, Any], patterns: str, default: str, path: str) -> float:
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return config[default]


def deltas_of_peft(folder: Path) -> dict[str, np.ndarray] | None:
    """What PEFT adds to every linear; None if PEFT does not load it, or calculates beyond float32."""
    from peft import PeftModel

    try:
        loaded = PeftModel.from_pretrained(Tiny(), str(folder))
    except Exception:
        return None
    found = {}
    for name, module in loaded.named_modules():
        if hasattr(module, "get_delta_weight") and "default" in module.lora_A:
            with torch.no_grad():
                found[name.removeprefix(PREFIX)] = module.get_delta_weight("default").double().numpy()
    return found if all(np.isfinite(value).all() for value in found.values()) else None


def differing(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> str:
    """The first array that is missing, or not the same to ``tolerance`` of the largest value, if that is a float32."""
    if found.keys() != expected.keys():
        return f"found {sorted(found)}, expected {sorted(expected)}"
    for name, value in expected.items():
        if found[name].shape != value.shape:
            return f"{name}: found shape {found[name].shape}, expected {value.shape}"
        scale = float(np.abs(value).max(initial=1e-37)) if tolerance else 0.0
        if not np.allclose(found[name], value, rtol=0, atol=tolerance * scale, equal_nan=True):
            return f"{name}: found {found[name].ravel()[:4]}, expected {value.ravel()[:4]}"
    return ""


def unequal(found: Any, expected: Any) -> str:
    """Both as JSON, if that differs."""
    one, other = json.dumps(found, sort_keys=True), json.dumps(expected, sort_keys=True)
    return "" if one == other else f"found {one[:150]}, expected {other[:150]}"


def misshapen(document: dict[str, Any]) -> str:
    """What a document of coefficients lacks."""
    tasks = document["tasks"]
    if not isinstance(tasks, list) or len(set(tasks)) != len(tasks) or not all(isinstance(task, str) for task in tasks):
        return f"tasks {tasks}"
    for path, row in document["coefficients"].items():
        finite = all(type(value) in (int, float) and abs(value) < math.inf for value in row.values())
        if list(row) != tasks or not finite:
            return f"coefficients of {path}: {row}"
    for path, names in document["dead"].items():
        if not isinstance(names, list) or not set(names) <= set(tasks):
            return f"dead of {path}: {names}"
    return "" if isinstance(document["method"], str) and isinstance(document["options"], dict) else "method or options"


def misshapen_state(document: dict[str, Any]) -> str:
    """What the document of a state lacks."""
    step, history = document["step"], document["history"]
    if type(step) is not int or step < 0 or not isinstance(history, list) or len(history) != step:
        return f"step {step} with history {history}"
    return "" if isinstance(document["batch_tasks"], bool) else f"batch_tasks {document['batch_tasks']}"


def differing_recipe(recipe: Any, folder: Path) -> str:
    """What a recipe has that its YAML does not say."""
    import yaml

    text = (folder / "recipe.yaml").read_text(encoding="utf-8")
    if _twice(yaml.compose(text, yaml.SafeLoader)):
        raise Invalid("a key is given twice")
    said = yaml.safe_load(text)
    output = said.get("output") or {}
    place = {name: {task: _place(folder, path) for task, path in (said.get(name) or {}).items()} for name in PLACES}
    options = {str(key): _number(value) for key, value in (said.get("options") or {}).items()}
    expected = {
        **place,
        "batch_size": said.get("batch_size", 32),
        "method": said.get("method", "nsc"),
        "options": options,
        "dtype": said.get("dtype", "auto"),
        "rank": output.get("rank"),
        "plots": output.get("plots", True),
        "out": folder / str(output.get("dir")),
    }
    for name, value in expected.items():
        found = getattr(recipe, name)
        if name in PLACES:
            found = {task: _found_place(one) for task, one in found.items()}
        if repr(found) != repr(value):
            return f"{name}: found {found!r}, expected {value!r}"
    return ""


PLACES = ("adapters", "calibration")


def _place(folder: Path, path: str) -> str:
    """Of what a recipe names: ``owner/name`` with no folder ``owner`` beside it is on the hub, if it is no file."""
    on_hub = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) and not path.endswith(".safetensors")
    return path if on_hub and not (folder / path.partition("/")[0]).exists() else str(folder / path)


def _found_place(one: Any) -> str:
    """Of an adapter, on disk or on the hub, or of what a calibration is made of, with settings that nobody gave."""
    if hasattr(one, "settings"):
        return one.source if one.settings == type(one.settings)() and not one.own else repr(one)
    return one.repo if hasattr(one, "repo") else str(one)


def _number(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+[eE][-+]?\d+", value):
        return float(value)
    return [_number(item) for item in value] if isinstance(value, list) else value


def _twice(node: Any) -> bool:
    import yaml

    if isinstance(node, yaml.MappingNode):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        return len(set(names)) != len(names) or any(_twice(part) for pair in node.value for part in pair)
    return isinstance(node, yaml.SequenceNode) and any(_twice(item) for item in node.value)
