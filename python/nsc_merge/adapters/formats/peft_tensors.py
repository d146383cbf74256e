"""What every tensor in PEFT's file is: LoRA, trained in full, rows of tokens, LoRA on parameters, or the base's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from nsc_merge.adapters.adapter import TokenRows
from nsc_merge.adapters.formats.parameter_stacks import FACTORS, stacks_of
from nsc_merge.adapters.peft_config import (
    Scalings,
    check_targets,
    is_announced,
    is_within,
    owns_parameter,
    token_indices,
)
from nsc_merge.adapters.peft_keys import PREFIX
from nsc_merge.adapters.peft_models import Held, refuse_attention

_KEY = re.compile(r"(?P<path>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_magnitude_vector)")
# LoRA on an embedding, whose weight [V, d] it is the update of: transposed, and of no ".weight".
_EMBEDDED = re.compile(r"(?P<path>.+)\.lora_embedding_(?P<part>[AB])")
_ROWS = re.compile(r"(?P<path>.+)\.token_adapter\.trainable_tokens_delta")
# PEFT's copies in a state dict of a module that was trained in full, which its files hold under the module's name, and
# beside that where it is an embedding or head that was resized.
_COPY = re.compile(r"(?P<path>.+)\.(?P<kind>modules_to_save|original_module)\.(?P<parameter>.+)")
# What PEFT saves of the base beside LoRA, or rows of tokens, on embeddings or a language model's head, or where these
# were resized.
_BASE_LAYER = re.compile(r"(?P<path>.+?)(\.token_adapter)?\.base_layer\.(?P<parameter>weight|bias)")
# LoRA on what nn.MultiheadAttention has as a module, under PEFT's wrapper of it all.
_OUT_PROJ = ".base_layer.out_proj"
# Of Tinker: a head, and the factors of all experts in one tensor of three dimensions.
_TINKER = re.compile(r".+\.(unembed_tokens|experts\.w[123])")
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|lm_head)(\.|$)")


def sorted_tensors(
    name: str, config: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> tuple[Held, dict[str, Tensor]]:
    """What the tensors of PEFT's file are, and those of them that are the base model's.

    The base's own are embeddings and heads, which have other names in every family: any matrix under a plain name, and
    the bias beside it, is taken for that, and compared with the model's where the adapter is fitted to one.

    Args:
        name: of the task, for messages.
        config: as in ``adapter_config.json``.
        weights: PEFT's keys -> tensors.

    Raises:
        ValueError: if a tensor is left over or missing, or if a shape disagrees with the configuration.
    """
    held = Held({}, {}, {}, {}, {}, set())
    base_weights: dict[str, Tensor] = {}
    of_parameters: dict[str, dict[str, Tensor]] = {}
    originals: dict[str, str] = {}
    left_over = []
    whole = tuple(config.get("modules_to_save") or ())
    for key, value in weights.items():
        path = key.removeprefix(PREFIX)
        match = _KEY.fullmatch(path)
        if path == key:
            left_over.append(key)
        elif config.get("velora_config") and path.endswith(".lora_velora_embed"):
            # What VeLoRA keeps inputs by until the backward; its forward is LoRA's.
            continue
        elif copy := _COPY.fullmatch(path):
            own = f"{copy['path']}.{copy['parameter']}"
            if copy["kind"] == "original_module":
                originals[own] = key
            elif not _is_same(value, weights.get(f"{PREFIX}{own}")):
                left_over.append(key)
        elif match and _TINKER.fullmatch(match["path"]):
            raise ValueError(
                f"adapters[{name!r}]: {match['path']} is a name of Tinker's; tinker_cookbook.weights."
                "build_lora_adapter(base_model=BASE, adapter_path=FOLDER, output_path=NEW) writes PEFT's format"
            )
        elif match and match["part"] in FACTORS and owns_parameter(config, match["path"]):
            of_parameters.setdefault(match["path"], {})[match["part"]] = value
        elif match and is_announced(match["part"], config):
            # Of a convolution, the dimensions of the kernel belong to the inputs of lora_A, and are ones in lora_B.
            flat = value.flatten(1) if value.dim() > 2 else value
            held.parts.setdefault(match["path"], {})[match["part"]] = flat
        elif not match and is_within(path, whole):
            held.trained[path] = value
        elif embedded := _EMBEDDED.fullmatch(path):
            if config.get("use_dora"):
                refuse_dora_on(name, embedded["path"], "an embedding")
            part = "lora_B.weight" if embedded["part"] == "A" else "lora_A.weight"
            held.parts.setdefault(embedded["path"], {})[part] = value.t().contiguous()
            held.embeddings.add(embedded["path"])
        elif rows := _ROWS.fullmatch(path):
            if indices := token_indices(config, rows["path"]):
                held.token_rows[rows["path"]] = TokenRows(indices, value)
            # A weight that is tied to one with rows has the same, and is saved with the base's.
            elif not any(_is_same(value, weights[other]) for other in _announced_rows(config, weights)):
                left_over.append(key)
        elif base := _BASE_LAYER.fullmatch(path):
            base_weights[f"{base['path']}.{base['parameter']}"] = value
        elif _is_of_a_matrix(key, weights):
            base_weights[path] = value
        else:
            left_over.append(key)
    for path in held.parts:
        # Beside LoRA on the module, which is that on its in_proj_weight.
        owner = path.removesuffix(_OUT_PROJ)
        if owner != path and owner in held.parts:
            refuse_attention(f"adapters[{name!r}]: {owner}")
    tied: set[str] = set()
    if config.get("ensure_weight_tying"):
        # PEFT saves what it trained as one with an embedding under every name, and adds those names as it loads.
        trained = list(held.trained.values())
        for path in [path for path, value in base_weights.items() if any(_is_same(value, one) for one in trained)]:
            held.trained[path] = base_weights.pop(path)
        tied = _tied_paths(held)
    for path, key in originals.items():
        if path in held.trained:
            base_weights[path] = weights[key]
        else:
            left_over.append(key)
    if left_over:
        raise ValueError(
            f"adapters[{name!r}]: {len(left_over)} of {len(weights)} tensors would be ignored, so nothing "
            f"is loaded: {_listed(left_over)}. Expected {PREFIX}<module>.lora_A.weight and .lora_B.weight, "
            f"and modules_to_save {list(whole)}, as PEFT's save_pretrained writes them"
        )
    check_targets(name, config, [path for path in held.parts if path not in tied])
    held.scalings.update(_scaled(name, config, held.parts))
    held.stacks.update(stacks_of(name, config, of_parameters))
    return held, base_weights


def _announced_rows(config: Mapping[str, Any], weights: Iterable[str]) -> list[str]:
    found = ((key, _ROWS.fullmatch(key.removeprefix(PREFIX))) for key in weights)
    return [key for key, rows in found if rows and token_indices(config, rows["path"])]


def _is_of_a_matrix(key: str, weights: Mapping[str, Tensor]) -> bool:
    """Whether a tensor is a matrix called weight, or a bias beside one, and none of LoRA."""
    path, _, parameter = key.rpartition(".")
    matrix = weights.get(f"{path}.weight")
    return "lora_" not in path and parameter in ("weight", "bias") and matrix is not None and matrix.dim() == 2


def _tied_paths(held: Held) -> set[str]:
    """Paths of embeddings and of heads that may be tied to them: PEFT gives these their embedding's factors."""
    factors = [(parts.get("lora_A.weight"), parts.get("lora_B.weight")) for parts in held.parts.values()]
    found = set()
    for path, parts in held.parts.items():
        own = parts.get("lora_A.weight"), parts.get("lora_B.weight")
        twins = [one for one in factors if all(map(_is_same, own, one))]
        if _EMBEDDING.search(path) or len(twins) > 1:
            found.add(path)
    return found


def _is_same(value: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are equal; of those on the meta device, shapes are all there is."""
    if value is None or other is None or value.shape != other.shape:
        return False
    return value.is_meta or other.is_meta or torch.equal(value, other)


def _scaled(name: str, config: Mapping[str, Any], held: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
    """The scaling of every module, once its tensors are those that the configuration announces."""
    needed = {"lora_A.weight", "lora_B.weight"}
    needed |= {"lora_B.bias"} if config.get("lora_bias") else set()
    needed |= {"lora_magnitude_vector"} if config.get("use_dora") else set()
    settings = Scalings(name, config)
    scalings = {}
    for path, parts in held.items():
        if set(parts) != needed:
            found = ", ".join(sorted(part.removesuffix(".weight") for part in parts))
            raise ValueError(f"adapters[{name!r}]: {path} has {found} only; expected {', '.join(sorted(needed))}")
        rank, scalings[path] = settings.of(path)
        A, B = parts["lora_A.weight"], parts["lora_B.weight"]
        if A.shape[:1] != (rank,) or B.shape[1:] != (rank,):
            cause = ""
            if A.shape[:1] == (rank,):
                cause = "; LoRA on a convolution in several groups is not merged, nor by PEFT"
            if not A.numel() or not B.numel():
                cause = (
                    "; DeepSpeed's ZeRO-3 leaves empty tensors where weights are not gathered as they are saved: save "
                    "the adapter again with stage3_gather_16bit_weights_on_model_save"
                )
            raise ValueError(
                f"adapters[{name!r}]: {path}: expected lora_A [{rank}, d_in] and lora_B [d_out, {rank}] by the "
                f"configuration (r, rank_pattern), found {list(A.shape)} and {list(B.shape)}{cause}"
            )
    return scalings


def refuse_dora_on(name: str, path: str, what: str) -> NoReturn:
    raise ValueError(
        f"adapters[{name!r}]: {path}: DoRA on {what} is not merged, expected it on linears; train with "
        "use_dora=False, or leave this task out of the merge"
    )


def _listed(names: list[str], limit: int = 5) -> str:
    shown = ", ".join(sorted(names)[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
