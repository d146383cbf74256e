"""What LoRAX takes, as ``lorax_server/adapters/lora.py`` and ``utils/punica.py`` of May 2026 have it.

All layers of one kind of linear are put on top of each other, with ranks padded to what its kernels take; where one
layer has no LoRA, none of that kind is served. The scaling is ``lora_alpha / r``, and ``r`` is overwritten by the
padded rank of every kind of linear as it is loaded: what is loaded after it is scaled by that. The adapter's ``r`` and
all ranks must therefore be one that needs no padding.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from nsc_merge.results.beside.serving.outline import (
    AS_A_MODEL,
    LEFT_OUT,
    REFUSED,
    UNSURE,
    WRONG,
    Outline,
    Problem,
    changed_bases,
    first_of,
    place_of,
)

PAD = "write it with one rank: python -m nsc_merge.integrations.serving FOLDER --server lorax --write OUT"
# Kinds of linears, in the order in which they are loaded.
LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
_HEAD = "lm_head"
_DECODERS = ("llama", "mistral", "qwen2", "gemma", "gemma2", "granite", "cohere", "solar")
_WITHOUT_HEAD = ("gemma", "gemma2", "solar")
# Other models for which it has adapters, under names of their own.
_OTHERS = ("bloom", "dbrx", "gpt2", "gpt_neox", "mixtral", "mllama", "phi", "phi3", "phi-msft", "qwen")
_SMALLEST, _BLOCK = 8, 16


def padded(rank: int, shards: int = 1) -> int:
    """What its kernels make of a rank, on that many GPUs."""
    return _SMALLEST * shards if rank <= _SMALLEST * shards else -(-rank // _BLOCK) * _BLOCK


def flags(folder: Path) -> str:
    """That serve the adapter: parameters of a request. Paths that are not absolute are of the hub's cache."""
    return json.dumps({"adapter_id": str(folder.resolve()), "adapter_source": "local"})


def kinds(outline: Outline) -> dict[str, dict[int, str]]:
    """Kind of linear -> number of a layer -> its path, of those that it finds under ``model.layers``."""
    found: dict[str, dict[int, str]] = {kind: {} for kind in LINEARS}
    for path in outline.modules:
        place = place_of(path)
        if place and path == f"model.layers.{place[0]}.{place[1]}" and place[1] in found:
            found[place[1]][place[0]] = path
    held = {kind: layers for kind, layers in found.items() if layers}
    if _HEAD in outline.modules and outline.base.kind not in _WITHOUT_HEAD:
        held[_HEAD] = {0: _HEAD}
    return held


def problems(outline: Outline, shards: int = 1) -> list[Problem]:
    """What LoRAX makes of an adapter.

    Args:
        outline: of the adapter.
        shards: GPUs that serve one model.
    """
    config, base = outline.config, outline.base
    if base.shows or base.kind not in (*_DECODERS, *_OTHERS, ""):
        return [Problem(REFUSED, f"LoRAX serves no adapters for {base.kind} models as it is saved here", AS_A_MODEL)]
    if base.kind in _OTHERS:
        return [Problem(UNSURE, f"the names of {base.kind} models are not followed here", f"{AS_A_MODEL} to be sure")]
    found = []
    if changed := changed_bases(outline):
        found.append(Problem(WRONG, f"{changed} is not read", "convert to plain LoRA with PEFT"))
    if config.get("use_dora"):
        found.append(Problem(WRONG, "DoRA's magnitudes are not read", f"{AS_A_MODEL}, or merge with dora='convert'"))
    if outline.biased:
        found.append(Problem(LEFT_OUT, "biases (lora_bias)", AS_A_MODEL))
    if outline.whole:
        found.append(Problem(LEFT_OUT, f"{first_of(outline.whole)}, trained in full (modules_to_save)", AS_A_MODEL))
    if outline.parameters:
        found.append(Problem(LEFT_OUT, "LoRA on parameters (target_parameters)", AS_A_MODEL))
    if config.get("use_rslora"):
        what = "use_rslora, which PEFT 0.4.0 does not know, that LoRAX's image installs: alpha / r would be the scaling"
        found.append(Problem(UNSURE, what, PAD))
    held = kinds(outline)
    known = {path for layers in held.values() for path in layers.values()}
    if other := [path for path in outline.low if path not in known]:
        found.append(Problem(LEFT_OUT, f"{first_of(other)}, not among the linears that it knows", AS_A_MODEL))
    loaded = {}
    for kind, layers in held.items():
        count = 1 if kind == _HEAD else outline.layers
        if set(range(count)) - set(layers):
            having = len(set(layers) & set(range(count)))
            what = f"{kind} of all {count} layers, as only {having} of them have LoRA there"
            found.append(Problem(LEFT_OUT, what, PAD))
            continue
        ranks = {padded(outline.modules[path].rank, shards) for path in layers.values()}
        if len(ranks) > 1:
            found.append(Problem(REFUSED, f"{kind} has ranks that are padded to {sorted(ranks)}", PAD))
            return found
        loaded[kind] = ranks.pop()
    return [*found, *_rescaled(outline, held, loaded)]


def _rescaled(outline: Outline, held: dict[str, dict[int, str]], loaded: dict[str, int]) -> list[Problem]:
    """Linears that are scaled otherwise than by PEFT, when the adapter is loaded first or again."""
    start, alpha = outline.config.get("r") or 1, outline.config.get("lora_alpha") or 1
    last = next(reversed(loaded.values()), start)
    for time, rank in (("when it is loaded", start), ("when it is loaded again", last)):
        for kind, own in loaded.items():
            scaling = alpha / (math.sqrt(rank) if outline.config.get("use_rslora") else rank)
            for path in held[kind].values():
                low = outline.modules[path]
                if low.scaling != scaling:
                    what = f"{kind} is scaled by {scaling:g} {time}, and by PEFT by {low.scaling:g}"
                    return [Problem(WRONG, what, PAD)]
            rank = own
    return []
