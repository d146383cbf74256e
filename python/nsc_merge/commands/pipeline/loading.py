"""A pipeline and its adapters, from folders, files and the hub."""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nsc_merge.adapters.formats.diffusers_file import FILE, write_beside
from nsc_merge.commands.pipeline.given import SECOND, Given, on_hub
from nsc_merge.commands.pipeline.reading import watched
from nsc_merge.commands.terminal import log
from nsc_merge.utils.errors import hub_problem

# What PEFT saves one in.
_PEFT = ("adapter_config.json", "adapter_model.safetensors")


def check_apart(out: Path, base: str, given: Sequence[Given]) -> None:
    """Refuse to write over what is read.

    Raises:
        ValueError: naming what lies there.
    """
    # The folders that get files of the merge, and the files of which there may be one from before.
    ours = {out.resolve() / name for name in ("", SECOND, FILE, f"{SECOND}/{FILE}")}
    for place in (base, *(place for one in given for place in one.places)):
        if not on_hub(place) and Path(place).resolve() in ours:
            raise ValueError(f"--out: {out} is or holds {place}, which is read; expected another folder")


def loaded(arguments: argparse.Namespace, given: Sequence[Given]) -> Any:
    """The pipeline with all adapters loaded, on its device."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    hub = on_hub(arguments.base)
    if (hub is None or "weight_name" in hub.options) and not (Path(arguments.base) / "model_index.json").is_file():
        raise ValueError(f"BASE: expected a folder with a pipeline (model_index.json), or a hub id: {arguments.base}")
    device = _device(arguments.device)
    found = [{place: _found(one.name, place) for place in one.places} for one in given]
    # What diffusers leaves out of an adapter it says in warnings, which stay.
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
    dtype = getattr(torch, arguments.dtype)
    # Pickled weights are never opened.
    base, revision = (hub.repo, hub.options) if hub else (arguments.base, {})
    pipe = DiffusionPipeline.from_pretrained(base, torch_dtype=dtype, use_safetensors=True, **revision)
    if not hasattr(pipe, "load_lora_weights"):
        raise ValueError(f"BASE: expected a pipeline that loads LoRA, found {type(pipe).__name__}")
    pipe.to(device, *([] if pipe.dtype == dtype else [dtype]))
    pipe.set_progress_bar_config(disable=True)
    for one, places in zip(given, found, strict=True):
        _load(pipe, one, places)
    return pipe


@contextmanager
def _translated(pipe: Any, where: str) -> Iterator[str]:
    """A folder of PEFT's, which has the adapter of one model and does not say which, with a file as pipelines read
    them: of the model that denoises.
    """
    part = "unet" if getattr(pipe, "unet", None) is not None else "transformer"
    with tempfile.TemporaryDirectory() as folder:
        for name in _PEFT:
            (Path(folder) / name).symlink_to((Path(where) / name).resolve())
        write_beside(Path(folder), part)
        yield folder


def _device(name: str) -> str:
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return "cpu" if found is None else found.type
    try:
        torch.empty(0, device=name)
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"--device: {name!r} is not there: {error}") from error
    return name


def _found(name: str, given: str) -> tuple[str, dict[str, str]]:
    """Where diffusers is to look for an adapter: a folder or hub id, and which file or revision."""
    place = Path(given)
    if (hub := on_hub(given)) is not None:
        return hub.repo, hub.options
    if place.is_file():
        return str(place.parent), {"weight_name": place.name}
    if not place.is_dir():
        raise ValueError(f"{name}={given}: expected a file, a folder or a hub id, found none there")
    files = sorted(file.name for file in place.glob("*.safetensors"))
    if len(files) > 1 and FILE not in files:
        raise ValueError(f"{name}={given}: expected a folder with one adapter; name one of its files, {files}")
    return given, {"weight_name": FILE if FILE in files else files[0]} if files else {}


def _load(pipe: Any, one: Given, found: dict[str, tuple[str, dict[str, str]]]) -> None:
    has_second = getattr(pipe, SECOND, None) is not None
    if one.second is not None and not has_second:
        raise ValueError(f"{one.name}.{SECOND}={one.second}: expected a pipeline with two, found {type(pipe).__name__}")
    if one.place is not None:
        _load_file(pipe, one.name, one.place, *found[one.place])
    beside = None if one.place is None or one.second is not None else _beside(one.place, asked=has_second)
    if has_second and one.second is not None:
        _load_file(pipe, one.name, one.second, *found[one.second], load_into_transformer_2=True)
    elif has_second and beside is not None:
        _load_file(pipe, one.name, beside, *_found(one.name, beside), load_into_transformer_2=True)
    holding = _holding(pipe, one.name)
    if not holding:
        raise ValueError(f"{one.name}={one.place}: holds no LoRA of a model of {type(pipe).__name__}")
    if beside is not None and not has_second:
        log(f"{one.name}: its folder {SECOND} is left out, as the pipeline has no such model")
    if has_second and SECOND not in holding:
        log(f"{one.name}: holds nothing of {SECOND}; it is read from a folder {SECOND} in that of the adapter, or what "
            f"{one.name}.{SECOND}=PATH names")  # fmt: skip


def _beside(place: str, *, asked: bool) -> str | None:
    """The folder with what an adapter has for the second transformer, as ``save`` writes it; on the hub if asked."""
    hub = on_hub(place)
    if hub is None:
        folder = Path(place) / SECOND
        return str(folder) if folder.is_dir() else None
    if not asked or "weight_name" in hub.options:
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return str(Path(hf_hub_download(hub.repo, FILE, subfolder=SECOND, revision=hub.options.get("revision"))).parent)
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return None


def _load_file(pipe: Any, name: str, given: str, where: str, options: dict[str, str], **into: bool) -> None:
    if options.get("weight_name") == _PEFT[1] and (Path(where) / _PEFT[0]).is_file():
        with _translated(pipe, where) as folder:
            _load_file(pipe, name, given, folder, {"weight_name": FILE}, **into)
        return
    before = _holding(pipe, name)
    try:
        with watched(pipe) as read:
            pipe.load_lora_weights(where, adapter_name=name, use_safetensors=True, **options, **into)
    except Exception as error:
        hub = on_hub(given)
        told = None if hub is None else hub_problem(error, name, hub.repo, hub.options.get("revision"))
        if told is None and not isinstance(error, ValueError | TypeError | RuntimeError | KeyError | OSError):
            raise
        raise ValueError(told or f"{name}={given}: diffusers does not load it: {error!s:.400}") from error
    held = _holding(pipe, name)
    if into and SECOND not in held:
        raise ValueError(f"{name}.{SECOND}={given}: holds no LoRA of {SECOND} of {type(pipe).__name__}")
    # Of a file for the second transformer, keys begin as for the first.
    if holding := {"transformer"} if into else set(held) - set(before):
        for part, count in read.left_out(holding).items():
            log(f"{name}: {count} tensors of {part} are left out, as the pipeline has no such model")
    for text in read.said:
        log(f"{name}: diffusers says: {text}")
    if read.folded:
        log(f"{name}: its {read.folded} alphas differ between layers, and count as the file has them; diffusers by "
            "itself leaves out some")  # fmt: skip


def _holding(pipe: Any, name: str) -> list[str]:
    return [part for part, names in pipe.get_list_adapters().items() if name in names]
