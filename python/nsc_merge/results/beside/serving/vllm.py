"""What vLLM (0.33) takes, as its ``vllm/config/lora.py`` and ``vllm/lora`` have it.

Rank and scaling of every module are PEFT's, patterns included. The parts of what it packs (``qkv_proj``,
``gate_up_proj``) may have different ranks, or none.
"""

from __future__ import annotations

from collections.abc import Iterable

from nsc_merge.results.beside.serving.outline import (
    AS_A_MODEL,
    LANGUAGE_MODEL,
    LEFT_OUT,
    REFUSED,
    UNSURE,
    Outline,
    Problem,
    beyond,
    changed_bases,
    first_of,
    part_of,
)

# What --max-lora-rank takes.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
HEADS = ("classifier", "score")
# What it has LoRA on besides linears, by model_type (embedding_modules of its classes): embeddings and head, ...
_BESIDE_LINEARS: dict[str, tuple[str, ...]] = dict.fromkeys((
    "apertus", "ernie4_5", "exaone4", "exaone_moe", "falcon_h1", "granite", "granitemoe", "granitemoehybrid",
    "granitemoeshared", "internlm3", "jamba", "lfm2", "lfm2_moe", "llama", "llama4_text", "minicpm3", "mixtral",
    "nemotron", "nemotron_h", "phi3", "qwen3", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe",
), ("embed_tokens", "lm_head"))  # fmt: skip
# ... embeddings alone: of Cohere's, and of what it runs by transformers' code, ...
_BESIDE_LINEARS |= dict.fromkeys((
    "arcee", "cohere", "cohere2", "cwm", "flex_olmo", "glm", "gpt_bigcode", "gpt_neox", "hunyuan_v1_dense",
    "hunyuan_v1_moe", "olmo", "olmo2", "olmo3", "phi", "seed_oss", "smollm3", "starcoder2", "vaultgemma",
), ("embed_tokens",))  # fmt: skip
# ... or nothing: it refuses the whole adapter.
_BESIDE_LINEARS |= dict.fromkeys((
    "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "gemma", "gemma2", "gemma3_text", "gemma4_text", "glm4", "glm4_moe",
    "gpt_oss", "minimax_m2", "ministral3", "mistral", "olmo_hybrid", "olmoe", "opt", "qwen2", "qwen2_moe", "qwen3_next",
), ())  # fmt: skip
# Models for which it has no LoRA at all.
_NO_LORA = frozenset((
    "bloom", "cohere2_moe", "dbrx", "falcon", "falcon_mamba", "gemma3n_text", "gpt2", "gptj", "mamba", "mamba2",
    "mimo_v2_flash", "stablelm", "zamba2",
))  # fmt: skip
_EMBEDDINGS_AND_HEADS = ("embed_tokens", "embed_in", "wte", "word_embeddings", "lm_head", "embed_out")


def flag_for(rank: int) -> int | None:
    """The smallest ``--max-lora-rank`` that holds a rank, None if there is none."""
    return next((allowed for allowed in RANKS if allowed >= rank), None)


def flags(outline: Outline) -> str:
    """That serve the adapter; empty if none do."""
    rank = flag_for(max(outline.ranks, default=1))
    return "" if rank is None else f"--enable-lora --max-lora-rank {rank}"


def parts_refused(*, dora: bool, whole: Iterable[str], biased: bool) -> dict[str, str]:
    """What of an adapter PEFT loads and vLLM does not -> the way out.

    Args:
        dora: it has magnitudes.
        whole: paths of modules trained in full that are no head of a classifier.
        biased: there are biases beside factors.
    """
    named = ", ".join(whole)
    parts = {
        "is DoRA": (dora, f"{AS_A_MODEL}, or merge with dora='convert'"),
        f"has modules_to_save ({named})": (bool(named), AS_A_MODEL),
        "has biases (lora_bias)": (biased, AS_A_MODEL),
    }
    return {part: cure for part, (found, cure) in parts.items() if found}


def refused_of(kind: str, paths: Iterable[str]) -> list[str]:
    """Of the paths with LoRA, those for which it refuses an adapter of models of this ``model_type``: embeddings and
    heads that it has no LoRA on, or all. None of a type that is not listed here.
    """
    if kind in _NO_LORA:
        return list(paths)
    served = _BESIDE_LINEARS.get(kind, _EMBEDDINGS_AND_HEADS)
    return [path for path in paths if part_of(path) in _EMBEDDINGS_AND_HEADS and part_of(path) not in served]


def unsure_of(kind: str, paths: Iterable[str]) -> list[str]:
    """Embeddings and heads with LoRA in models of a type that is not listed here."""
    if kind in _BESIDE_LINEARS or kind in _NO_LORA:
        return []
    return [path for path in paths if part_of(path) in _EMBEDDINGS_AND_HEADS]


def left_out(paths: Iterable[str]) -> list[str]:
    """Of the linears with LoRA in a model with images, those that it passes over without a word."""
    return [path for path in paths if not {LANGUAGE_MODEL, "lm_head"} & set(path.split("."))]


def problems(outline: Outline, max_rank: int | None = None) -> list[Problem]:
    """What vLLM makes of an adapter.

    Args:
        outline: of the adapter.
        max_rank: the server's ``--max-lora-rank``; by default the smallest that holds the adapter.
    """
    config, base = outline.config, outline.base
    saved = [name for name in config.get("modules_to_save") or () if name not in HEADS]
    refused = parts_refused(dora=bool(config.get("use_dora")), whole=saved, biased=bool(config.get("lora_bias")))
    found = [Problem(REFUSED, f"the adapter {part}", cure) for part, cure in refused.items()]
    largest = max(outline.ranks, default=0)
    held = RANKS[-1] if max_rank is None else max_rank
    if largest > held:
        flag = flag_for(largest)
        other = f"--max-lora-rank {flag}" if flag else AS_A_MODEL
        cure = f"save with a rank of at most {held}, or {other}"
        found.append(Problem(REFUSED, f"rank {largest} is more than {held}", cure))
    if changed := changed_bases(outline):
        found.append(Problem(REFUSED, changed, "convert to plain LoRA with PEFT"))
    if config.get("bias", "none") != "none":
        found.append(Problem(REFUSED, f"bias={config['bias']!r}", AS_A_MODEL))
    heads = [name for name in outline.whole if len(parts := name.split(".")) < 2 or parts[-2] not in HEADS]
    if heads and not saved:
        found.append(Problem(REFUSED, f"{first_of(heads)} is no tensor of LoRA", AS_A_MODEL))
    if without := refused_of(base.kind, outline.low):
        what = f"the adapter has LoRA on {without[0]}, which vLLM does not load for {base.kind} models"
        found.append(Problem(REFUSED, what, AS_A_MODEL))
    if base.kind and (unknown := unsure_of(base.kind, outline.low)):
        what = f"LoRA on {first_of(unknown)}, which vLLM does not load for every type of model"
        found.append(Problem(UNSURE, what, f"{AS_A_MODEL} to be sure"))
    if outline.parameters:
        found.append(Problem(UNSURE, "LoRA on parameters (target_parameters)", f"{AS_A_MODEL} to serve it anywhere"))
    if base.shows and (outside := left_out(outline.low)):
        # Of LLaVA's tower vLLM counts the tokens without that of the class, and ends at the first image.
        cure = f"{AS_A_MODEL}, or --enable-tower-connector-lora, of models other than LLaVA that have it"
        found.append(Problem(LEFT_OUT, f"{first_of(outside)}, outside the language model", cure))
    if not base.shows and (over := beyond(outline)):
        found.append(Problem(LEFT_OUT, f"{first_of(over)}: the base has {base.layers} layers", "serve its own base"))
    return found
