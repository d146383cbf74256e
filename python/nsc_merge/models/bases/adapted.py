"""A base that holds adapters of PEFT, as it is without them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from nsc_merge.adapters.peft_config import CHANGES_BASE
from nsc_merge.adapters.peft_models import refuse_on_disk
from nsc_merge.models.bases.stored_weights import is_dtensor
from nsc_merge.models.own_base import sharing_tensors

_ANEW = "load the base anew, and give it as model"
# Settings of adapters that change the base for good, and what is then no longer the base's own.
_CHANGES = {
    "kasa_config": "its weights",
    "layer_replication": "its layers",
}


def without_adapters(model: nn.Module) -> nn.Module:
    """The base under a ``PeftModel``, or of a model with adapters put in it, as it was before; the model itself where
    there are and were none.

    The base is a copy of the modules above the adapted ones; all others, and so all weights, are the very same. The
    model keeps its adapters, and which of them are active.

    Args:
        model: with adapters of any kind that PEFT puts around modules.

    Raises:
        ValueError: if adapters are merged into the weights, if one changed the base for good, or if diffusers offloads
            the model to disk.
    """
    refuse_on_disk(model, "model")
    if hasattr(model, "_orig_mod"):
        return model
    wrapper: Any = model
    # A model of transformers has a method of that name, too, that knows no adapters.
    base: nn.Module = wrapper.get_base_model() if _is_pefts(model) and hasattr(model, "get_base_model") else model
    under = {module: inside for module in base.modules() if (inside := _inside(module)) is not module}
    if not under and not _named_by_an_adapter(base):
        return base
    _refuse_changed(base, under)
    whole = [module for module in base.modules() if module is not base and under.keys().isdisjoint(module.modules())]
    bare = sharing_tensors(base, {**dict(zip(whole, whole, strict=True)), **under})
    left = next((path for path, module in bare.named_modules() if _is_pefts(module)), None)
    if left is not None:
        kind = type(bare.get_submodule(left)).__name__
        raise ValueError(
            f"model: expected adapters around single modules, found PEFT's {kind} at {left or 'the top'}, under which "
            f"the base is not known; {_ANEW}"
        )
    # transformers and diffusers would save adapters, and not the model; or transformers the model, under the names that
    # an adapter's file gives to tensors, which it remembers in place of the base's.
    if vars(bare).pop("_hf_peft_config_loaded", False) or _named_by_an_adapter(bare):
        vars(bare).pop("_weight_conversions", None)
    vars(bare).pop("peft_config", None)
    return bare


def _named_by_an_adapter(base: nn.Module) -> bool:
    """Whether the names in files that transformers remembers are an adapter's, which may have been deleted since."""
    remembered: Any = vars(base).get("_weight_conversions") or ()
    return any(pattern.startswith("base_model.") for one in remembered for pattern in one.source_patterns)


def _is_pefts(module: nn.Module) -> bool:
    return any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__)


def _inside(module: Any) -> nn.Module:
    """What PEFT's wrappers stand around."""
    while _is_pefts(module):
        if hasattr(type(module), "get_base_layer"):
            module = module.get_base_layer()
        elif "original_module" in module._modules or hasattr(type(module), "original_module"):
            module = module.original_module
        else:
            break
    found: nn.Module = module
    return found


def _refuse_changed(base: Any, under: dict[nn.Module, nn.Module]) -> None:
    """Refuse a model whose weights under the adapters are not the base's."""
    merged = {name for layer in under for name in getattr(layer, "merged_adapters", ())}
    if merged:
        raise ValueError(
            f"model: {sorted(merged)} are merged into its weights, so that it is not the base any more; call "
            "unmerge_adapter() first (of a pipeline, unfuse_lora())"
        )
    if any(is_dtensor(value) for value in base.parameters()):
        raise ValueError(
            f"model: expected the base without adapters where weights are in shards, found {type(base).__name__} with "
            f"adapters; {_ANEW}"
        )
    for name, config in _configs(base):
        start = getattr(config, "init_lora_weights", None)
        changed = {key: part for key, part in _CHANGES.items() if getattr(config, key, None)}
        if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
            changed["init_lora_weights"] = "its weights"
        if getattr(config, "bias", "none") not in (None, "none"):
            changed["bias"] = "its biases"
        for setting, part in changed.items():
            raise ValueError(
                f"model: adapter {name!r} has {setting}={getattr(config, setting)!r:.60}, which changed {part}, so "
                f"that it is not the base any more; {_ANEW}"
            )


def _configs(base: Any) -> Iterator[tuple[str, Any]]:
    held = getattr(base, "peft_config", {})
    yield from held.items() if hasattr(held, "items") else [("default", held)]
