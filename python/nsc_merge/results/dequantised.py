"""Writes a merged model of a quantised base as a plain one, a shard at a time, under the names of plain files."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from nsc_merge.models.bases.quantised import Dequantised, activations_of, is_linear, is_quantised, stored_or_dequantised
from nsc_merge.models.bases.stored_weights import numbers_of
from nsc_merge.results.merged_update import MergedUpdate


def has_quantised(model: nn.Module) -> bool:
    """Whether some linear of a model is quantised."""
    return any(is_linear(module) and is_quantised(module) for module in model.modules())


def save_dequantised(result: MergedUpdate, folder: Path, max_shard_size: str | int) -> None:
    """Save the merged transformers model without its quantisation: the update added to the numbers that its linears
    compute with, in float64, and rounded once to the dtype of the activations. No more than a shard is held at a time.

    Raises:
        TypeError, ValueError: as :meth:`nsc_merge.results.merged_update.MergedUpdate.merged_names`, before anything is
            written, and ``merged_value``.
    """
    model = result.model
    numbers = _Numbers(result)
    twin: Any = _without_numbers(model)
    # transformers asks such a hook for what is offloaded, one shard after another.
    twin._hf_hook = SimpleNamespace(weights_map=numbers)
    twin.hf_device_map = {"": "disk"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
        twin.save_pretrained(folder, max_shard_size=max_shard_size)


@contextmanager
def under_plain_names(model: nn.Module) -> Iterator[None]:
    """For the duration of a ``with`` block transformers saves a model under the names of files with plain numbers.

    Of a base whose files are quantised it remembers how it made numbers of their codes, and saves by going that way
    back: to numbers under the names of codes, where nothing reads them (gpt-oss), or to an error (bitsandbytes).
    """
    remembered: Any = vars(model).get("_weight_conversions") or ()
    if not any(_reads_codes(one) for one in remembered):
        yield
        return
    from transformers.conversion_mapping import get_model_conversion_mapping

    # What else such a conversion does, as of experts that files hold one by one, the model's class does by itself.
    own = {tuple(one.target_patterns): one for one in get_model_conversion_mapping(model, add_legacy=False)}
    found = [own.get(tuple(one.target_patterns)) if _reads_codes(one) else one for one in remembered]
    vars(model)["_weight_conversions"] = [one for one in found if one is not None]
    try:
        yield
    finally:
        vars(model)["_weight_conversions"] = remembered


def _reads_codes(conversion: Any) -> bool:
    """Whether a conversion of transformers is, in part, one of a quantiser."""
    return any(hasattr(one, "hf_quantizer") for one in getattr(conversion, "operations", ()))


class _Numbers(Mapping[str, Tensor]):
    """The merged model's tensors by name, each made when it is asked for."""

    def __init__(self, result: MergedUpdate) -> None:
        self._result = result
        self._merged = set(result.merged_names(result.model, dequantize=True))

    def __getitem__(self, name: str) -> Tensor:
        model = self._result.model
        if name in self._merged:
            return self._result.merged_value(model, name, dequantize=True).contiguous()
        path, _, part = name.rpartition(".")
        owner: Any = model.get_submodule(path)
        if not (is_linear(owner) and is_quantised(owner)):
            return numbers_of(model, name, getattr(owner, part).detach())
        place = stored_or_dequantised(model, name)
        assert isinstance(place, Dequantised)
        return place.rounded().contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self._merged)

    def __len__(self) -> int:
        return len(self._merged)


def _without_numbers(model: nn.Module) -> nn.Module:
    """The same model on the meta device, with an ``nn.Linear`` for every quantised linear."""
    memo: dict[int, Any] = {}
    for path, module in model.named_modules():
        if is_linear(module) and is_quantised(module):
            linear: Any = module
            dtype, _ = activations_of(model, path, linear)
            shape = linear.in_features, linear.out_features, getattr(linear, "bias", None) is not None
            memo[id(module)] = nn.Linear(*shape, dtype=dtype, device="meta")
    for value in (*model.parameters(), *model.buffers()):
        memo[id(value)] = _empty(value)
    twin: Any = copy.deepcopy(model, memo)
    for path, module in twin.named_modules():
        for part in ("_parameters", "_buffers"):
            # compressed-tensors has a store of its own there, of which every look gives another tensor.
            if type(getattr(module, part)) is not dict:
                held = getattr(model.get_submodule(path), part).items()
                setattr(module, part, {name: None if value is None else _empty(value) for name, value in held})
    for config in (twin.config, getattr(twin.config, "text_config", None)):
        for name in ("quantization_config", "_pre_quantization_dtype") if hasattr(config, "__dict__") else ():
            vars(config).pop(name, None)
    for name in ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_8bit", "is_loaded_in_4bit"):
        vars(twin).pop(name, None)
    return twin


def _empty(value: Tensor) -> Tensor:
    empty = torch.empty(value.shape, dtype=value.dtype, device="meta")
    return nn.Parameter(empty, False) if isinstance(value, nn.Parameter) else empty
