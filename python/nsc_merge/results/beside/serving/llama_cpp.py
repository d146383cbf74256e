"""What llama.cpp takes, as its ``convert_lora_to_gguf.py`` and ``src/llama-adapter.{h,cpp}`` have it.

There is one ``lora_alpha`` for the whole adapter, and every linear is scaled by it over the rank of its own factors:
``rank_pattern``, ``alpha_pattern`` and ``use_rslora`` are not read. Where ranks differ, an update of the largest rank
is added as it is, and one of half that rank twice. The converter ends at any tensor that is no factor, but for those of
norms, which the server then passes over.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from nsc_merge.results.beside.serving.outline import (
    AS_A_MODEL,
    LEFT_OUT,
    REFUSED,
    UNSURE,
    WRONG,
    Outline,
    Problem,
    beyond,
    changed_bases,
    first_of,
    part_of,
)

PAD = "write it with one rank: python -m nsc_merge.integrations.serving FOLDER --server llama.cpp --write OUT"
# Models, by model_type, whose head is a product without LoRA in src/models.
_WITHOUT_HEAD = ("bitnet", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "glm_moe_dsa", "kimi_linear")


def flags(folder: Path) -> str:
    """That serve the adapter, and what makes their file."""
    made = f"convert_lora_to_gguf.py {shlex.quote(str(folder))} --base BASE --outfile adapter.gguf"
    return f"--lora adapter.gguf, made by {made}"


def problems(outline: Outline) -> list[Problem]:
    """What llama.cpp makes of an adapter."""
    config, base = outline.config, outline.base
    alpha = config.get("lora_alpha") or 1
    found = []
    if changed := changed_bases(outline):
        found.append(Problem(WRONG, f"{changed} is not read", "convert to plain LoRA with PEFT"))
    if outline.gained:
        found.append(Problem(REFUSED, "the adapter is DoRA", f"{AS_A_MODEL}, or merge with dora='convert'"))
    if outline.biased:
        found.append(Problem(REFUSED, "biases (lora_bias)", AS_A_MODEL))
    norms = [name for name in outline.whole if "_layernorm" in name or ".norm" in name]
    if others := [name for name in outline.whole if name not in norms]:
        found.append(Problem(REFUSED, f"{first_of(others)}, trained in full (modules_to_save)", AS_A_MODEL))
    if norms:
        found.append(Problem(LEFT_OUT, f"{first_of(norms)}, trained in full (modules_to_save)", AS_A_MODEL))
    if outline.parameters:
        found.append(Problem(UNSURE, "LoRA on parameters (target_parameters)", f"{AS_A_MODEL} to serve it anywhere"))
    if scaled := [path for path, low in outline.low.items() if low.scaling != alpha / low.rank]:
        low = outline.low[scaled[0]]
        what = f"{first_of(scaled)} is scaled by {alpha / low.rank:g}, and by PEFT by {low.scaling:g}"
        found.append(Problem(WRONG, what, PAD))
    if outline.embeddings and base.tied is not False:
        what = f"LoRA on {first_of(outline.embeddings)}, by which the server ends where the head is the same weight"
        found.append(Problem(REFUSED if base.tied else UNSURE, what, AS_A_MODEL))
    heads = [path for path in outline.modules if part_of(path) == "lm_head"]
    if heads and base.kind in ("", *_WITHOUT_HEAD):
        what = f"LoRA on {heads[0]}, which the heads of some models pass over"
        found.append(Problem(LEFT_OUT if base.kind else UNSURE, what, AS_A_MODEL))
    if base.shows:
        what = f"the names of {base.kind} models with images are not followed here"
        found.append(Problem(UNSURE, what, f"{AS_A_MODEL} to be sure"))
    elif over := beyond(outline):
        found.append(Problem(REFUSED, f"{first_of(over)}: the base has {base.layers} layers", "serve its own base"))
    return found
