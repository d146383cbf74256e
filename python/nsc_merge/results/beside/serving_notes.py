"""What a server must be told to load a merged adapter."""

from __future__ import annotations

from typing import Any

from torch import nn

from nsc_merge.adapters import Factor
from nsc_merge.models.families import find_family
from nsc_merge.models.merged.matrices import matrix_at
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
_AS_A_MODEL = "save as a model"


def _rank(factor: Factor) -> int:
    """Of the exact adapter of one update."""
    return factor.rank if factor.dense is None else min(factor.dense.shape)


def serving_notes(result: MergedUpdate, rank: int | None = None) -> list[str]:
    """What a server must be told to load the result's adapter, one line each.

    Args:
        result: the merged update.
        rank: that the adapter is truncated to.
    """
    full, biased, dora = 0, False, False
    for _, one in by_task(result):
        for path in one.paths:
            # Some methods compute a module's factors as they are asked for.
            factors = [factor for _, factor in one.terms(path)]
            full = max(full, 0 if one.is_whole(path) else sum(map(_rank, factors)))
            biased = biased or any(factor.bias is not None for factor in factors)
            dora = dora or any(factor.gain is not None for factor in factors)
    largest = full if rank is None else min(rank, full)
    note, decoder = f"the adapter has rank {largest}", _is_decoder(result.model)
    whole = [path for path in result.paths if result.is_whole(path)]
    refused = [path for path in whole if not decoder or path.rsplit(".", 1)[-1] not in _VLLM_HEADS]
    parts = {
        "is DoRA": (dora, f"{_AS_A_MODEL}, or merge with dora='convert'"),
        f"has modules_to_save ({', '.join(refused)})": (bool(refused), _AS_A_MODEL),
        "has biases (lora_bias)": (biased, _AS_A_MODEL),
    }
    held = {f"the adapter {part}, which PEFT loads and": cure for part, (found, cure) in parts.items() if found}
    experts = []
    if any(matrix_at(result.model, path) is not None for path in result.paths):
        experts.append(
            "the adapter has LoRA on parameters (target_parameters), which PEFT loads and not every server does: "
            f"{_AS_A_MODEL} to serve it anywhere"
        )
    if not decoder:
        return [note, *(f"{part} not every server does" for part in held), *experts]
    notes = [f"{part} vLLM does not: {cure}" for part, cure in held.items()]
    paths = [path for path in result.paths if path not in whole]
    notes += _head_refused(result, paths)
    flag = next((allowed for allowed in _VLLM_RANKS if allowed >= largest), None)
    if flag is None:
        note += f", more than vLLM's {_VLLM_RANKS[-1]}: save with a smaller rank, or as a model"
    elif not notes:
        note += f"; vLLM: --enable-lora --max-lora-rank {flag}"
    return [note, *notes, *experts, *_left_out(result, paths)]


def _head_refused(result: MergedUpdate, paths: list[str]) -> list[str]:
    config: Any = result.model.config
    kind = config.get_text_config().model_type
    heads = [path for path in paths if path.rsplit(".", 1)[-1] == "lm_head"]
    if not heads or kind not in _VLLM_WITHOUT_LM_HEAD:
        return []
    return [f"the adapter has LoRA on {heads[0]}, which vLLM does not load for {kind} models: {_AS_A_MODEL}"]


def _left_out(result: MergedUpdate, paths: list[str]) -> list[str]:
    """Of the linears with low-rank updates, those that vLLM passes over."""
    if all(path.rsplit(".", 1)[-1] != _LANGUAGE_MODEL for path, _ in result.model.named_modules()):
        return []
    outside = [path for path in paths if not {_LANGUAGE_MODEL, "lm_head"} & set(path.split("."))]
    if not outside:
        return []
    return [
        f"vLLM leaves out, without a word, the {len(outside)} modules outside the language model, such as "
        f"{outside[0]}: save as a model to serve them, too"
    ]


def _is_decoder(model: nn.Module) -> bool:
    """Whether it is a language model without an encoder, with or without images, as vLLM serves with adapters."""
    family = find_family(model)
    if family is not None:
        encodes = getattr(model.config, "is_encoder_decoder", False)
        return family.tokens is not None and family.causal and not encodes
    generates = getattr(model, "can_generate", None)
    return generates is not None and generates() and not getattr(model.config, "is_encoder_decoder", False)
