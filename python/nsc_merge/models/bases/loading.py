"""Loads a base model as its placement says."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from torch import nn

from nsc_merge.models.bases.architecture import Architecture, architecture_of, not_made, outline_of, quantised_as
from nsc_merge.models.bases.offloaded import load_over_devices, own_memory
from nsc_merge.models.bases.placement import Placement, device_of, loading_settings
from nsc_merge.models.bases.quantised import keep_gradients
from nsc_merge.models.bases.sharded import settled, sharding
from nsc_merge.models.bases.unloaded import Rewritten, leave_in_files, weight_files
from nsc_merge.models.forward_contexts import giving_tuples
from nsc_merge.utils.errors import logger
from nsc_merge.utils.provenance import Digest, digests, marks, quick


@dataclass(frozen=True)
class BaseFiles:
    """The files that a model was made of.

    Attributes:
        folder: where they lie.
        marks: file name -> what is another once the file is replaced or written to.
        digests: file name -> SHA-256, or what else tells it from others (:mod:`nsc_merge.utils.provenance`).
    """

    folder: Path
    marks: Mapping[str, tuple[int, ...]]
    digests: Mapping[str, Digest]


# What quantised weights are multiplied by, of a linear's and of fused experts'.
_SCALE = re.compile(r"(weight|proj)_scale[^.]*$")
# Loaded model -> its files; beside the models, whose copies may be changed.
_READ: WeakKeyDictionary[nn.Module, BaseFiles] = WeakKeyDictionary()
_FOLDERS: WeakKeyDictionary[nn.Module, tuple[str, str]] = WeakKeyDictionary()


def load_model(
    name: str,
    *,
    local: bool,
    placement: Placement | None = None,
    digest: Callable[[Path], Digest] = quick,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The base model, in the class that its configuration names; nothing is ever unpickled, nor run from it unless
    ``trust_remote_code``.

    Its weights are in memory of their own: what happens to the files later does not reach them. Those that
    ``placement.device_map`` leaves on disk are read from the files whenever they are needed.

    Args:
        name: folder or hub id.
        local: never touch the network.
        placement: how it is held; on one device in the dtype of its files when None.
        digest: of each file of a folder, for :func:`files_of`: by default without reading large files once more, so
            that other numbers in a file of the same header and size have the same; inode and times tell of those that
            come while it is read.
        revision: branch, tag or commit of a model on the hub; None for the newest.
        trust_remote_code: run the code that comes with it.

    Raises:
        ValueError, OSError: if there is no such device, if it cannot be loaded, naming what is missing, if it is code
            that comes with it, or if a file changed meanwhile.
    """
    placement = placement or Placement()
    place = device_of(placement.device)
    before = marks(Path(name)) if local else {}
    architecture = architecture_of(name, local=local, revision=revision, trust_remote_code=trust_remote_code)
    model = _on_device(architecture, placement, place)
    if local:
        found = digests(Path(name), digest)
        if marks(Path(name)) != before:
            raise ValueError(f"model: files in {name} changed while they were read: load it once they stay")
        _READ[model] = BaseFiles(Path(name), before, found)
    return model


def base_files(model: nn.Module) -> BaseFiles | None:
    """The files that :func:`load_model` made ``model`` of; None if it is not from a folder."""
    return _READ.get(model)


def keep_files(copy: nn.Module, model: nn.Module) -> None:
    """Let a copy be known as made of the same files as ``model``."""
    if model in _READ:
        _READ[copy] = _READ[model]


def keep_folder(model: nn.Module) -> None:
    """Remember where the folder is that a model was read from by a relative path: a later save may be made from within
    another folder.
    """
    name = _named(model)
    if name and Path(name).is_dir():
        _FOLDERS[model] = name, str(Path(name).absolute())


def base_name(model: nn.Module) -> str:
    """The folder or hub id that a model was read from, by its configuration; empty if that is not known."""
    name = _named(model)
    known, folder = _FOLDERS.get(model, (name, name))
    return folder if known == name else name


def _named(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")


def files_of(model: nn.Module) -> Mapping[str, Digest]:
    """File name -> digest of the files that :func:`load_model` made ``model`` of; empty if it is not from a folder."""
    found = base_files(model)
    return {} if found is None else found.digests


def commit_of(model: nn.Module) -> str | None:
    """The commit on the hub that a model was loaded at; None if it is not from there, or not known."""
    config = getattr(model, "config", None)
    name, commit = (getattr(config, key, None) for key in ("_name_or_path", "_commit_hash"))
    return commit if commit and name and not Path(name).is_dir() else None


def from_pretrained(architecture: Architecture, **settings: Any) -> nn.Module:
    """transformers' ``from_pretrained`` with nothing missing.

    Raises:
        ValueError: naming a tensor that the files lack, or have in another shape than the configuration says, or if no
            model can be made of that.
        OSError: if there are no such files.
    """
    # Loading writes down there how it quantises.
    plain = quantised_as(architecture.config) is None
    known = {**architecture.settings, "use_safetensors": True, "output_loading_info": True, **settings}
    if plain and architecture.local and settings.get("device_map") != "meta" and _unlike_its_files(architecture):
        # Seconds to minutes before transformers says it: what does not fit is made first, of random numbers.
        given = {name: value for name, value in known.items() if name not in settings}
        if (problem := _other_shapes(architecture, given)) is not None:
            raise ValueError(problem)
    try:
        model, info = architecture.kind.from_pretrained(architecture.name, **known)
    except SafetensorError as error:
        raise ValueError(f"model: {architecture.name}: {error}") from None
    except Exception as error:  # of any kind: numbers of a configuration go through transformers to torch as they are
        told = "ignore_mismatched_sizes" in str(error)
        problem = (_other_shapes(architecture, known) if told else None) or _lacking(architecture)
        if problem is None:
            outline_of(architecture)
            raise
        raise (FileNotFoundError if isinstance(error, OSError) else ValueError)(problem) from None
    missing = sorted(info["missing_keys"])
    if missing and all(key.startswith("pooler.") for key in missing):
        model, info = architecture.kind.from_pretrained(architecture.name, add_pooling_layer=False, **known)
        missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"model: {architecture.name} lacks {len(missing)} tensors, for example {missing[0]}")
    scales = [key for key in info["unexpected_keys"] if _SCALE.search(key)]
    if plain and scales:
        raise ValueError(
            f"model: {architecture.name} holds {min(scales)}, of a quantised weight, and its config.json has no "
            "quantization_config, so that transformers would read codes as if they were plain numbers; expected a base "
            "in plain numbers, or the quantization_config that it was written with"
        )
    for config in giving_tuples(model):
        config.return_dict = True
    return model.eval()


def _unlike_its_files(architecture: Architecture) -> bool:
    """Whether a tensor in the files of a folder has the name of one of the model's, and another shape. That may be
    right, as transformers converts some while it loads them.
    """
    try:
        files = weight_files(Path(architecture.name))
        # Of a copy: making a model writes into its configuration.
        made = outline_of(replace(architecture, config=deepcopy(architecture.config))).state_dict()
    except Exception:  # of any kind, for which loading has words
        return False
    held = ((name, one.shape) for tensors in files.values() for name, one in tensors.items())
    return any(name in made and tuple(made[name].shape) != shape for name, shape in held)


def _other_shapes(architecture: Architecture, known: Mapping[str, Any]) -> str | None:
    """What transformers says in a report alone, which commands do not show."""
    # Of no size on the meta device: what a configuration asks for may fit nowhere.
    given = {**known, "ignore_mismatched_sizes": True, "device_map": "meta"}
    try:
        _, info = architecture.kind.from_pretrained(architecture.name, **given)
    except RuntimeError as error:  # Buffers are made even there.
        raise not_made(architecture, error) from None
    if not info["mismatched_keys"]:
        return None
    name, found, expected = min(info["mismatched_keys"])
    return (
        f"model: {architecture.name} has {len(info['mismatched_keys'])} tensors of another shape than its config.json "
        f"says, for example {name}: expected {list(expected)}, found {list(found)}; take weights and config.json of "
        "one model"
    )


def _lacking(architecture: Architecture) -> str | None:
    """What a folder lacks of the files of weights, if anything."""
    folder = Path(architecture.name)
    index = folder / "model.safetensors.index.json"
    if not architecture.local or (folder / "model.safetensors").exists():
        return None
    if index.is_file():
        fields = json.loads(index.read_bytes())
        if "metadata" not in fields:
            return f'model: {index} lacks "metadata", which transformers reads; add "metadata": {{}} to it'
        named = fields.get("weight_map")
        shards = sorted(set(named.values())) if isinstance(named, dict) else []
        gone = [shard for shard in shards if not (folder / shard).exists()]
        if not gone:
            return None
        count = f"{len(gone)} of {len(shards)} files"
        return f"model: {folder} lacks {count} that {index.name} names: {', '.join(gone):.200}; fetch them, too"
    pickled = sorted(file.name for file in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")))
    if not pickled:
        return f"model: {folder} holds no weights: expected model.safetensors, or its shards and {index.name}"
    code = (
        f"import transformers as t; m = {json.dumps(str(folder), ensure_ascii=False)}; "
        f"t.{architecture.kind.__name__}.from_pretrained(m, use_safetensors=False).save_pretrained(m)"
    )
    return (
        f"model: {folder} holds its weights in {pickled[0]}, which is pickled: loading it can run code; expected "
        f"model.safetensors. If you trust it: python -c {shlex.quote(code)}"
    )


def _on_device(architecture: Architecture, placement: Placement, device: torch.device) -> nn.Module:
    dtype = placement.dtype if placement.dtype == "auto" else getattr(torch, placement.dtype)
    if placement.shards and (settings := sharding(architecture, placement)):
        return settled(from_pretrained(architecture, dtype=dtype, **settings))
    quantised = loading_settings(placement.quantization, architecture.config, dtype, device)
    if not placement.numbers and architecture.local and quantised is None:
        model = from_pretrained(architecture, dtype=dtype, device_map="meta")
        try:
            leave_in_files(model, Path(architecture.name), device)
            return model
        except Rewritten as reason:
            logger.info("model: %s is loaded with its weights: %s", architecture.name, reason)
    settings = {"dtype": dtype} if quantised is None else quantised
    try:
        if placement.device_map is not None:
            # Instead of the one device that quantised weights are loaded to.
            given = {name: value for name, value in settings.items() if name != "device_map"}
            model = load_over_devices(partial(from_pretrained, architecture, **given), placement)
        else:
            model = from_pretrained(architecture, **settings)
    except ImportError as error:
        if quantised is None:
            raise
        raise ValueError(f"model: {architecture.name} is quantised: {error}") from None
    if quantised is not None:
        keep_gradients(model)
    if placement.device_map is not None:
        return model
    if quantised is None:
        model = model.to(device)
    own_memory(model)
    return model
