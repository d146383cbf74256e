"""What a server must be told to load a merged adapter."""

from __future__ import annotations

from torch import nn

from nsc_merge.models.families import find_family
from nsc_merge.results.merged_update import MergedUpdate, by_task

# The ranks that vLLM's --max-lora-rank accepts.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def _rank(result: MergedUpdate, path: str) -> int:
    """Of the exact adapter of one module."""
    return sum(
        factor.rank if factor.dense is None else min(factor.dense.shape) for _, factor in result.terms(path)
    )


def serving_notes(result: MergedUpdate, rank: int | None = None) -> list[str]:
    """What a server must be told to load the result's adapter, one line each."""
    merges = [one for _, one in by_task(result)]
    full = max((_rank(one, path) for one in merges for path in one.paths if not one.is_whole(path)), default=0)
    largest = full if rank is None else min(rank, full)
    whole = any(result.is_whole(path) for path in result.paths)
    notes = [f"the adapter has rank {largest}"]
    if _is_decoder(result.model):
        flag = next((allowed for allowed in _VLLM_RANKS if allowed >= largest), None)
        notes[0] += (
            f"; vLLM: --enable-lora --max-lora-rank {flag}"
            if flag
            else f", more than vLLM's {_VLLM_RANKS[-1]}: save with a smaller rank, or as a model"
        )
        if whole:
            notes.append("the adapter has modules_to_save, which PEFT loads and vLLM does not: save as a model")
    elif whole:
        notes.append("the adapter has modules_to_save, which PEFT loads and not every server does")
    if any(factor.bias is not None for one in merges for path in one.paths for _, factor in one.terms(path)):
        notes.append("the adapter has biases (lora_bias), which not every server loads")
    return notes


def _is_decoder(model: nn.Module) -> bool:
    """Whether it is a language model without an encoder, with or without images, as vLLM serves with adapters."""
    family = find_family(model)
    if family is not None:
        return family.tokens is not None
    generates = getattr(model, "can_generate", None)
    return generates is not None and generates() and not getattr(model.config, "is_encoder_decoder", False)
