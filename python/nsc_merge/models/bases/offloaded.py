"""Loads a base model over several devices, the host's memory and disk, by accelerate's hooks."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nsc_merge.models.bases.placement import Placement, device_of
from nsc_merge.models.bases.stored_weights import maps_of

# What transformers makes a map of by itself.
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


def load_over_devices(load: Callable[..., nn.Module], placement: Placement) -> nn.Module:
    """The model that ``load`` makes of transformers' own arguments, as ``placement.device_map`` says.

    Weights on disk stay in the files of the model, which are read whenever a weight is needed and must not change
    meanwhile. Those that transformers has to bring into another form first are written to a folder in
    ``tempfile.gettempdir()`` that goes with the model.

    Raises:
        RuntimeError: if accelerate is not installed.
        ValueError: naming a device or module that there is not, or a size that is none.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise RuntimeError("device_map needs accelerate, which spreads a model over devices: pip install accelerate")
    settings = {"device_map": _devices(placement.device_map), "max_memory": _sizes(placement.max_memory)}
    folder = Path(tempfile.mkdtemp(prefix="nsc_merge_offload_"))
    try:
        model = load(**settings, offload_folder=str(folder))
        _check_paths(model, placement.device_map)
        _own_memory(model)
        if any(folder.iterdir()):
            weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
        else:
            folder.rmdir()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return model


def _devices(given: str | Mapping[str, str | int] | None) -> str | dict[str, str | int]:
    """A device map as transformers takes it."""
    if isinstance(given, str):
        return given if given in STRATEGIES else {"": _device(given, f"one of {', '.join(STRATEGIES)} or ")}
    if not isinstance(given, Mapping) or not given:
        raise ValueError(f"device_map: expected one of {', '.join(STRATEGIES)} or module paths, found {given!r:.80}")
    return {path: _device(place, f"for {path!r} ") for path, place in given.items()}


def _device(place: Any, expected: str) -> str | int:
    """A place of a device map, if it is there."""
    try:
        number = int(place)
    except (TypeError, ValueError):
        number = None
    try:
        if place == "disk":
            return place
        found = device_of(str(place) if number is None else f"cuda:{number}")
    except ValueError as error:
        raise ValueError(f"device_map: expected {expected}a GPU's number, a device or disk: {error}") from None
    return "cpu" if found.type == "cpu" else found.index or 0


def _sizes(given: Mapping[str | int, str | int] | None) -> dict[str | int, int] | None:
    """The most bytes per place; transformers compares sizes as numbers, and accelerate takes GPUs by theirs."""
    from accelerate.utils import convert_file_size_to_int

    if given is None:
        return None
    found: dict[str | int, int] = {}
    for place, size in given.items():
        key = int(place) if str(place).isdecimal() else place
        if key != "cpu" and not (isinstance(key, int) and key < torch.cuda.device_count()):
            raise ValueError(
                f"max_memory: expected cpu or the number of one of {torch.cuda.device_count()} GPUs, found {place!r}"
            )
        try:
            found[key] = convert_file_size_to_int(size)
        except ValueError:
            raise ValueError(f"max_memory: {place}: expected a size such as 20GiB, found {size!r}") from None
    return found


def _check_paths(model: nn.Module, given: str | Mapping[str, str | int] | None) -> None:
    """Refuse places for what is not there: what they were meant for would be somewhere else."""
    known = {*dict(model.named_modules()), *dict(model.named_parameters(remove_duplicate=False))}
    for path in given if isinstance(given, Mapping) else ():
        if path not in known:
            raise ValueError(f"device_map: expected paths of modules of {type(model).__name__}, found {path!r:.80}")


def _own_memory(model: nn.Module) -> None:
    """Put copies in the place of views of files where numbers are in the host's memory: a file that is cut short would
    end the process.
    """
    for value in (*model.parameters(), *model.buffers()):
        if value.device.type == "cpu":
            value.data = value.data.clone()
    # By address and shape, so that weights that were one stay one.
    copies: dict[Any, torch.Tensor] = {}
    maps: dict[int, Any] = {}
    for module in model.modules():
        if found := maps_of(module):
            maps[id(found[1])] = found[1]
    for held in maps.values():
        for name, value in held.items():
            key = (value.data_ptr(), value.shape)
            if value.device.type == "cpu":
                if key not in copies:
                    copies[key] = value.clone()
                held[name] = copies[key]
