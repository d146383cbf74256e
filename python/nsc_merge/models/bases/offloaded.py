"""Loads a base model over several devices, the host's memory and disk, by accelerate's hooks."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nsc_merge.models.bases.placement import Placement
from nsc_merge.models.bases.stored_weights import maps_of


def load_over_devices(load: Callable[..., nn.Module], placement: Placement) -> nn.Module:
    """The model that ``load`` makes of transformers' own arguments, as ``placement.device_map`` says.

    Weights on disk stay in the files of the model, which are read whenever a weight is needed and must not change
    meanwhile. Those that transformers has to bring into another form first are written to a folder in
    ``tempfile.gettempdir()`` that goes with the model.

    Raises:
        RuntimeError: if accelerate is not installed.
        ValueError: naming a module that there is not, or that has no device.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise RuntimeError("device_map needs accelerate, which spreads a model over devices: pip install accelerate")
    settings = {"device_map": _devices(placement.device_map), "max_memory": _sizes(placement.max_memory)}
    folder = Path(tempfile.mkdtemp(prefix="nsc_merge_offload_"))
    try:
        with _naming_the_left_out():
            model = load(**settings, offload_folder=str(folder))
        _check_paths(model, placement.device_map)
        own_memory(model)
        if any(folder.iterdir()):
            weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
        else:
            folder.rmdir()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return model


@contextmanager
def _naming_the_left_out() -> Iterator[None]:
    """What accelerate says of a map that leaves some parameters out, which names them all."""
    try:
        yield
    except ValueError as error:
        _, told, names = str(error).partition("does not give any device for the following parameters: ")
        if not told:
            raise
        first, *others = names.split(", ")
        also = f" and {len(others)} more" if others else ""
        raise ValueError(
            f"device_map: expected a device for every module, found none for {first}{also}; name the modules that hold "
            "them, too"
        ) from None


def _devices(given: str | Mapping[str, str | int] | None) -> str | dict[str, str | int] | None:
    """A device map as transformers takes it, with GPUs by their numbers."""
    if not isinstance(given, Mapping):
        return given
    named = {path: place for path, place in given.items() if isinstance(place, str) and place.startswith("cuda")}
    return {**given, **{path: torch.device(place).index or 0 for path, place in named.items()}}


def _sizes(given: Mapping[str | int, str | int] | None) -> dict[str | int, int] | None:
    """The most bytes per place; transformers compares sizes as numbers."""
    from accelerate.utils import convert_file_size_to_int

    return None if given is None else {place: convert_file_size_to_int(size) for place, size in given.items()}


def _check_paths(model: nn.Module, given: str | Mapping[str, str | int] | None) -> None:
    """Refuse places for what is not there: what they were meant for would be somewhere else."""
    known = {*dict(model.named_modules()), *dict(model.named_parameters(remove_duplicate=False))}
    for path in given if isinstance(given, Mapping) else ():
        if path not in known:
            raise ValueError(f"device_map: expected paths of modules of {type(model).__name__}, found {path!r:.80}")


def own_memory(model: nn.Module) -> None:
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
