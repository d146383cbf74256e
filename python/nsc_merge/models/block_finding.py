"""What is found from a model itself of what :class:`nsc_merge.models.families.Family` says of one."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from nsc_merge.models.traits import (
    arguments,
    asked,
    generates,
    has_two_towers,
    has_vision_and_text,
    is_causal,
    main_input,
    needed,
)

# Names of what is measured, best first: a projection of values alone, one of queries, keys and values in one weight,
# and what leaves the attention.
VALUES: tuple[str, ...] = ("v_proj", "value", "v", "value_proj", "v_lin", "to_v", "to_value", "v_head", "linear_v")
VALUES += ("Wv", "projection_value", "v_proj_current", "self_attn_value_proj")
PACKED: tuple[str, ...] = ("qkv_proj", "query_key_value", "qkv", "Wqkv", "c_attn", "in_proj", "qkv_projection")
# With keys alone those of latent attention, as DeepSeek's.
PACKED += ("to_qkv", "to_qkv_mlp_proj", "queries_keys_values", "kv_b_proj", "kv_a_proj_with_mqa", "kv_proj")
OUTPUTS = ("o_proj", "out_proj", "o", "dense", "c_proj", "Wo", "proj")
# What chooses experts has a projection, too, as Gemma 4's.
_ROUTES = re.compile(r"(?i)rout")
# Attention over another sequence: its values are of the encoder's positions, and not of the adapted blocks. diffusers'
# second of a block is one to the prompt, unless it says otherwise; what is of the sound beside a video is called so, as
# are X-CLIP's messages between frames.
_CROSS = re.compile(r"(?i)cross|encoder_attn|encoder_decoder_att|EncDecAttention|\battn2\b|\baudio_|_to_audio_|message")
# How transformers' models of sound make a mask of their frames from one of the samples that they read.
REDUCES = "_get_feature_vector_attention_mask"
_TOWERS = ("vision_tower", "visual", "vision_model", "vision_encoder", "video_model", "audio_model")


def described(model: nn.Module, adapted: Collection[str] | None = None) -> dict[str, Any] | None:
    """Fields of a family by name; None if no list of blocks holds a linear that counts.

    The blocks are the longest ``nn.ModuleList`` of modules of one class, or of transformers' layers, which in Jamba are
    of two, that holds adapted linears and is in no other such list: the stages of Swin rather than the blocks within,
    the blocks of Mixtral rather than their experts; lists of projections, of one linear each, where there are no others
    (HiDream has one of the prompt for every block). Where there is none, the longest such ``nn.Sequential``, which is
    what timm and torchvision make of blocks. Lists of what the model calls its decoder (``get_decoder()``) go first, so
    that a vision tower or an encoder is measured where nothing behind it is adapted. Of two towers side by side, as in
    CLIP, both are, if they are equally deep.

    Measured is, by its path within a block, the last projection of values in it that does not attend to another
    sequence (:data:`VALUES`); else one of queries, keys and values (:data:`PACKED`), the output of the attention
    (:data:`OUTPUTS`), or whatever is adapted, the last first.

    Args:
        model: any model; of one that is not of transformers, blocks are found, but neither tokens nor images, and what
            is padding says the input attention_mask, where batches have one.
        adapted: paths of the linears that carry an adapter; all linears when None.
    """
    counted = [path for path, module in model.named_modules() if _is_linear(module)]
    counted = counted if adapted is None else [path for path in counted if path in set(adapted)]
    # A list of one is some other part where there are longer ones; ALBERT has all its blocks in one.
    lists = (
        _block_lists(model, counted, nn.ModuleList, 2)
        or _block_lists(model, counted, nn.Sequential, 2)
        or _block_lists(model, counted, nn.ModuleList, 1)
    )
    if not lists:
        return None
    config: Any = getattr(model, "config", None)
    towers = has_two_towers(config) and not generates(model, config)
    # What the model calls its decoder, if that is a part of it.
    decoder = "" if towers else _beneath(model, asked(model, "get_decoder"))
    inside = {path: size for path, size in lists.items() if decoder and path.startswith(decoder)}
    lists = inside or lists
    lists = {path: size for path, size in lists.items() if not _projects(model.get_submodule(path))} or lists
    if towers:
        # Text and images in models beside each other, of whatever depth, with a head behind them as in OWL-ViT or not.
        above = _beneath(model, getattr(model, "base_model", model))
        tops = itertools.groupby(lists, lambda path: path.removeprefix(above).partition(".")[0])
        inner = {top: _longest({path: lists[path] for path in group})[-1] for top, group in tops}
        # What lies between the two, as in X-CLIP, is neither.
        chosen = [path for top, path in inner.items() if top in _TOWERS or "text" in top] or list(inner.values())
    else:
        # Of several as long as each other, the decoder's comes last, and a UNet's convolutions behind its attention.
        longest = _longest(lists)
        chosen = ([path for path in longest if _attends(model, path, counted)] or longest)[-1:]
    called = _called(model.get_submodule(chosen[0]))
    block = rf"^(?:{'|'.join(map(re.escape, chosen))})\.{re.escape(called or '')}(\d+)\."
    return {
        "name": f"found in {type(model).__name__}",
        "model_types": (),
        "block": block,
        "score_modules": _scored(model, block, counted),
        **_inputs(model, config, chosen[0]),
    }


def blocks_of(model: nn.Module, block: str) -> dict[str, nn.Module]:
    """Path -> block, where ``block`` finds the number at the end of the path; see
    :class:`nsc_merge.models.families.Family`.
    """
    pattern = re.compile(block)
    found = {}
    for path, module in model.named_modules():
        match = pattern.search(f"{path}.")
        if match is not None and match.end() == len(path) + 1:
            found[path] = module
    return found


def _longest(lists: Mapping[str, int]) -> list[str]:
    return [path for path, size in lists.items() if size == max(lists.values())]


def _projects(blocks: nn.Module) -> bool:
    """Whether each of a list holds one linear alone."""
    return all(sum(map(_is_linear, one.modules())) == 1 for one in blocks.children())


def _attends(model: nn.Module, blocks: str, counted: Collection[str]) -> bool:
    """Whether blocks have an attention to their own sequence; Idefics has a list of blocks that read images alone."""
    inside = (path for path in counted if path.startswith(f"{blocks}."))
    own = (_role(path) for path in inside if not _crosses(model, path, path.removeprefix(f"{blocks}.")))
    return any(name in (*VALUES, *PACKED, *OUTPUTS) for name in own)


def _role(path: str) -> str:
    """What a linear is called, or the module that is around it alone, as LeViT's and Moshi's are."""
    *_, above, name = ("", *path.split("."))
    return above if name == "linear" else name


def _is_linear(module: nn.Module) -> bool:
    # Of transformers' Conv1D, which is a linear with its weight transposed, the sizes are nx and nf.
    return hasattr(module, "in_features") or (hasattr(module, "nx") and hasattr(module, "nf"))


def _block_lists(
    model: nn.Module, counted: Collection[str], kind: type[nn.ModuleList] | type[nn.Sequential], least: int
) -> dict[str, int]:
    """Path of every outermost list of ``least`` blocks or more that holds a linear that counts -> how many it has."""
    found: dict[str, int] = {}
    for path, module in model.named_modules():
        # A model that is one itself has no path to find a block by.
        if not path or not isinstance(module, kind) or len(module) < least or (called := _called(module)) is None:
            continue
        alike = len({type(one) for one in module}) == 1 or all(map(_is_layer, module))
        if not alike or any(path.startswith(f"{outer}.") for outer in found):
            continue
        # A linear in the list itself is no block.
        if any(re.match(rf"{re.escape(path)}\.{re.escape(called)}\d+\.", name) for name in counted):
            found[path] = len(module)
    return found


def _called(blocks: nn.Module) -> str | None:
    """What comes before the number in the name of every block of a list; torchvision's ViT has ``encoder_layer_0``."""
    found = [re.fullmatch(r"(.*?)(\d+)", name) for name in blocks._modules]
    names = {match[1] if match else None for match in found}
    return names.pop() if len(names) == 1 else None


def _is_layer(module: nn.Module) -> bool:
    """Whether transformers takes it for a layer, whatever is in it."""
    return any(kind.__name__ == "GradientCheckpointingLayer" for kind in type(module).__mro__)


def _scored(model: nn.Module, block: str, counted: Collection[str]) -> tuple[str, ...]:
    """Paths within a block of the linears to measure, in order of preference."""
    pattern = re.compile(block)
    within = {path[match.end() :]: path for path in counted if (match := pattern.search(path))}
    own = [name for name in reversed(within) if not _crosses(model, within[name], name)] or list(reversed(within))
    ranked: dict[str, None] = {}
    for names in (VALUES, PACKED, OUTPUTS):
        ranked.update(dict.fromkeys(path for path in own if _role(path) in names and not _ROUTES.search(path)))
    ranked.update(dict.fromkeys(own))
    return tuple(ranked)


def _crosses(model: nn.Module, path: str, name: str) -> bool:
    """Whether a linear is of an attention to another sequence, as that says itself, or else its name in the block."""
    above = itertools.accumulate(path.split("."), "{}.{}".format)
    told = [getattr(model.get_submodule(one), "is_cross_attention", None) for one in above]
    return next((one for one in reversed(told) if isinstance(one, bool)), _CROSS.search(name) is not None)


def _inputs(model: nn.Module, config: Any, blocks: str) -> dict[str, Any]:
    """What the inputs of the blocks at ``blocks`` are called."""
    main = main_input(model) if config is not None else None
    taken = arguments(model) if config is not None else []
    trunk = getattr(model, "base_model", model)
    tower = next((name for name in _TOWERS if isinstance(getattr(trunk, name, None), nn.Module)), None)
    # Where the trunk takes other inputs than the model, as the encoder of DINOv3 and the decoder of SpeechT5 do, or
    # needs more of them, as TimesFM's does, the model has no head.
    reads = {*arguments(trunk)}
    alone = main is None or ({main, *({"decoder_input_ids"} & {*taken})} <= reads and needed(trunk) <= {*taken, main})
    # What retrieves answers by embeddings, and ColQwen2 changes what it hands its trunk.
    prefill = "base_model" if alone and "ForRetrieval" not in type(model).__name__ else ""
    if trunk is model:
        prefill = _model_within(model) or prefill
    if has_two_towers(config) and not generates(model, config):
        mask = "attention_mask" if "attention_mask" in taken else None
        unmasked = tower and f"{_beneath(model, trunk)}{tower}"
        return {"recipe": "vision", "prefill": prefill, "causal": False, "mask": mask, "unmasked": unmasked}
    sees = main == "pixel_values" and "input_ids" not in taken
    # Of a text, behind an encoder of images too; not of queries, as DETR's.
    decoder = asked(model, "get_decoder")
    # DiffusionGemma's writes a canvas beside the text, and is no decoder by its configuration.
    writes = getattr(config, "is_encoder_decoder", False)
    canvas = not writes and decoder not in (None, model, trunk) and "decoder_input_ids" in arguments(decoder)
    if (writes or canvas) and not (sees and "decoder_input_ids" not in taken):
        decodes = re.search(r"(^|[._])decoder\.", f"{blocks}.") is not None
        prefix = "decoder_" if decodes else ""
        tokens, mask = f"{prefix}input_ids", f"{prefix}attention_mask"
        return {
            "recipe": "vision" if sees and not decodes else "llm",
            "prefill": prefill,
            "causal": decodes and writes,
            "tokens": tokens if tokens in taken else None,
            "mask": mask if mask in taken else None,
        }
    if sees:
        return {"recipe": "vision", "prefill": prefill, "causal": False}
    if "input_ids" not in taken:
        # What is not of transformers, or only around something of it, is asked nothing; the batches say.
        heard = "attention_mask" in taken and any(hasattr(module, REDUCES) for module in model.modules())
        mask = "attention_mask" if heard or main is None else None
        return {
            "recipe": "llm" if main == "input_features" else "vision",
            "prefill": prefill,
            "causal": False,
            "mask": mask,
        }
    seen = tower or has_vision_and_text(config)
    images = tuple(name for name in taken if re.match(r"(pixel|image|video)_", name)) if seen else ()
    return {
        "recipe": "vlm" if images else "llm",
        "prefill": prefill,
        "causal": is_causal(model, config),
        "frozen_prefix": tower if images and not f"{blocks}.".startswith(f"{tower}.") else None,
        "tokens": "input_ids",
        "mask": "attention_mask" if "attention_mask" in taken else None,
        "images": images,
    }


def trunk_of(model: nn.Module, name: str = "base_model") -> nn.Module:
    """What a model has in front of its head, which it keeps at ``name``, or the model where it has none. Of those that
    name no trunk it is their backbone, as UperNet's, or the one model within, as of CLIP's classifiers of images.
    """
    trunk: nn.Module = getattr(model, name, model)
    within = _model_within(model) if trunk is model else None
    return trunk if within is None else getattr(model, within)


def _model_within(model: nn.Module) -> str | None:
    """Name of what a model answers by: a backbone, or the one model that it is around, if that takes what it does and
    is most of it, which the detector in front of LightGlue is not. Those for retrieval answer by embeddings of their
    own.
    """
    if not re.search(r"For(?!Retrieval)[A-Z]", type(model).__name__):
        return None
    if isinstance(getattr(model, "backbone", None), nn.Module):
        return "backbone"
    models = {name: part for name, part in model.named_children() if hasattr(part, "main_input_name")}
    main = main_input(model)
    found = [name for name, part in models.items() if main in arguments(part) and 2 * _size(part) > _size(model)]
    return found[0] if len(models) == len(found) == 1 else None


def _size(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


def _beneath(model: nn.Module, part: nn.Module | None) -> str:
    """What paths of what is in a part of the model begin with."""
    return next((f"{path}." for path, module in model.named_modules() if path and module is part), "")
