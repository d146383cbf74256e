"""What a server must be told to load a merged adapter."""

from __future__ import annotations

from typing import Any

from torch import nn

from nsc_merge.adapters import Factor
from nsc_merge.models.families import find_family
from nsc_merge.models.merged.matrices import matrix_at
from nsc_merge.models.merged.stacks import lost_by_peft, names_for_peft
from nsc_merge.models.traits import encodes
from nsc_merge.results.beside.serving import lorax, sglang, vllm
from nsc_merge.results.beside.serving.outline import AS_A_MODEL, LANGUAGE_MODEL
from nsc_merge.results.merged_update import MergedUpdate, by_task

# Its load_adapter looks for other names than those that PEFT writes (5.23).
_DORA = "transformers' own from_pretrained, load_adapter and pipeline leave DoRA's magnitudes out: load it with PEFT"


def _rank(factor: Factor) -> int:
    """Of the exact adapter of one update."""
    return factor.rank if factor.dense is None else min(factor.dense.shape)


def serving_notes(result: MergedUpdate, rank: int | None = None) -> list[str]:
    """What a server must be told to load the result's adapter, one line each.

    Args:
        result: the merged update.
        rank: that the adapter is truncated to.
    """
    ranks: dict[str, int] = {}
    biased, dora = False, False
    for _, one in by_task(result):
        for path in one.paths:
            # Some methods compute a module's factors as they are asked for.
            factors = [factor for _, factor in one.terms(path)]
            own = 0 if one.is_whole(path) else sum(map(_rank, factors))
            ranks[path] = max(ranks.get(path, 0), own if rank is None else min(rank, own))
            biased = biased or any(factor.bias is not None for factor in factors)
            dora = dora or any(factor.gain is not None for factor in factors)
    largest = max(ranks.values(), default=0)
    note, decoder = f"the adapter has rank {largest}", _is_decoder(result.model)
    whole = [path for path in result.paths if result.is_whole(path)]
    refused = [path for path in whole if not decoder or path.rsplit(".", 1)[-1] not in vllm.HEADS]
    parts = vllm.parts_refused(dora=dora, whole=refused, biased=biased)
    held = {f"the adapter {part}, which PEFT loads and": cure for part, cure in parts.items()}
    further = []
    matrices = {path for path in result.paths if matrix_at(result.model, path) is not None}
    if matrices:
        further.append(
            "the adapter has LoRA on parameters (target_parameters), which PEFT loads and not every server does: "
            f"{AS_A_MODEL} to serve it anywhere"
        )
    linears = [path for path in result.paths if path not in matrices]
    lost = lost_by_peft(linears, result.model, {} if dora or biased else names_for_peft(linears, result.model))
    if lost:
        further.append(
            f"the adapter has LoRA on {lost[0]}, whose tensors PEFT gives another name as it loads them, so that their "
            f"update is lost, as that of the adapters themselves is: {AS_A_MODEL}"
        )
    if not decoder:
        return [note, *(f"{part} not every server does" for part in held), *further, *([_DORA] if dora else [])]
    notes = [f"{part} vLLM does not: {cure}" for part, cure in held.items()]
    paths = [path for path in result.paths if path not in whole]
    notes += _not_loaded(result, paths)
    flag = vllm.flag_for(largest)
    if flag is None:
        note += f", more than vLLM's {vllm.RANKS[-1]}: save with a smaller rank, or as a model"
    elif not notes:
        note += f"; vLLM: --enable-lora --max-lora-rank {flag}"
    others = [] if notes or further else _of_other_servers(result, {ranks[path] for path in paths} - {0})
    return [note, *notes, *further, *others, *_left_out(result, paths), *([_DORA] if dora else [])]


def _not_loaded(result: MergedUpdate, paths: list[str]) -> list[str]:
    config: Any = getattr(result.model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    kind = getattr(text, "model_type", "")
    without = vllm.refused_of(kind, paths)
    if not without:
        return []
    return [f"the adapter has LoRA on {without[0]}, which vLLM does not load for {kind} models: {AS_A_MODEL}"]


def _of_other_servers(result: MergedUpdate, ranks: set[int]) -> list[str]:
    """What vLLM takes and others do not, of an adapter that they would take otherwise."""
    of_text = _is_of_text(result.model)
    if len(ranks) > 1:
        servers = "SGLang, LoRAX and llama.cpp" if of_text else "SGLang and llama.cpp"
        return [f"{servers} need one rank in all modules, found {min(ranks)} to {max(ranks)}: {sglang.PAD}"]
    if of_text and any(lorax.padded(rank) != rank for rank in ranks):
        return [f"LoRAX needs a rank of 8, 16, 32, 48, ..., found {max(ranks)}: {lorax.PAD}"]
    return []


def _left_out(result: MergedUpdate, paths: list[str]) -> list[str]:
    """Of the linears with low-rank updates, those that vLLM passes over."""
    if _is_of_text(result.model):
        return []
    outside = vllm.left_out(paths)
    if not outside:
        return []
    return [
        f"vLLM leaves out, without a word, the {len(outside)} modules outside the language model, such as "
        f"{outside[0]}: save as a model to serve them, too"
    ]


def _is_of_text(model: nn.Module) -> bool:
    """Whether no part of the model is a language model, beside others for images."""
    return all(path.rsplit(".", 1)[-1] != LANGUAGE_MODEL for path, _ in model.named_modules())


def _is_decoder(model: nn.Module) -> bool:
    """Whether it is a language model without an encoder, with or without images, as vLLM serves with adapters."""
    family = find_family(model)
    if family is not None:
        return family.tokens is not None and family.causal and not encodes(model)
    generates = getattr(model, "can_generate", None)
    return generates is not None and generates() and not encodes(model)
