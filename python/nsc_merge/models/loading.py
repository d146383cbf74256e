"""Loads a base model onto a device."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from nsc_merge.utils.json_text import from_json
from nsc_merge.utils.provenance import hashes, marks
from nsc_merge.utils.safetensors_checks import check_safetensors

# Loaded model -> SHA-256 of its files; beside the models, whose copies may be changed.
_READ: WeakKeyDictionary[nn.Module, dict[str, str]] = WeakKeyDictionary()


def device_of(name: str) -> torch.device:
    """The device of a name: ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.

    Raises:
        ValueError: if there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, found {name!r}")
    device, count = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(
            f"device: expected cpu or one of the {count} GPUs that PyTorch {torch.__version__} finds, found {name}"
        )
    return device


def load_model(name: str, *, local: bool, dtype: str = "auto", device: str = "auto") -> nn.Module:
    """The base model, in the class that its configuration names; nothing is ever unpickled or run from it.

    Its weights are in memory of their own: what happens to the files later does not reach them.

    Args:
        name: folder or hub id.
        local: never touch the network.
        dtype: a name such as ``"float32"``, or ``"auto"`` for that of its files.
        device: ``"auto"`` for a GPU if there is one.

    Raises:
        ValueError, OSError: if there is no such device, if it cannot be loaded, naming what is missing, if it is code
            that comes with it, or if a file changed meanwhile.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    place = device_of(device)
    before = marks(Path(name)) if local else {}
    if local:
        _check_folder(Path(name))
    fields, _ = transformers.PretrainedConfig.get_config_dict(name, local_files_only=local)
    if fields.get("auto_map") and str(fields.get("model_type")) not in transformers.CONFIG_MAPPING:
        raise ValueError(
            f"model: {name} needs code of its own (auto_map in its config.json), which is never run: load the model "
            "yourself in Python and call nsc_merge.merge(model, ...)"
        )
    # Said each time: transformers would ask at the terminal.
    settings: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(name, **settings)
    except StrictDataclassError as error:
        raise ValueError(f"model: the config.json of {name} is none: {' '.join(str(error).split())}") from None
    kind = _class_of(name, config)
    settings |= {
        "config": config,
        "dtype": dtype if dtype == "auto" else getattr(torch, dtype),
        "use_safetensors": True,
        "output_loading_info": True,
    }
    model, info = kind.from_pretrained(name, **settings)
    missing = sorted(info["missing_keys"])
    if missing and all(key.startswith("pooler.") for key in missing):
        model, info = kind.from_pretrained(name, add_pooling_layer=False, **settings)
        missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"model: {name} lacks {len(missing)} tensors, for example {missing[0]}")
    model = model.to(place).eval()
    if place.type == "cpu":
        _unmap(model)
    if local:
        found = hashes(Path(name))
        if marks(Path(name)) != before:
            raise ValueError(f"model: files in {name} changed while they were read: load it once they stay")
        _READ[model] = found
    return model


def files_of(model: nn.Module) -> dict[str, str]:
    """File name -> SHA-256 of the files that :func:`load_model` made ``model`` of; empty if it is not from a folder."""
    return _READ.get(model, {})


def _check_folder(folder: Path) -> None:
    """Everything there that transformers is about to read."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"model: {folder} holds no config.json")
    if (folder / "adapter_config.json").exists():
        # It would be added to the weights.
        raise ValueError(f"model: {folder} holds an adapter (adapter_config.json) beside the base, expected it alone")
    for file in (folder / "config.json", folder / "generation_config.json", *folder.glob("*.index.json")):
        if not file.is_file():
            continue
        fields = from_json(file.read_bytes(), f"model: {file}", not_finite=True)
        if not isinstance(fields, dict):
            raise ValueError(f"model: {file}: expected a JSON object, found {fields!r:.40}")
        shards = fields.get("weight_map")
        for shard in set(shards.values()) if file.name.endswith(".index.json") and isinstance(shards, dict) else ():
            if Path(str(shard)).name != shard:
                raise ValueError(f"model: {file}: expected files in the same folder, found {shard!r:.80}")
    for file in sorted(folder.glob("*.safetensors")):
        check_safetensors(file)


def _class_of(name: str, config: Any) -> Any:
    """The class of transformers that a configuration names."""
    import transformers

    names = getattr(config, "architectures", None) or ["AutoModel"]
    kind = getattr(transformers, str(names[0]), None)
    known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    if not known and kind is not transformers.AutoModel:
        raise ValueError(f"model: transformers has no model {names[0]!r:.60}, which {name} asks for")
    return kind


def _unmap(model: nn.Module) -> None:
    """Put copies in the place of views of files, one at a time: a file that is cut short would end the process."""
    for value in (*model.parameters(), *model.buffers()):
        value.data = value.data.clone()
