"""What the configuration of a merged adapter says it is for: base, revision, and the class that loads it."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from nsc_merge.models.bases.loading import base_name
from nsc_merge.models.bases.sharded import class_name, own_class
from nsc_merge.models.traits import type_of
from nsc_merge.results.merged_update import MergedUpdate
from nsc_merge.utils.option_checks import is_hub_id

# PEFT's task types that have a head, and the names under which PEFT looks for it.
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


def about_adapter(result: MergedUpdate, whole: Collection[str]) -> dict[str, Any]:
    """Fields of ``peft.LoraConfig`` for the merged adapter, with ``auto_mapping`` where no task type names the class.

    Args:
        result: the merged update.
        whole: paths of the modules that the adapter holds in full.
    """
    task_type = _task_type(result, whole)
    kind = own_class(result.model)
    name, revision = _base(result)
    mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return {
        "task_type": task_type,
        "base_model_name_or_path": name,
        "revision": revision,
        "auto_mapping": None if task_type else mapping,
    }


def _base(result: MergedUpdate) -> tuple[str | None, str | None]:
    """What to load the adapter on, and its revision on the hub: what it was merged on, by its full path if that is a
    folder. A hub id that all adapters say stands for a folder, which others do not have, and for a model in memory.
    """
    told = {adapter.base_model for adapter in result.adapters.values()}
    revisions = {adapter.about.base_revision for adapter in result.adapters.values()}
    agreed = told.pop() if len(told) == 1 else None
    config: Any = getattr(result.model, "config", None)
    merged_on = base_name(result.model)
    is_named = is_hub_id(agreed or "") and not is_hub_id(merged_on)
    for name in (agreed, merged_on) if is_named else (merged_on, agreed):
        if name and Path(name).is_dir():
            return str(Path(name).resolve()), None
        if name and is_hub_id(name):
            commit = getattr(config, "_commit_hash", None) if name == merged_on else None
            return name, commit or (revisions.pop() if name == agreed and len(revisions) == 1 else None)
    return agreed, None


def _task_type(result: MergedUpdate, whole: Collection[str]) -> str | None:
    """PEFT's task type: of those whose auto class makes a model of the base's class, the one that all adapters say.

    An adapter with a task type is loaded through that auto class only, and one of a type that has a head must hold one
    (PEFT 0.21 ends in a KeyError otherwise). Where no type fits, ``auto_mapping`` names the very class.
    """
    told = {adapter.about.task_type for adapter in result.adapters.values()}
    ends = {path.rsplit(".", 1)[-1] for path in whole}
    fitting = [kind for kind in _kinds(result.model) if kind not in _HEADS or ends.intersection(_HEADS[kind])]
    return next((kind for kind in fitting if told == {kind}), fitting[0] if fitting else None)


def _kinds(model: Any) -> list[str]:
    """PEFT's task types whose auto class makes a model of this class."""
    from transformers.models.auto import modeling_auto as auto

    # PEFT's class for features hands these two on, whatever the model takes; CLIP's has no place for the second.
    takes_text = {"input_ids", "inputs_embeds"} <= set(inspect.signature(model.forward).parameters)
    takes_text = takes_text and getattr(model, "main_input_name", "") == "input_ids"
    table: dict[str, Mapping[str, Any]] = {
        "CAUSAL_LM": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "SEQ_2_SEQ_LM": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "SEQ_CLS": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "TOKEN_CLS": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        "QUESTION_ANS": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
        "FEATURE_EXTRACTION": auto.MODEL_MAPPING_NAMES if takes_text else {},
    }
    family, name = type_of(model), class_name(model)
    return [kind for kind, classes in table.items() if classes.get(family) == name]
