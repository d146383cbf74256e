"""Merging of adapters that are loaded in a ``PeftModel``, or in a model of transformers or diffusers.

    from nsc_merge.integrations.peft import merge

    merged = merge(model, ["a", "b"], data={"a": loader_a, "b": loader_b})      # NSC finds the coefficients
    merged = merge(model, ["a", "b"], [0.7, 0.3], "mine", combination_type="svd", svd_rank=16)
    model.set_adapter(merged.adapter_name)

The second form takes what ``add_weighted_adapter`` takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.functional import delete_adapter
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import nsc_merge
from nsc_merge.adapters.algebra.low_rank import concatenated, low_rank
from nsc_merge.adapters.formats.adalora import is_adalora
from nsc_merge.adapters.peft_writer import rank_patterns, targets_of
from nsc_merge.calibration.batches import Calibration
from nsc_merge.integrations.combinations import check_ranks, translated
from nsc_merge.methods import method_of
from nsc_merge.results.result import MergeResult

OUTPUTS = ("cat", "svd")


class NothingToRegister(ValueError):
    """The merged update is zero."""


@dataclass(frozen=True)
class Merged:
    """What :func:`merge` registered.

    Attributes:
        adapter_name: of the new adapter.
        coefficients: module path in the base model -> adapter name -> coefficient, empty for methods without.
        errors: module path -> relative error (Frobenius) of the new adapter's update; 0 where it is exact.
        result: the merge itself, which can also be applied to the base model or saved.
    """

    adapter_name: str
    coefficients: dict[str, dict[str, float]]
    errors: dict[str, float]
    result: MergeResult = field(repr=False)


def merge(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float] | None = None,
    adapter_name: str = "merged",
    combination_type: str | None = None,
    svd_rank: int | None = None,
    *,
    data: Calibration | None = None,
    method: str | None = None,
    output: str | None = None,
    rank: int | None = None,
    **options: Any,
) -> Merged:
    """Merge loaded adapters into a new one, registered beside them as ``add_weighted_adapter`` does.

    The new adapter has each adapter's own scaling (what the layers run: also rsLoRA's, and what ``set_scale`` or
    ``hotswap_adapter`` left), coefficients and biases folded in; its own scaling is 1. It is frozen and not activated.

    Args:
        model: with the adapters loaded: a ``PeftModel``, or a model of transformers or diffusers with adapters put in
            it (``add_adapter``, a pipeline's ``load_lora_weights``), or what ``torch.compile`` made of one. Which
            adapters are active, and whether they are enabled, plays no role and does not change.
        adapters: names of the adapters to merge.
        weights: one for each adapter: the coefficients of task arithmetic, where NSC starts from, or the weights of
            methods that have them.
        adapter_name: of the new adapter.
        combination_type: ``add_weighted_adapter``'s name for a method and an output, each that it takes
            (:data:`nsc_merge.integrations.combinations.COMBINATIONS`), with its ``density`` and
            ``majority_sign_method`` among the options. ``svd_full_matrices`` changes nothing; ``svd_clamp`` and
            ``svd_driver`` are refused.
        svd_rank: ``add_weighted_adapter``'s name for ``rank``; as there, it plays no role where nothing is truncated.
        data: adapter name -> batches; see :func:`nsc_merge.merge`.
        method: as in :func:`nsc_merge.merge`, ``"nsc"`` by default.
        output: ``"cat"`` is exact, of rank sum of the ranks in every module; ``"svd"`` truncates every module to
            ``rank`` by its singular values. By default ``"cat"``, or ``"svd"`` where a rank is given.
        rank: of ``"svd"``; by default the largest rank of the adapters, as ``add_weighted_adapter`` finds it in their
            configurations.
        options: of the method.

    Raises:
        ValueError: if a name is not loaded or has ``modules_to_save``, if ``adapter_name`` is taken or is none that
            PEFT takes, if adapters are merged into the model's weights (``merge_adapter``), if the method's update has
            no exact adapter or is not one for all tasks; and as :func:`nsc_merge.merge`.
        TypeError: if ``model`` holds no adapters of PEFT.
    """
    # In torch.compile's wrapper; what was compiled is traced anew for the new adapter.
    model = getattr(model, "_orig_mod", model)
    _check(model, adapters, adapter_name)
    if combination_type is not None:
        method, output, options = translated(combination_type, method, output, options)
        svd_rank = svd_rank if output == "svd" else None
    method, output, rank = _form(method, output, svd_rank, rank)
    if weights is not None:
        options = {**_weighted(method, adapters, weights), **options}
    sources = {name: nsc_merge.load_adapter(model, name, dora="refuse") for name in adapters}
    if combination_type is not None:
        check_ranks(combination_type, {name: adapter.factors for name, adapter in sources.items()})
    if output == "svd" and rank is None:
        rank = max(factor.rank for adapter in sources.values() for factor in adapter.factors.values())
        # Of the configurations, too, as PEFT takes it: where a pattern names every layer none is of that rank.
        rank = max(rank, *(_largest_rank(model, name) for name in adapters))
    result = nsc_merge.merge(model, sources, data, method=method, **options)
    errors = _register(model, result, adapter_name, adapters[0], rank)
    return Merged(adapter_name, result.coefficients, errors, result)


def _check(model: Any, adapters: Sequence[str], adapter_name: str) -> None:
    if not isinstance(model, nn.Module) or not hasattr(model, "peft_config"):
        raise TypeError(
            f"model: expected a PeftModel or a model with adapters in it, found {type(model).__name__} without any; of "
            "a pipeline, give the model that holds them, such as pipe.unet or pipe.transformer"
        )
    held: Any = model.peft_config
    loaded = list(held)
    names = [adapters] if isinstance(adapters, str) else list(adapters)
    if isinstance(adapters, str) or not names or len(set(names)) < len(names) or set(names) - set(loaded):
        raise ValueError(f"adapters: expected different names among {loaded}, found {adapters!r}")
    if adapter_name in loaded:
        raise ValueError(f"adapter_name: {adapter_name!r} is already loaded; loaded are {loaded}")
    try:
        # As PEFT keeps adapters; it would say so only after the merge.
        nn.ModuleDict({adapter_name: nn.Identity()})
    except (KeyError, TypeError) as error:
        raise ValueError(f"adapter_name: expected a name that PEFT takes, found {adapter_name!r}: {error}") from error
    merged = {name for layer in model.modules() if isinstance(layer, LoraLayer) for name in layer.merged_adapters}
    if merged:
        raise ValueError(
            f"model: {sorted(merged)} are merged into its weights, so that it is not the base model any more; call "
            "unmerge_adapter() first (of a pipeline, unfuse_lora())"
        )
    allocated = [name for name in adapters if is_adalora(held[name].to_dict())]
    if allocated:
        raise ValueError(
            f"adapters: {allocated} are AdaLoRA, beside which PEFT holds no plain LoRA, as the merge is; "
            "nsc_merge.merge takes them, from this model or from their folders"
        )
    for setting in ("modules_to_save", "trainable_token_indices", "target_parameters"):
        trained = [name for name in adapters if getattr(held[name], setting, None)]
        if trained:
            raise ValueError(
                f"adapters: {trained} have {setting}, which is not merged in place; "
                "nsc_merge.merge takes them from their folders"
            )
    dora = [name for name in adapters if getattr(held[name], "use_dora", False)]
    if dora:
        raise ValueError(
            f"adapters: {dora} are DoRA (use_dora), expected plain LoRA: what is registered here holds no magnitudes; "
            "nsc_merge.merge takes them from their folders, and writes a DoRA adapter for load_adapter"
        )


def _form(
    method: str | None, output: str | None, svd_rank: int | None, rank: int | None
) -> tuple[str, str, int | None]:
    """Method, output and rank, with what was left open."""
    if rank is not None and svd_rank is not None:
        raise ValueError(f"svd_rank: expected it or rank, found svd_rank={svd_rank!r} and rank={rank!r}")
    rank = svd_rank if rank is None else rank
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank: expected a whole number of at least 1, found {rank!r}")
    if output is None:
        output = "cat" if rank is None else "svd"
    if output not in OUTPUTS:
        raise ValueError(f"output: expected one of {list(OUTPUTS)}, found {output!r}")
    if output == "cat" and rank is not None:
        raise ValueError(f"rank: output 'cat' has the sum of the ranks, expected output 'svd' with rank={rank}")
    return method or "nsc", output, rank


def _largest_rank(model: Any, adapter: str) -> int:
    config = model.peft_config[adapter]
    return max([config.r, *(config.rank_pattern or {}).values()])


def _weighted(method: str, adapters: Sequence[str], weights: Sequence[float]) -> dict[str, Any]:
    chosen = method_of(method)
    option = chosen.weighted
    if option not in chosen.option_names:
        raise ValueError(f"weights: method {method!r} takes none")
    # Of a mapping the names would be taken, which may be numbers.
    if isinstance(weights, Mapping | str) or len(weights) != len(adapters):
        found = weights if isinstance(weights, Mapping | str) else list(weights)
        raise ValueError(f"weights: expected a list, with one for each of {list(adapters)} in turn, found {found!r}")
    return {option: dict(zip(adapters, map(float, weights), strict=True))}


def _base(model: Any) -> nn.Module:
    base: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    return base


def _add(model: Any, adapter_name: str, config: LoraConfig) -> None:
    """Add an adapter, with the active ones and what is trained left as they are."""
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
        return
    active = {layer: layer.active_adapters for layer in model.modules() if isinstance(layer, LoraLayer)}
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    # Not by the model's own add_adapter, whose arguments differ, and which activates it.
    inject_adapter_in_model(config, model, adapter_name)
    for layer, names in active.items():
        layer.set_adapter(names)
    for parameter, before in trained.items():
        parameter.requires_grad_(before)


def _register(
    model: Any, result: MergeResult, adapter_name: str, like: str, rank: int | None
) -> dict[str, float]:
    """Add the merged update as an adapter, truncated to ``rank`` if there is one; relative error per module."""
    if result.per_task:
        raise ValueError(
            f"method: {result.method!r} gives every task an update of its own, which one adapter cannot hold"
        )
    updates: dict[str, tuple[Tensor, Tensor]] = {}
    errors = {}
    for path in result.paths:
        terms = list(result.terms(path))
        if rank is None and any(factor.dense is not None for _, factor in terms):
            raise ValueError(
                f"output: the update of method {result.method!r} is of full rank, which no small adapter holds "
                "exactly: expected a rank to truncate it to (output 'svd'), found output 'cat'"
            )
        A, B, errors[path] = (*concatenated(terms), 0.0) if rank is None else low_rank(terms, rank)
        # PEFT has no adapters of rank 0; leaving the module out says the same, unless there is a bias.
        if A.shape[0] == 0 and result.bias_delta(path) is not None:
            A, B = A.new_zeros(1, A.shape[1]), B.new_zeros(B.shape[0], 1)
        if A.shape[0]:
            updates[path] = A, B
    if not updates:
        raise NothingToRegister(f"method: the update of {result.method!r} is zero, there is nothing to register")
    biases = {path: result.bias_delta(path) for path in updates}
    biased = any(bias is not None for bias in biases.values())
    ranks = {path: A.shape[0] for path, (A, _) in updates.items()}
    most = max(ranks.values())
    # alpha = r everywhere, so that the scaling that PEFT applies is exactly 1.
    fewer = rank_patterns(ranks, most)
    config = LoraConfig(
        r=most,
        lora_alpha=most,
        rank_pattern=dict(fewer),
        alpha_pattern=dict(fewer),
        target_modules=targets_of(list(ranks), [path for path, _ in _base(model).named_modules()]),
        lora_bias=biased,
        task_type=model.peft_config[like].task_type,
        base_model_name_or_path=model.peft_config[like].base_model_name_or_path,
        inference_mode=True,
    )
    _add(model, adapter_name, config)
    try:
        _fill(_base(model), adapter_name, updates, biases if biased else None)
        _offload_as_before(_base(model))
    except BaseException:
        remove(model, adapter_name)
        raise
    return errors


def _fill(
    base: nn.Module,
    adapter_name: str,
    updates: Mapping[str, tuple[Tensor, Tensor]],
    biases: Mapping[str, Tensor | None] | None,
) -> None:
    """Put factors, and biases where the new adapter has some, into the layers of an adapter, and freeze it."""
    for path, (A, B) in updates.items():
        layer: Any = base.get_submodule(path)
        if adapter_name in layer.lora_embedding_A:
            with torch.no_grad():
                for own, value in ((layer.lora_embedding_A, B), (layer.lora_embedding_B, A)):
                    own[adapter_name].copy_(value.t()).requires_grad_(False)
            continue
        down, up = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
        if (dtype := _cast_to(layer)) is not None:
            down.to(dtype)
            up.to(dtype)
        with torch.no_grad():
            down.weight.copy_(A.view_as(down.weight))
            up.weight.copy_(B.view_as(up.weight))
            if biases is not None:
                bias = biases[path]
                up.bias.copy_(torch.zeros(len(up.bias), device="cpu") if bias is None else bias)
        for parameter in (*down.parameters(), *up.parameters()):
            parameter.requires_grad_(False)


def _cast_to(layer: Any) -> torch.dtype | None:
    """What diffusers' layerwise casting computes a layer in. New factors are not among what it casts, and PEFT makes
    them in the dtype that the base is stored in."""
    found: torch.dtype | None = getattr(casting_of(layer.get_base_layer()), "compute_dtype", None)
    return found


def casting_of(module: nn.Module) -> Any:
    """The hook by which diffusers' layerwise casting stores a module in fewer bits; None where it does not."""
    registry: Any = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook("layerwise_casting")


def _offload_as_before(model: nn.Module) -> None:
    """Have diffusers' group offloading take in the new adapter, as after its own loading of one."""
    if any(getattr(vars(one).get("_diffusers_hook"), "hooks", {}).get("group_offloading") for one in model.modules()):
        from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

        _maybe_remove_and_reapply_group_offloading(model)


def remove(model: Any, adapter_name: str) -> None:
    """Take an adapter off that was added and is not active."""
    if isinstance(model, PeftModel):
        model.delete_adapter(adapter_name)
        return
    delete_adapter(model, adapter_name, prefix="lora_")
    del model.peft_config[adapter_name]
