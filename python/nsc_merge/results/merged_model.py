"""Writes a merged model of transformers or diffusers: tensor by tensor, a merged one some rows at a time."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from nsc_merge.models.bases.architecture import quantised_as
from nsc_merge.models.bases.loading import base_files
from nsc_merge.models.bases.numbers import file_tensor
from nsc_merge.models.bases.stored_weights import is_dtensor, numbers_of, state_of
from nsc_merge.models.bases.unloaded import INDEX, WEIGHTS, Rewritten, saved_names, weight_files, without_bars
from nsc_merge.processes.group import current
from nsc_merge.results.dequantised import has_quantised, save_dequantised, under_plain_names
from nsc_merge.results.merged_update import MergedUpdate
from nsc_merge.results.safetensors_writer import Planned, in_order, write_safetensors
from nsc_merge.utils.errors import logger
from nsc_merge.utils.progress import Progress

# File name -> name -> what is written there.
Files: TypeAlias = Mapping[str, Mapping[str, Planned]]

# Where nothing says otherwise, the files are of at most this size.
_SHARD_SIZE = "5GB"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
# What diffusers calls the files of a model.
_DIFFUSERS = "diffusion_pytorch_model"
_PIECE = 8 << 20
# From this size on a person waits.
_LARGE = 1 << 30


def write_model(
    result: MergedUpdate, folder: Path, max_shard_size: str | int | None, *, dequantize: bool = False
) -> None:
    """Write the merged model as ``save_pretrained`` would, without ever holding it.

    A base that was read from a folder keeps how that divides it into files, unless ``max_shard_size`` says how. Where
    transformers writes tensors otherwise than as they are, it writes them all, from memory. ``dequantize`` as in
    :meth:`nsc_merge.MergeResult.save`.

    Raises:
        TypeError, ValueError: as :meth:`MergedUpdate.merged`; or if the model has no such format.
        OSError: if the disk is full, for example.
    """
    model: Any = result.model
    size = _SHARD_SIZE if max_shard_size is None else max_shard_size
    if not hasattr(model, "save_pretrained"):
        raise TypeError(
            f"format 'model' needs a transformers model, found {type(model).__name__}; save what result.apply(model) "
            "returns as models of its kind are, such as by safetensors.torch.save_model(merged, file), or use format "
            "'lora'"
        )
    if not (_is_of_transformers(model) or is_of_diffusers(model)):
        # As with huggingface_hub's PyTorchModelHubMixin, whose save_pretrained writes the numbers that a model has.
        merged: Any = result.apply(copy.deepcopy(model))
        merged.save_pretrained(folder)
        return
    with under_plain_names(model):
        _write_model(result, folder, size, as_base=max_shard_size is None, dequantize=dequantize)
    if not is_of_diffusers(model):
        _check_read(model, folder)


def _write_model(
    result: MergedUpdate, folder: Path, size: str | int, *, as_base: bool, dequantize: bool
) -> None:
    model: Any = result.model
    if dequantize and has_quantised(model):
        save_dequantised(result, folder, size)
        return
    if getattr(model, "is_quantized", False):
        raise ValueError(
            "format 'model' would round the merge to the quantised base; use format 'lora', or dequantize=True "
            "(--dequantize), which writes a model without quantisation"
        )
    if (method := quantised_as(getattr(model, "config", None))) is not None:
        raise ValueError(
            f"format 'model': model.config says that the weights are quantised ({method}), and they were loaded as "
            "plain numbers, as by transformers where it does not know the method; expected a base that it reads. If "
            "the numbers are right: del the quantization_config of model.config, or of its text_config"
        )
    merged = set(result.merged_names(model))
    state = model.state_dict(keep_vars=True)
    for name, value in state.items():
        if isinstance(value, Tensor) and is_dtensor(value):
            raise ValueError(
                f"{name}: expected a whole tensor, found a DTensor; gather the model first, or use format 'lora'"
            )
    if is_of_diffusers(model):
        model.save_config(folder)
        planned = _planned(result, {name: name for name in state}, merged)
        _write(_divided(model, planned, size, folder, _DIFFUSERS), folder)
        return
    try:
        names = saved_names(model, folder)
        if left := sorted(merged - names.keys()):
            raise Rewritten(f"transformers does not write {left[0]}")
    except Rewritten as reason:
        logger.info("format 'model' is written from memory: %s", reason)
        _write_from_memory(result, folder, size)
        return
    keys: dict[str, str] = {}
    for name, key in names.items():
        # Of tensors that share their numbers, the first.
        keys.setdefault(key, name)
    planned = _planned(result, keys, merged)
    files = _as_the_base(model, planned, folder) if as_base else None
    _write(_divided(model, planned, size, folder) if files is None else files, folder)


def _check_read(model: Any, folder: Path) -> None:
    """Refuse files with tensors under names under which transformers does not read them: it would put random numbers in
    their place, and say so in a report alone.
    """
    held = model.state_dict(keep_vars=True).keys()
    if all(tensors.keys() <= held for tensors in weight_files(folder).values()):
        return
    with without_bars():
        # On the meta device nothing but names and shapes is read.
        _, told = type(model).from_pretrained(
            folder, device_map="meta", output_loading_info=True, use_safetensors=True, local_files_only=True
        )
    # The class may make parts that this model was told to leave out, such as a pooler.
    lost = sorted(held & {*told["missing_keys"], *(key for key, *_ in told["mismatched_keys"])})
    if lost:
        raise ValueError(
            f"format 'model': transformers does not read {len(lost)} tensors as it writes them, for example {lost[0]}; "
            "use format 'lora' on the base as it is"
        )


def _is_of_transformers(model: nn.Module) -> bool:
    import transformers

    return isinstance(model, transformers.PreTrainedModel)


def is_of_diffusers(model: nn.Module) -> bool:
    """Told by the names of its classes: diffusers may not be installed."""
    return any(f"{one.__module__}.".startswith("diffusers.") for one in type(model).__mro__)


def part_of_pipeline(model: nn.Module) -> str | None:
    """What pipelines of diffusers that load LoRA call a model; None of one that they load none into, such as a
    ControlNet, whose modules often have the names of those of the model that it controls.
    """
    name = type(model).__name__
    if not is_of_diffusers(model) or "ControlNetModel" in name:
        return None
    if "UNet" in name:
        return "unet"
    return "transformer" if any(part in name for part in ("Transformer", "DiT", "UVit")) else None


def _planned(result: MergedUpdate, keys: Mapping[str, str], merged: Collection[str]) -> dict[str, Planned]:
    """What is written, of key -> name in the state dict, of which some are ``merged``."""
    model: Any = result.model
    state = model.state_dict(keep_vars=True)
    return {
        key: Planned(
            state[name].dtype,
            tuple(state[name].shape),
            partial(result.merged_rows, model, name) if name in merged else partial(_pieces, model, name, state[name]),
        )
        for key, name in keys.items()
    }


def _write_from_memory(result: MergedUpdate, folder: Path, max_shard_size: str | int) -> None:
    model: Any = result.model
    merged = result.merged(model)
    # Of models with a device map, transformers reads what is offloaded itself, one file after another.
    state = model.state_dict() if hasattr(model, "hf_device_map") else state_of(model)
    model.save_pretrained(folder, state_dict={**state, **merged}, max_shard_size=max_shard_size)


def _pieces(model: nn.Module, name: str, value: Tensor) -> Iterator[Tensor]:
    """The numbers of a tensor that is not merged, wherever they are."""
    count = value.shape[0] if value.dim() else 1
    step = max(_PIECE * count // max(value.numel() * value.dtype.itemsize, 1), 1)
    there = file_tensor(value)
    if there is None:
        whole = numbers_of(model, name, value)
        yield from (whole[begin : begin + step] for begin in range(0, count, step)) if value.dim() else (whole,)
        return
    for begin in range(0, count, step):
        yield there.read(begin, min(begin + step, count))


def _as_the_base(model: nn.Module, planned: Mapping[str, Planned], folder: Path) -> Files | None:
    """The files of the folder that the model was read from, if they hold what is to be written and nothing else; their
    index is copied.
    """
    base = base_files(model)
    if base is None:
        return None
    try:
        files = weight_files(base.folder)
        for name, tensors in files.items():
            if name != WEIGHTS and _SHARD.fullmatch(name) is None:
                raise Rewritten(f"{name} is no usual name")
            for key, there in tensors.items():
                wanted = planned.get(key)
                if wanted is None or (there.dtype, there.shape) != (wanted.dtype, wanted.shape):
                    raise Rewritten(f"{key} in {name} is another in the merged model")
        if left := sorted(planned.keys() - {key for tensors in files.values() for key in tensors}):
            raise Rewritten(f"{left[0]} is in none of its files")
    except (OSError, ValueError) as reason:
        logger.info("format 'model' is not divided into files as the base is: %s", reason)
        return None
    if WEIGHTS not in files:
        shutil.copyfile(base.folder / INDEX, folder / INDEX)
    return {name: {key: planned[key] for key in tensors} for name, tensors in files.items()}


def _divided(
    model: Any, planned: Mapping[str, Planned], max_shard_size: str | int, folder: Path, stem: str = "model"
) -> Files:
    """Files as transformers would write them, with their index, or as diffusers would under its ``stem``."""
    from huggingface_hub import split_torch_state_dict_into_shards

    shapes = {key: torch.empty(one.shape, dtype=one.dtype, device="meta") for key, one in planned.items()}
    split = split_torch_state_dict_into_shards(
        shapes, filename_pattern=f"{stem}{{suffix}}.safetensors", max_shard_size=max_shard_size
    )
    if split.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        path = folder / f"{stem}.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return {
        name: in_order({key: planned[key] for key in keys}) for name, keys in split.filename_to_tensors.items()
    }


def _write(files: Files, folder: Path) -> None:
    total = sum(tensor.size for tensors in files.values() for tensor in tensors.values())
    waited_for = total >= _LARGE and current().is_main
    with Progress("writing the model (MB)", max(total >> 20, 1), None if waited_for else False) as progress:
        written = 0

        def done(count: int) -> None:
            nonlocal written
            before, written = written >> 20, written + count
            if written >> 20 > before:
                progress.update((written >> 20) - before)

        for name, tensors in files.items():
            write_safetensors(folder / name, tensors, done)
