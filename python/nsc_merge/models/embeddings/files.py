"""What sentence-transformers saves beside a model that embeds texts: what is behind it, and the prompts of texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nsc_merge.models.embeddings.modules import MODES, SIMILARITIES, Dense, Modules, Pooling, normalise
from nsc_merge.utils.errors import hub_problem
from nsc_merge.utils.json_text import from_json
from nsc_merge.utils.safetensors_checks import read_safetensors

MODULES, SETTINGS = "modules.json", "config_sentence_transformers.json"
# Of the model itself; releases call the file for what it was made from.
_OF_MODEL = ("sentence_bert_config.json", "sentence_roberta_config.json", "sentence_xlnet_config.json")
_EMBEDDING = "sentence_embedding"
# How releases before 5 call what is pooled: pooling_mode_cls_token, pooling_mode_mean_tokens, pooling_mode_lasttoken.
_ENDS = ("", "_token", "_tokens")
_ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid")
# Longer than any model reads: tokenizers write 1e30 where nobody has said.
_UNLIMITED = 10**9

Find = Callable[[str], Path | None]


def in_folder(folder: Path) -> Find:
    """Finds files in a folder."""
    return lambda name: file if (file := folder / name).is_file() else None


def on_hub(name: str, revision: str | None, key: str, subfolder: str | None = None) -> Find:
    """Finds files of a repository on the hub, which are fetched into the cache."""

    def find(file: str) -> Path | None:
        from transformers.utils import cached_file

        try:
            found = cached_file(
                name, file, revision=revision, subfolder=subfolder or "", _raise_exceptions_for_missing_entries=False
            )
        except (OSError, ValueError) as error:
            raise ValueError(hub_problem(error, key, name, revision) or f"{key}: {error}") from None
        return None if found is None else Path(found)

    return find


@dataclass(frozen=True)
class Texts:
    """What texts are for a model that embeds them.

    Attributes:
        prompts: name -> what stands in front of texts of a kind, such as ``query`` and ``document``.
        default: what stands in front of all others.
        longest: tokens at which they are cut; None where nobody has said.
    """

    prompts: Mapping[str, str]
    default: str = ""
    longest: int | None = None


def texts_of(find: Find, where: str) -> Texts | None:
    """What the files beside a model say of texts that it embeds; None of a model that embeds none.

    Raises:
        ValueError: naming ``where`` and a file that is broken.
    """
    # First, as most models have none, and on the hub every file is a question.
    if find(MODULES) is None:
        return None
    settings = _json(find, SETTINGS, where) or {}
    if settings.get("model_type") not in (None, "SentenceTransformer"):
        return None
    held = settings.get("prompts") or {}
    prompts = {name: text for name, text in held.items() if isinstance(text, str) and text}
    return Texts(prompts, prompts.get(settings.get("default_prompt_name") or "", ""), _longest(find, where))


def modules_of(model: nn.Module) -> Modules | None:
    """What is behind a model that was loaded from a folder, by the files there; None where there is no
    ``modules.json``, and of others.

    Raises:
        ValueError: as :func:`read_modules`.
    """
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    listed = Path(name) / MODULES
    return _read_once(name, listed.stat().st_mtime_ns) if name and listed.is_file() else None


@lru_cache(maxsize=4)
def _read_once(folder: str, changed: int) -> Modules | None:
    """For every batch of a merge, as long as nothing ``changed``."""
    return read_modules(in_folder(Path(folder)), f"model: {folder}")


def read_modules(find: Find, where: str) -> Modules | None:
    """What the files beside a model say is behind it; None where there is no ``modules.json``.

    Args:
        find: a file by its path within the model's folder.
        where: how messages call the folder.

    Raises:
        ValueError: naming ``where`` and what is not known here, with the way out.
    """
    listed = _json(find, MODULES, where)
    if listed is None:
        return None
    named = [(str(one.get("path")), str(one.get("type")).rpartition(".")[2]) for one in listed if isinstance(one, dict)]
    kinds = [kind for _, kind in named]
    if kinds[:2] != ["Transformer", "Pooling"]:
        raise _unknown(where, MODULES, f"modules {kinds}", "a Transformer and a Pooling at first")
    pooling = _pooling(_json(find, f"{named[1][0]}/config.json", where) or {}, f"{where}: {named[1][0]}/config.json")
    steps: list[Callable[[Tensor], Tensor]] = []
    for path, kind in named[2:]:
        if kind == "Dense":
            steps.append(_dense(find, path, where))
        elif kind == "Normalize":
            steps.append(normalise)
        elif kind != "Dropout":
            raise _unknown(where, MODULES, f"a module {kind}", "Dense and Normalize behind Pooling")
    for name in _OF_MODEL:
        if (_json(find, name, where) or {}).get("do_lower_case"):
            raise _unknown(where, name, "do_lower_case true", "a tokenizer that does it")
    settings = _json(find, SETTINGS, where) or {}
    similarity = settings.get("similarity_fn_name") or "cosine"
    if similarity not in SIMILARITIES:
        raise _unknown(where, SETTINGS, f"similarity_fn_name {similarity!r}", f"one of {list(SIMILARITIES)}")
    return Modules(pooling, steps, similarity, _longest(find, where))


def _pooling(config: Mapping[str, Any], where: str) -> Pooling:
    if config.get("include_prompt") is False:
        raise _unknown(where, "include_prompt", "false", "prompts that are part of the embedding")
    modes = config.get("pooling_mode")
    if modes is None:
        # Releases before 5 have a key for each.
        modes = [mode for mode in MODES if any(config.get(f"pooling_mode_{mode}{end}") for end in _ENDS)]
        modes = modes or ["mean"]
    modes = modes if isinstance(modes, list) else [modes]
    if not all(mode in MODES for mode in modes):
        raise _unknown(where, "pooling_mode", f"{modes}", f"some of {list(MODES)}")
    return Pooling(tuple(modes))


def _dense(find: Find, path: str, where: str) -> Dense:
    config = _json(find, f"{path}/config.json", where) or {}
    activation = str(config.get("activation_function", "Tanh")).rpartition(".")[2]
    if activation not in _ACTIVATIONS:
        raise _unknown(where, f"{path}/config.json", f"activation {activation}", f"one of {list(_ACTIVATIONS)}")
    places = ("module_input_name", "module_output_name")
    others = [name for name in places if config.get(name) not in (None, _EMBEDDING)]
    if config.get("use_residual") or others:
        found = f"{others[0]} {config[others[0]]!r}" if others else "use_residual"
        raise _unknown(where, f"{path}/config.json", found, "a layer of embeddings alone")
    file = find(f"{path}/model.safetensors")
    if file is None:
        raise ValueError(
            f"{where}: {path} has no model.safetensors, and pickled weights are never opened; save it anew with "
            "SentenceTransformer's save_pretrained"
        )
    held = read_safetensors(file)
    return Dense(held["linear.weight"], held.get("linear.bias"), activation)


def _longest(find: Find, where: str) -> int | None:
    for name in (*_OF_MODEL, "tokenizer_config.json"):
        told = _json(find, name, where) or {}
        for key in ("max_seq_length", "model_max_length"):
            if isinstance(told.get(key), int) and told[key] < _UNLIMITED:
                return int(told[key])
    return None


def _json(find: Find, name: str, where: str) -> Any:
    file = find(name)
    return None if file is None else from_json(file.read_bytes(), f"{where}: {name}", not_finite=True)


def _unknown(where: str, file: str, found: str, expected: str) -> ValueError:
    return ValueError(
        f"{where}: {file}: expected {expected}, found {found}; measure such a merge with sentence-transformers' own "
        "evaluators, which load merged/model"
    )
