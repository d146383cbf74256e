"""What a server must be told to load a merged adapter."""

from __future__ import annotations

from typing import Any

from torch import nn

from nsc_merge.models.families import find_family
from nsc_merge.results.merged_update import MergedUpdate, by_task

# What vLLM (0.33) takes, as vllm/config/lora.py and vllm/lora say. alpha is r everywhere, so that the scaling is 1 also
# where rank_pattern is not read. What it packs (qkv_proj, gate_up_proj) it finds by the names of the parts,
# which are those of transformers.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_HEADS = ("classifier", "score")
# Decoders for which it has no LoRA on the head: it refuses the whole adapter.
_VLLM_WITHOUT_LM_HEAD = ("mistral", "qwen2")
# What transformers calls the part of a model with images that it serves with LoRA.
_LANGUAGE_MODEL = "language_model"


def _rank(result: MergedUpdate, path: str) -> int:
    """Of the exact adapter of one module."""
    return sum(
        factor.rank if factor.dense is None else min(factor.dense.shape) for _, factor in result.terms(path)
    )


def serving_notes(result: MergedUpdate, rank: int | None = None) -> list[str]:
    """What a server must be told to load the result's adapter, one line each.

    Args:
        result: the merged update.
        rank: that the adapter is truncated to.
    """
    merges = [one for _, one in by_task(result)]
    dora = any(factor.gain is not None for one in merges for path in one.paths for _, factor in one.terms(path))
    full = max((_rank(one, path) for one in merges for path in one.paths if not one.is_whole(path)), default=0)
    largest = full if rank is None else min(rank, full)
    whole = [path for path in result.paths if result.is_whole(path)]
    biased = any(factor.bias is not None for one in merges for path in one.paths for _, factor in one.terms(path))
    notes = [f"the adapter has rank {largest}"]
    if dora:
        notes.append(
            "the adapter is DoRA, which PEFT loads and vLLM does not: save as a model, or merge with dora='convert'"
        )
    if not _is_decoder(result.model):
        if whole:
            named = ", ".join(whole)
            notes.append(f"the adapter has modules_to_save ({named}), which PEFT loads and not every server does")
        if biased:
            notes.append("the adapter has biases (lora_bias), which not every server loads")
        return notes
    flag = next((allowed for allowed in _VLLM_RANKS if allowed >= largest), None)
    notes[0] += (
        f"; vLLM: --enable-lora --max-lora-rank {flag}"
        if flag
        else f", more than vLLM's {_VLLM_RANKS[-1]}: save with a smaller rank, or as a model"
    )
    refused = [path for path in whole if path.rsplit(".", 1)[-1] not in _VLLM_HEADS]
    if refused:
        named = ", ".join(refused)
        notes.append(f"the adapter has modules_to_save ({named}), which PEFT loads and vLLM does not: save as a model")
    if biased:
        notes.append("the adapter has biases (lora_bias), which PEFT loads and vLLM does not: save as a model")
    return notes + _left_out(result, [path for path in result.paths if path not in whole])


def _left_out(result: MergedUpdate, paths: list[str]) -> list[str]:
    """Of the linears with low-rank updates, those that vLLM refuses or passes over."""
    config: Any = result.model.config
    kind = config.get_text_config().model_type
    heads = [path for path in paths if path.rsplit(".", 1)[-1] == "lm_head"]
    notes = []
    if heads and kind in _VLLM_WITHOUT_LM_HEAD:
        notes.append(f"the adapter has LoRA on {heads[0]}, which vLLM does not load for {kind} models: save as a model")
    if any(path.rsplit(".", 1)[-1] == _LANGUAGE_MODEL for path, _ in result.model.named_modules()):
        outside = [path for path in paths if _LANGUAGE_MODEL not in path.split(".") and path not in heads]
        if outside:
            notes.append(
                f"vLLM leaves out, without a word, the {len(outside)} modules outside the language model, such as "
                f"{outside[0]}: save as a model to serve them, too"
            )
    return notes


def _is_decoder(model: nn.Module) -> bool:
    """Whether it is a language model without an encoder, with or without images, as vLLM serves with adapters."""
    family = find_family(model)
    if family is not None:
        encodes = getattr(model.config, "is_encoder_decoder", False)
        return family.tokens is not None and family.causal and not encodes
    generates = getattr(model, "can_generate", None)
    return generates is not None and generates() and not getattr(model.config, "is_encoder_decoder", False)
