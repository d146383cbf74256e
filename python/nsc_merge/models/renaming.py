"""What modules were called in other releases of transformers, or in the language model inside of a larger one."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from torch import nn

from nsc_merge.models.families import FAMILIES, Family
from nsc_merge.models.traits import type_of

# No map of transformers has these: its own release 4 kept vision and language beside each other, a language model under
# its head; and an adapter of the language model alone knows nothing of what is around it.
_AROUND_LANGUAGE = (
    (r"^visual\.", "model.visual."),
    (r"^(model\.)?language_model\.model\.", "model.language_model."),
    (r"^model\.(?=layers\.|embed_tokens$|norm$)", "model.language_model."),
    (r"^model\.language_model\.(?=layers\.|embed_tokens$|norm$)", "model.text_model."),
)


def rules_of(model: nn.Module, family: Family | None) -> tuple[tuple[str, str], ...]:
    """Pairs of regular expression and replacement, to be applied to a path in order until it is one of the model's.

    First the table's for the family; then what transformers itself renames as it loads files of earlier releases
    (``conversion_mapping``); then, for models that read images and text, those of their language model.
    """
    rules = family.legacy if family else ()
    kind = type_of(model)
    # A model of diffusers, under its name in a pipeline.
    rules = (*rules, *(_of_transformers(kind) if kind else ((r"^(unet|transformer)\.", ""),)))
    if hasattr(getattr(model, "config", None), "vision_config") and not (family and family.legacy):
        sighted = next(one for one in FAMILIES if one.name == "LLaVA")
        rules = (*rules, *(rule for rule in sighted.legacy if rule[0] != r"^model\.layers\."), *_AROUND_LANGUAGE)
    return rules


def _of_transformers(kind: str) -> list[tuple[str, str]]:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    found: Any = get_checkpoint_conversion_mapping(kind) or ()
    pairs: list[tuple[str, str]] = []
    for entry in found:
        if type(entry).__name__ == "WeightRenaming":
            pairs += zip(entry.source_patterns, entry.target_patterns, strict=True)
    return [(source, target) for source, target in pairs if _is_pattern(source) and "\\" not in target]


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def name_today(path: str, names: Collection[str], rules: Collection[tuple[str, str]], prefix: str) -> str:
    """A module's path in the model; ``path`` itself where no rule leads to one.

    Args:
        path: in an adapter.
        names: all paths of the model.
        rules: of :func:`rules_of`.
        prefix: what the model without its head is called under one.
    """
    stages = [path]
    for pattern, replacement in rules:
        stages.append(re.sub(pattern, replacement, stages[-1]))
    for stage in stages:
        # An adapter of the bare model fits the one with a head, and the other way round.
        for candidate in (stage, stage.removeprefix(f"{prefix}."), f"{prefix}.{stage}"):
            if candidate in names:
                return candidate
    return path
