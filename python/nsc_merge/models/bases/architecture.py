"""What a folder or hub id says of a base model before its weights are read: its configuration and its class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsc_merge.utils.json_text import from_json
from nsc_merge.utils.safetensors_checks import check_safetensors

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Architecture:
    """Of a base model.

    Attributes:
        name: folder or hub id.
        local: whether it is a folder, so that nothing may touch the network.
        config: of transformers.
        kind: its class, of transformers.
    """

    name: str
    local: bool
    config: Any
    kind: Any

    @property
    def settings(self) -> dict[str, Any]:
        """For every ``from_pretrained``."""
        return {"local_files_only": self.local, "trust_remote_code": False, "config": self.config}


def architecture_of(name: str, *, local: bool) -> Architecture:
    """Read and check everything but the weights; nothing is ever unpickled or run.

    Raises:
        ValueError, OSError: if it cannot be loaded, naming what is missing, or if it is code that comes with it.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    if local:
        _check_folder(Path(name))
    fields, _ = transformers.PretrainedConfig.get_config_dict(name, local_files_only=local)
    if fields.get("auto_map") and str(fields.get("model_type")) not in transformers.CONFIG_MAPPING:
        raise ValueError(
            f"model: {name} needs code of its own (auto_map in its config.json), which is never run: load the model "
            "yourself in Python and call nsc_merge.merge(model, ...)"
        )
    try:
        # Said each time: transformers would ask at the terminal.
        config = transformers.AutoConfig.from_pretrained(name, local_files_only=local, trust_remote_code=False)
    except StrictDataclassError as error:
        raise ValueError(f"model: the config.json of {name} is none: {' '.join(str(error).split())}") from None
    return Architecture(name, local, config, _class_of(name, config))


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


def outline_of(architecture: Architecture, dtype: str = "auto") -> nn.Module:
    """The model with shapes and dtypes, and no numbers: its tensors are on the meta device."""
    import torch
    from torch import nn

    kind, config = architecture.kind, architecture.config
    with torch.device("meta"):
        model = kind(config) if isinstance(kind, type) and issubclass(kind, nn.Module) else kind.from_config(config)
    own = getattr(config, "dtype", None) or torch.float32
    return model.to(own if dtype == "auto" else getattr(torch, dtype)).eval()
