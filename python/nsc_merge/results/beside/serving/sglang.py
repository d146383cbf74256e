"""What SGLang (0.5.23) takes, as its ``sglang/srt/lora`` has it.

There is one rank and one scaling, ``lora_alpha / r``, for the whole adapter: ``rank_pattern``, ``alpha_pattern`` and
``use_rslora`` are not read. Query, key and value of a layer are put on top of each other, and so are gate and up.
"""

from __future__ import annotations

from nsc_merge.results.beside.serving.outline import (
    AS_A_MODEL,
    LANGUAGE_MODEL,
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
    place_of,
)

PAD = "write it with one rank: python -m nsc_merge.integrations.serving FOLDER --server sglang --write OUT"
# Last part of a name -> those of the same stack that must have LoRA, too, where it has.
STACKS = {"q_proj": ("v_proj",), "k_proj": ("q_proj", "v_proj"), "v_proj": ("q_proj",), "up_proj": ("gate_proj",)}
_EMBEDDINGS = ("embed_tokens", "lm_head")
# What --lora-target-modules takes of what transformers' decoders have.
_NAMES = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj", "q_a_proj",
    "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj", "embed_tokens", "lm_head",
)  # fmt: skip


def flags(outline: Outline) -> str:
    """That serve the adapter."""
    names = sorted({part_of(path) for path in outline.low} & set(_NAMES))
    rank = outline.config.get("r")
    return f"--enable-lora --max-lora-rank {rank} --lora-target-modules {' '.join(names)}"


def problems(outline: Outline, max_rank: int | None = None) -> list[Problem]:
    """What SGLang makes of an adapter.

    Args:
        outline: of the adapter.
        max_rank: the server's ``--max-lora-rank``; by default the adapter's own.
    """
    config, base = outline.config, outline.base
    rank, alpha = config.get("r") or 1, config.get("lora_alpha") or 1
    found = []
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets not in ("all", "all-linear"):
        found.append(Problem(REFUSED, f"target_modules={targets!r:.60} is an expression", PAD))
    if config.get("use_dora"):
        found.append(Problem(REFUSED, "the adapter is DoRA", f"{AS_A_MODEL}, or merge with dora='convert'"))
    if max_rank is not None and rank > max_rank:
        found.append(Problem(REFUSED, f"rank {rank} is more than {max_rank}", f"--max-lora-rank {rank}"))
    if changed := changed_bases(outline):
        found.append(Problem(WRONG, f"{changed} is not read", "convert to plain LoRA with PEFT"))
    if other := [path for path, low in outline.low.items() if low.rank != rank]:
        found.append(Problem(REFUSED, f"{first_of(other)} of another rank than r={rank}", PAD))
    scaled = [path for path, low in outline.low.items() if low.rank == rank and low.scaling != alpha / rank]
    if scaled:
        own = outline.low[scaled[0]].scaling
        found.append(Problem(WRONG, f"{first_of(scaled)} is scaled by {alpha / rank:g}, and by PEFT by {own:g}", PAD))
    if lonely := incomplete(outline):
        missing = next(end for end in STACKS[part_of(lonely[0])] if _beside(lonely[0], end) not in outline.modules)
        found.append(Problem(REFUSED, f"{first_of(lonely)}, without LoRA on the {missing} beside it", PAD))
    if outline.whole:
        found.append(Problem(LEFT_OUT, f"{first_of(outline.whole)}, trained in full (modules_to_save)", AS_A_MODEL))
    if outline.biased:
        found.append(Problem(LEFT_OUT, "biases (lora_bias)", AS_A_MODEL))
    if outline.parameters:
        found.append(Problem(UNSURE, "LoRA on parameters (target_parameters)", f"{AS_A_MODEL} to serve it anywhere"))
    if unknown := [path for path in outline.low if place_of(path) and part_of(path) not in _NAMES]:
        found.append(Problem(UNSURE, f"{first_of(unknown)}, for which --lora-target-modules has no name", AS_A_MODEL))
    outside = [path for path in outline.low if place_of(path) is None and part_of(path) not in _EMBEDDINGS]
    if outside:
        found.append(Problem(LEFT_OUT, f"{first_of(outside)}, outside of all layers", AS_A_MODEL))
    towers = [path for path in outline.modules if place_of(path) and LANGUAGE_MODEL not in path.split(".")]
    if base.shows and towers:
        # What has the sizes of the language model's linears takes their place; anything else does not fit there.
        fits = all(outline.modules[path].shape == base.shapes.get(part_of(path)) for path in towers)
        what = f"{first_of(towers)} is taken for the language model's layer of the same number"
        found.append(Problem(WRONG if fits else REFUSED, what, AS_A_MODEL))
    if over := beyond(outline):
        found.append(Problem(REFUSED, f"{first_of(over)}: the base has {base.layers} layers", "serve its own base"))
    return found


def incomplete(outline: Outline) -> list[str]:
    """Paths of which the server wants LoRA on others of their stack, too, that have none."""
    return [
        path
        for path in outline.modules
        if place_of(path) and any(_beside(path, end) not in outline.modules for end in STACKS.get(part_of(path), ()))
    ]


def _beside(path: str, end: str) -> str:
    return f"{path.rpartition('.')[0]}.{end}"
