"""Which models of a pipeline hold adapters, and these with weights of their own for a while."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from nsc_merge.adapters.peft_models import refuse_on_disk
from nsc_merge.integrations.peft import casting_of

_FUSED = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


def adapted(pipe: Any) -> dict[str, nn.Module]:
    """Component -> model, of those that hold adapters."""
    if not callable(getattr(pipe, "get_list_adapters", None)):
        raise TypeError(
            f"pipe: expected a pipeline of diffusers that loads LoRA, found {type(pipe).__name__}; for one model there "
            "are nsc_kernels.integrations.peft.accelerate and nsc_merge.integrations.peft.merge"
        )
    for component in getattr(pipe, "_lora_loadable_modules", ()):
        # diffusers knows no adapters in it, neither those to list nor those to activate.
        if hasattr(getattr(getattr(pipe, component, None), "_orig_mod", None), "peft_config"):
            raise ValueError(
                f"pipe: expected models that diffusers finds adapters in, found pipe.{component} in the wrapper of "
                f"torch.compile(...), which its set_adapters passes over; put pipe.{component}._orig_mod back and "
                f"compile it in place, by pipe.{component}.compile()"
            )
    return {component: getattr(pipe, component) for component in pipe.get_list_adapters()}


def check_in_memory(models: dict[str, nn.Module]) -> None:
    """Refuse models whose tensors hold no numbers between two calls.

    Raises:
        ValueError: saying what to do.
    """
    for component, model in models.items():
        refuse_on_disk(model, f"pipe.{component}")
        if any(value.is_meta for value in model.parameters()):
            raise ValueError(
                f"pipe.{component}: expected weights in memory, found them offloaded one module at a time, between "
                "whose calls tensors hold no numbers; do it before enable_sequential_cpu_offload(), or have "
                "enable_model_cpu_offload() in its place"
            )


def held_in(models: dict[str, nn.Module]) -> dict[str, list[str]]:
    """Component -> the adapters that its model holds."""
    return {component: list(getattr(model, "peft_config", ())) for component, model in models.items()}


def loaded_in(held: dict[str, list[str]]) -> list[str]:
    """All adapters that some model holds, in the order in which they were loaded."""
    return list(dict.fromkeys(name for names in held.values() for name in names))


def check_weights(weights: Any, names: list[str]) -> None:
    """Refuse weights that diffusers would give to other adapters than they seem to be for.

    Raises:
        ValueError: saying what it would do.
    """
    if isinstance(weights, dict) and len(names) > 1:
        raise ValueError(
            "weights: expected a list with an entry for each adapter, found one dictionary, of which diffusers gives "
            f"the first adapter's weights to {names[0]!r} alone and 1 to the others"
        )


def check_taken(pipe: Any, names: Iterable[str]) -> None:
    """Refuse arguments that a pipeline does not take. Some drop these without a word, for the sake of two old ones.

    Raises:
        ValueError: naming the first, and what it takes.
    """
    taken = inspect.signature(pipe.__call__).parameters
    if "prompt" in names and {*taken} >= {"state", "output"} and "prompt" not in taken:
        raise ValueError(
            f"pipe: {type(pipe).__name__} is a modular pipeline, whose blocks take what they need of a state; expected "
            "the pipeline of the same model (DiffusionPipeline) to make images with; merge takes either"
        )
    old = ("callback", "callback_steps") if any(one.kind is one.VAR_KEYWORD for one in taken.values()) else ()
    for name in names:
        if name not in taken and name not in old:
            raise ValueError(f"{name}: {type(pipe).__name__} takes no such argument; it takes {', '.join(taken)}")


def check_runs(models: dict[str, nn.Module]) -> None:
    """Refuse models that compute something else than their weights and adapters say.

    Raises:
        ValueError: naming the model, and what to call first.
    """
    for component, model in models.items():
        if getattr(model, "is_cache_enabled", False):
            raise ValueError(
                f"pipe: expected models that compute each call anew, found pipe.{component} with a cache of earlier "
                f"ones; call pipe.{component}.disable_cache() first"
            )
        if any(casting_of(module) is not None for module in model.modules()):
            raise ValueError(
                f"pipe: expected weights that layers compute with, found pipe.{component} in layerwise casting, which "
                "stores them in fewer bits; load it again without enable_layerwise_casting()"
            )
        if any(_left_out(module) for module in model.modules()):
            raise ValueError(
                f"pipe: expected attention that runs its adapters, found pipe.{component} with fused projections, in "
                f"which diffusers leaves LoRA out; call pipe.{component}.unfuse_qkv_projections() first"
            )


def _left_out(module: nn.Module) -> bool:
    """Whether it is an attention with adapters on projections that it does not call, as it has them in one weight."""
    fused = getattr(module, "fused_projections", False) is True
    return fused and any(isinstance(getattr(module, name, None), BaseTunerLayer) for name in _FUSED)


@contextmanager
def as_weighted(pipe: Any, models: dict[str, nn.Module], names: list[str], weights: Any) -> Iterator[None]:
    """Adapters in use with scalings as ``set_adapters`` sets them; afterwards all is as before: scalings, what was
    active and trained, and whether adapters were disabled.
    """
    # Of LoKr and others as well, beside LoRA: it deactivates them.
    layers: list[Any] = [one for model in models.values() for one in model.modules() if isinstance(one, BaseTunerLayer)]
    before = [(layer, dict(getattr(layer, "scaling", {})), layer.active_adapters) for layer in layers]
    disabled = [layer for layer in layers if layer.disable_adapters]
    trained = [(value, value.requires_grad) for model in models.values() for value in model.parameters()]
    try:
        pipe.set_adapters(names, list(weights) if isinstance(weights, tuple) else weights)
        for layer in disabled:
            layer.enable_adapters(True)
        yield
    finally:
        for layer, scaling, active in before:
            if scaling:
                layer.scaling.update(scaling)
            layer.set_adapter(active)
        for layer in disabled:
            layer.enable_adapters(False)
        for value, required in trained:
            value.requires_grad_(required)
