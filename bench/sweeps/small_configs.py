"""Small configurations of any model type of transformers, from its default one: two layers, a vocabulary of 200.

The values are found by the names of the fields, which the model types share to a large part; what a type asks for
beyond that is in :mod:`bench.sweeps.own_text` and :mod:`bench.sweeps.own_media`. Every kind of layer that a type has
stays.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from bench.sweeps import own_media, own_text

VOCABULARY = 200
WIDTH, HEADS, HEAD = 64, 4, 16
# What is made smaller: all; the depth, the experts and the vocabulary; nothing but what the type asks for.
CUTS = ("all", "depth", "none")

# Patterns of whole names, the first that fits, and the value.
SIZES: tuple[tuple[str, int], ...] = (
    (r"(max_|num_)?(n_)?(routed|local|text_|vision_)?_?(num_)?experts|num_local_experts|moe_num_experts|n_experts", 4),
    (r"num_experts_per_tok|moe_topk|moe_k|top_?k(_experts)?|experts_top_k|num_selected_experts|top_k_experts", 2),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"(n|num)_shared_experts|moe_num_shared_experts", 1),
    (r"qk_rope_head_dim|qk_nope_head_dim|index_head_dim|rotary_dim", 8),
    (r"(.*_)?(kv_lora_rank|q_lora_rank|o_lora_rank)", 16),
    (r"((global|swa|linear(_key|_value)?|attention|mamba|v|qk|kda)_)?(head_dim|dim_head|d_head)", HEAD),
    (r"kv_channels|d_kv", HEAD),
    (r"((encoder|decoder|text|audio|vision)_)?(num_)?(hidden_)?layers|n_layers?|depth", 2),
    (r"num_(encoder|decoder)_layers", 2),
    (r"(.*_)?(intermediate_size|ffn_(hidden_)?(size|dim)|mlp_dim)|d_ff|n_inner", 96),
    (r"(.*_)?(hidden_size|hidden_dim|d_model|n_embd|embedding_size|embed_dim|emb_dim|model_dim)", WIDTH),
    (r"(.*_)?(projection_dim|out_hidden_size|output_dim|embedding_dim|lru_width|word_embed_proj_dim)", WIDTH),
    (r"dim|attention_hidden_size|d_embed", WIDTH),
    (r"vocab_size(_per_layer_input)?|.*_vocab_size", VOCABULARY),
)
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers", "decoder_layers")
_TOKEN = re.compile(r".*(token_id|token_index|_id|_token)$")


def small(config: Any, cut: str = "all") -> dict[str, Any]:
    """Keywords for the class of a configuration that make its model small.

    Args:
        config: a configuration of transformers with its default values.
        cut: one of :data:`CUTS`.
    """
    parts = {name for name in getattr(config, "sub_configs", {}) if getattr(config, name, None) is not None}
    own = OWN.get(config.model_type, {})
    found = _smaller_values(config, cut == "all") if cut != "none" else {}
    found.update({name: _of_part(getattr(config, name), cut) for name in parts})
    return {**found, **{name: {**found[name], **own[name]} if name in parts else own[name] for name in own}}


def _smaller_values(config: Any, narrow: bool) -> dict[str, Any]:
    found = {**_of_layers(config), **_of_tokens(config)}
    for name, value in vars(config).items():
        if name.startswith("_") or name in found or isinstance(value, bool):
            continue
        if isinstance(value, int) and value:
            smaller = _smaller(name, value, config)
            if smaller is not None and (narrow or smaller not in (WIDTH, 16, 8, 96, HEADS) or "expert" in name):
                found[name] = smaller
        elif name == "depths":
            found[name] = [min(depth, 2) for depth in value]
        elif name == "rope_parameters" and isinstance(value, Mapping) and narrow:
            found[name] = _rope(value)
    if "qk_rope_head_dim" in found and "head_dim" in found:  # of latent attention the rotated part
        found["head_dim"] = found["qk_rope_head_dim"]
    return found


def _of_part(part: Any, cut: str) -> dict[str, Any]:
    """Of a part as it is also what the model around it sets otherwise than the part's own configuration does."""
    return {**(part.to_dict() if cut == "none" else {"model_type": part.model_type}), **small(part, cut)}


def _smaller(name: str, value: int, config: Any) -> int | None:
    if re.fullmatch(r"(.*_)?(num_)?(attention_)?(heads|n_head|n_heads|num_head)", name):
        return min(value, HEADS)
    if re.fullmatch(r"(.*_)?num_(key_value|kv)_heads|n_head_kv|num_query_groups|num_key_value_groups", name):
        heads = getattr(config, "num_attention_heads", value)
        return HEADS if value == heads else min(value, HEADS // 2)
    for pattern, smaller in SIZES:
        if re.fullmatch(pattern, name):
            return min(value, smaller)
    return None


def _rope(value: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary sections for heads of 16; by kind of layer, where there are several."""
    rope = {key: _rope(one) if isinstance(one, Mapping) else one for key, one in value.items()}
    for key in ("mrope_section", "xdrope_section"):
        if isinstance(rope.get(key), (list, tuple)):
            rope[key] = {2: [4, 4], 3: [2, 3, 3], 4: [2, 2, 2, 2]}[len(rope[key])]
    return rope


def _of_layers(config: Any) -> dict[str, Any]:
    """One layer of every kind, and two at least: lists with a value for each layer are cut alike."""
    name = next((one for one in LAYERS if isinstance(getattr(config, one, None), int)), None)
    if name is None:
        return {}
    count = getattr(config, name)
    lists = {
        key: list(value)
        for key, value in vars(config).items()
        if isinstance(value, (list, tuple)) and len(value) == count > 4 and not key.startswith("_")
    }
    kinds = {key: value for key, value in lists.items() if key.endswith("types")}
    chosen: dict[tuple[Any, ...], int] = {}
    for layer in range(count):
        chosen.setdefault(tuple(value[layer] for value in kinds.values()), layer)
    layers = sorted(chosen.values())
    if len(layers) == 1:
        layers = [0, 1]
    cut = {key: [value[layer] for layer in layers] for key, value in lists.items()}
    return {name: len(layers), **cut} if kinds else {key: value[:2] for key, value in lists.items()}


def _of_tokens(config: Any) -> dict[str, Any]:
    """Tokens of their own for everything that has one, within the vocabulary."""
    places = {
        name: value
        for name, value in vars(config).items()
        if _TOKEN.fullmatch(name) and type(value) is int and value >= VOCABULARY - 50
    }
    return {name: VOCABULARY - 1 - number for number, name in enumerate(sorted(places))}


OWN: dict[str, dict[str, Any]] = {**own_text.VALUES, **own_media.VALUES}
