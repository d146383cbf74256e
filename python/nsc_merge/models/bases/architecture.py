"""What a folder or hub id says of a base model before its weights are read: its configuration and its class."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsc_merge.utils.errors import hub_problem, naming
from nsc_merge.utils.json_text import from_json
from nsc_merge.utils.provenance import leads_away
from nsc_merge.utils.safetensors_checks import check_safetensors

if TYPE_CHECKING:
    from torch import nn

# What configurations call the number of layers. As many as this are made in seconds, be they in the files or not.
_COUNTING = frozenset(
    (
        *("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"),
        *("num_encoder_layers", "num_decoder_layers", "depth"),
    )
)
_LAYERS = 500
# transformers makes a name for each label that a configuration counts, which takes seconds for as many as this.
_LABELS = 10_000_000
# More than any size, number of positions or base of theirs in use: named where a configuration is refused.
_LARGE = 100_000_000
# Of what transformers knows no class of.
_DIFFUSERS = (
    "load it there, and merge in Python: nsc_merge.merge(pipe.transformer, adapters) or pipe.unet, or all models of a "
    "pipeline by nsc_merge.integrations.diffusers.merge, or at a terminal by nsc-merge pipeline"
)


@dataclass(frozen=True)
class Architecture:
    """Of a base model.

    Attributes:
        name: folder or hub id.
        local: whether it is a folder, so that nothing may touch the network.
        config: of transformers.
        kind: its class, of transformers, or of the code that comes with it.
        revision: the commit of a model on the hub.
        trust_remote_code: whether code that comes with it may be run.
    """

    name: str
    local: bool
    config: Any
    kind: Any
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """For every ``from_pretrained``."""
        settings = {
            "local_files_only": self.local,
            "trust_remote_code": self.trust_remote_code,
            "config": self.config,
        }
        # Configuration and weights are of one commit, whatever is uploaded meanwhile.
        return settings if self.revision is None else {**settings, "revision": self.revision}


def architecture_of(
    name: str, *, local: bool, revision: str | None = None, trust_remote_code: bool = False
) -> Architecture:
    """Read and check everything but the weights; nothing is ever unpickled, nor run unless ``trust_remote_code``.

    Args:
        name: folder or hub id.
        local: never touch the network.
        revision: branch, tag or commit of a model on the hub; None for the newest.
        trust_remote_code: run the code that comes with it, of which its configuration then names the class.

    Raises:
        ValueError, OSError: if it cannot be loaded, naming what is missing, or if it is code that comes with it and
            ``trust_remote_code`` is False.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    folder = Path(name) if local else _snapshot(name, revision)
    if not local:
        # The cache calls a snapshot by its commit.
        revision = folder.name
    _check_folder(folder, None if local else name)
    given: dict[str, Any] = {"local_files_only": local, **({} if revision is None else {"revision": revision})}
    fields, _ = transformers.PretrainedConfig.get_config_dict(name, **given)
    own = fields.get("auto_map")
    if own and not trust_remote_code and str(fields.get("model_type")) not in transformers.CONFIG_MAPPING:
        raise ValueError(
            f"model: {name} needs code of its own (auto_map in its config.json), which is run only where a recipe says "
            "trust_remote_code: true: read it first, or load the model yourself in Python and call "
            "nsc_merge.merge(model, ...)"
        )
    _check_quantisation(name, fields)
    kernel = _kernel_in(fields)
    if kernel is not None and not trust_remote_code:
        raise ValueError(
            f"model: the config.json of {name} asks for a kernel from the hub ({kernel!r:.80}), which is code, and is "
            "run only where a recipe says trust_remote_code: true; take the key out of it"
        )
    try:
        # Said each time: transformers would ask at the terminal.
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **given)
    except StrictDataclassError as error:
        raise ValueError(f"model: the config.json of {name} is none: {' '.join(str(error).split())}") from None
    if not local:
        # Where transformers had it; what is saved of a configuration never holds it.
        config._commit_hash = revision
    kind = _class_of_code(name, fields, given) if own and trust_remote_code else None
    kind = kind or _class_of(name, config)
    _check_generation(name, kind, given)
    return Architecture(name, local, config, kind, revision, trust_remote_code)


def quantised_as(config: Any) -> str | None:
    """The method by which the files of a base are quantised, as its configuration, or the fields of one, names it;
    ``"unnamed"`` where it names none, None where they are not quantised.
    """
    found = quantisation_of(config)
    method = _field(found, "quant_method")
    return None if found is None else str(getattr(method, "value", method or "unnamed"))


def quantisation_of(config: Any) -> Any:
    """What a configuration says of how files are quantised, where transformers looks, in this order."""
    own = _field(config, "quantization_config")
    return _field(_field(config, "text_config"), "quantization_config") if own is None else own


def _field(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)


def _check_quantisation(name: str, fields: dict[str, Any]) -> None:
    """Refuse files quantised in a way that transformers does not know: it reads codes as if they were the numbers."""
    from transformers.quantizers import AutoHfQuantizer

    given = quantisation_of(fields)
    if given is None:
        return
    try:
        known = isinstance(given, dict) and AutoHfQuantizer.supports_quant_method(given)
    except ValueError:  # where it names no method
        known = False
    if not known:
        method = given.get("quant_method") if isinstance(given, dict) else given
        raise ValueError(
            f"model: the config.json of {name} has a quantization_config of quant_method {method!r:.60}, which "
            "transformers does not know and would read as plain numbers; expected a base in plain numbers, or one "
            "quantised by a method of transformers. If the files are in plain numbers, take the key out"
        )


def _check_generation(name: str, kind: Any, given: dict[str, Any]) -> None:
    """Refuse a generation_config.json that transformers does, once the weights are read and without its name."""
    import transformers

    if not (hasattr(kind, "can_generate") and kind.can_generate()):
        return
    try:
        transformers.GenerationConfig.from_pretrained(name, **given)
    except OSError:
        # There is none.
        return
    except Exception as error:
        # Of any kind: a value of another type goes through transformers as it is.
        why = " ".join(str(error).split())
        raise ValueError(f"model: the generation_config.json of {name} is none to transformers: {why:.200}") from None


def _kernel_in(fields: Any) -> str | None:
    """The repository of a kernel that a configuration, or one within it, names as an implementation: transformers would
    fetch and run it, for a base in a folder, too.
    """
    if not isinstance(fields, dict):
        return None
    for key, value in fields.items():
        named = [value] if isinstance(value, str) else list(value.values()) if isinstance(value, dict) else []
        if str(key).endswith("_implementation"):
            found = next((one for one in named if isinstance(one, str) and "/" in one), None)
        else:
            found = _kernel_in(value)
        if found is not None:
            return found
    return None


def _snapshot(name: str, revision: str | None) -> Path:
    """The folder in the cache of the commit that a revision of a repository is now, or was when it was last asked for,
    offline; its configuration is there.
    """
    from transformers.utils import cached_file

    given: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        adapter = cached_file(name, "adapter_config.json", _raise_exceptions_for_missing_entries=False, **given)
        if adapter is not None:
            # It would be added to the weights.
            raise ValueError(f"model: {name} on the hub holds an adapter (adapter_config.json); expected a base alone")
        file = cached_file(name, "config.json", **given)
    except OSError as error:
        problem = hub_problem(error, "model", name, revision)
        if problem is None:
            raise
        raise OSError(problem) from None
    # Some releases say nothing of a configuration that is not there.
    if file is None:
        raise FileNotFoundError(f"model: {name} holds no config.json: expected another repository")
    return Path(file).parent


def _fetch_weights(name: str, revision: str) -> None:
    """Bring the weights of a repository into the cache, as transformers is about to."""
    from transformers.utils import cached_file
    from transformers.utils.hub import get_checkpoint_shard_files

    given: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    if cached_file(name, "model.safetensors", **given) is None:
        index = cached_file(name, "model.safetensors.index.json", **given)
        if index is not None:
            get_checkpoint_shard_files(name, index, revision=revision)


def _check_folder(folder: Path, repo: str | None) -> None:
    """Everything there that transformers is about to read; of a ``repo`` on the hub what the cache has of it."""
    if not (folder / "config.json").is_file():
        # As where sentence-transformers saved a model for queries and one for documents.
        places = {one.parent for one in folder.glob("*/model*.safetensors")}
        within = sorted(place for place in places if (place / "config.json").is_file())
        hint = f"; folders within hold models, such as {within[0]}: expected one of them" if within else ""
        if (folder / "model_index.json").is_file():
            raise ValueError(f"model: {folder} holds a pipeline of diffusers (model_index.json); {_DIFFUSERS}")
        raise FileNotFoundError(f"model: {folder} holds no config.json{hint}")
    if (folder / "adapter_config.json").exists():
        # It would be added to the weights.
        raise ValueError(f"model: {folder} holds an adapter (adapter_config.json) beside the base, expected it alone")
    for file in (folder / "config.json", folder / "generation_config.json", *folder.glob("*.index.json")):
        if not file.is_file():
            continue
        if leads_away(file, folder):
            raise ValueError(
                f"model: {file} is a link to {file.resolve()}, a file of another name, which would be saved as a part "
                "of the model; expected the file itself"
            )
        fields = from_json(file.read_bytes(), f"model: {file}", not_finite=True)
        if not isinstance(fields, dict):
            raise ValueError(f"model: {file}: expected a JSON object, found {fields!r:.40}")
        shards = fields.get("weight_map")
        for shard in set(shards.values()) if file.name.endswith(".index.json") and isinstance(shards, dict) else ():
            if Path(str(shard)).name != shard:
                raise ValueError(f"model: {file}: expected files in the same folder, found {shard!r:.80}")
    config = from_json((folder / "config.json").read_bytes(), f"model: {folder}", not_finite=True)
    if "_diffusers_version" in config and "model_type" not in config:
        raise ValueError(f"model: {repo or folder} holds a model of diffusers; {_DIFFUSERS}")
    (labels, _), (layers, _) = _most(config, {"num_labels"}), _most(config, _COUNTING)
    if labels > _LABELS:
        raise ValueError(
            f"model: the config.json of {repo or folder} says num_labels: {labels}; expected at most {_LABELS}, or the "
            "names of the labels in id2label"
        )
    if layers > _LAYERS and repo is not None:
        _fetch_weights(repo, folder.name)
    with naming("model"):
        tensors = sum(len(check_safetensors(file)) for file in sorted(folder.glob("*.safetensors")))
    if layers > max(tensors, _LAYERS):
        raise ValueError(
            f"model: the config.json of {repo or folder} says {layers} layers, whose files hold {tensors} tensors; "
            "take weights and config.json of one model"
        )


def _most(fields: Any, names: Set[str] | None = None) -> tuple[int, str]:
    """The largest whole number of a configuration, or of one within it, that has one of these names, and its name."""
    if not isinstance(fields, dict):
        return 0, ""
    said = ((value, str(name)) for name, value in fields.items() if type(value) is int and name in (names or fields))
    return max([(0, ""), *said, *(_most(value, names) for value in fields.values())])


def _class_of(name: str, config: Any) -> Any:
    """The class of transformers that a configuration names."""
    import transformers

    names = getattr(config, "architectures", None) or ["AutoModel"]
    kind = getattr(transformers, str(names[0]), None)
    known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    if not known and kind is not transformers.AutoModel:
        raise ValueError(
            f"model: transformers has no model {names[0]!r:.60}, which {name} asks for; one of another package is "
            "loaded with it, and merged in Python: nsc_merge.merge(model, adapters)"
        )
    return kind


def _class_of_code(name: str, fields: dict[str, Any], given: dict[str, Any]) -> Any:
    """The class that a ``config.json`` names among those of the code beside it; None if it names none of them."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    wanted = (fields.get("architectures") or [""])[0]
    places = [place for place in fields["auto_map"].values() if isinstance(place, str)]
    place = next((place for place in places if place.rpartition(".")[2] == wanted), None)
    return None if place is None else get_class_from_dynamic_module(place, name, **given)


def outline_of(architecture: Architecture, dtype: str = "auto") -> nn.Module:
    """The model with shapes and dtypes, and no numbers: its tensors are on the meta device.

    Raises:
        ValueError: if no model can be made of its configuration.
    """
    import torch
    from torch import nn

    kind, config = architecture.kind, architecture.config
    try:
        with torch.device("meta"):
            model = kind(config) if isinstance(kind, type) and issubclass(kind, nn.Module) else kind.from_config(config)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise not_made(architecture, error) from None
    own = getattr(config, "dtype", None) or torch.float32
    return model.to(own if dtype == "auto" else getattr(torch, dtype)).eval()


def not_made(architecture: Architecture, error: Exception) -> ValueError:
    """What to raise where no model can be made of a configuration, whose numbers reach torch as they are: naming the
    largest, if none in use is as large.
    """
    (number, key), why = _most(architecture.config.to_dict()), " ".join(str(error).split())
    large = f" ({key}: {number})" if number > _LARGE else ""
    kind, name = architecture.kind.__name__, architecture.name
    return ValueError(f"model: no {kind} can be made of the config.json of {name}{large}: {why:.200}")
