"""NSC merging of adapters that are loaded in a ``PeftModel``.

from nsc_merge.integrations.peft import merge

coefficients = merge(model, ["a", "b"], data={"a": loader_a, "b": loader_b}, adapter_name="merged")
model.set_adapter("merged")
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

import nsc_merge
from nsc_merge.passes import Calibration
from nsc_merge.result import MergeResult


def merge(
    model: PeftModel,
    adapters: Sequence[str],
    *,
    adapter_name: str,
    data: Calibration | None = None,
    method: str = "nsc",
    **options: Any,
) -> dict[str, dict[str, float]]:
    """Merge loaded adapters into a new one, registered beside them as ``add_weighted_adapter`` does.

    The new adapter is exact: of rank sum of the ranks in every module, the coefficients and each adapter's own
    scaling (also rsLoRA's) and bias folded in, its own scaling 1. It is frozen and not activated.

    Args:
        model: with the adapters loaded. Which adapters are active, and whether they are enabled, plays no role
            and does not change.
        adapters: names of the adapters to merge.
        adapter_name: of the new adapter.
        data: adapter name -> batches; see :func:`nsc_merge.merge`.
        method: as in :func:`nsc_merge.merge`.
        options: of the method.

    Returns:
        Module path in the base model -> adapter name -> coefficient.

    Raises:
        ValueError: if a name is not loaded or has ``modules_to_save``, or ``adapter_name`` is taken; and as
            :func:`nsc_merge.merge`.
        TypeError: if ``model`` is not a ``PeftModel``.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"model: expected a PeftModel, found {type(model).__name__}")
    loaded = list(model.peft_config)
    unknown = [name for name in adapters if name not in loaded]
    if unknown or not adapters:
        raise ValueError(f"adapters: expected names among {loaded}, found {list(adapters)}")
    if adapter_name in loaded:
        raise ValueError(f"adapter_name: {adapter_name!r} is already loaded; loaded are {loaded}")
    trained = [name for name in adapters if getattr(model.peft_config[name], "modules_to_save", None)]
    if trained:
        raise ValueError(
            f"adapters: {trained} have modules_to_save, which a LoRA adapter cannot hold merged; "
            "nsc_merge.merge takes them from their folders"
        )
    sources = {name: nsc_merge.load_adapter(model, name) for name in adapters}
    base = model.get_base_model()
    with _bare(base):
        result = nsc_merge.merge(base, sources, data, method=method, **options)
    _register(model, result, adapter_name, adapters[0])
    return result.coefficients


@contextmanager
def _bare(base: nn.Module) -> Iterator[None]:
    """PEFT's layers replaced by the layers that they wrap."""
    wrapped: dict[str, Any] = {
        path: module for path, module in base.named_modules() if isinstance(module, LoraLayer)
    }

    def put(modules: Mapping[str, nn.Module]) -> None:
        for path, module in modules.items():
            parent, _, name = path.rpartition(".")
            setattr(base.get_submodule(parent), name, module)

    put({path: layer.get_base_layer() for path, layer in wrapped.items()})
    try:
        yield
    finally:
        put(wrapped)


def _register(model: PeftModel, result: MergeResult, adapter_name: str, like: str) -> None:
    ranks = {path: sum(factor.rank for _, factor in result.terms(path)) for path in result.coefficients}
    most = max(ranks.values())
    biased = any(factor.bias is not None for path in ranks for _, factor in result.terms(path))
    # alpha = r everywhere, so that the scaling that PEFT applies is exactly 1.
    fewer = {re.escape(path): rank for path, rank in ranks.items() if rank != most}
    config = LoraConfig(
        r=most,
        lora_alpha=most,
        rank_pattern=dict(fewer),
        alpha_pattern=dict(fewer),
        target_modules=list(ranks),
        lora_bias=biased,
        task_type=model.peft_config[like].task_type,
        base_model_name_or_path=model.peft_config[like].base_model_name_or_path,
        inference_mode=True,
    )
    model.add_adapter(adapter_name, config)
    base = model.get_base_model()
    for path in ranks:
        layer: Any = base.get_submodule(path)
        down, up = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
        terms = list(result.terms(path))
        with torch.no_grad():
            down.weight.copy_(torch.cat([factor.A for _, factor in terms]))
            up.weight.copy_(torch.cat([lam * factor.scaling * factor.B.double() for lam, factor in terms], 1))
            if biased:
                up.bias.zero_()
                for lam, factor in terms:
                    delta = factor.bias_delta()
                    if delta is not None:
                        up.bias.add_(lam * delta)
        for parameter in (*down.parameters(), *up.parameters()):
            parameter.requires_grad_(False)
