"""Fits adapters to a model: today's module names, shared trainables as updates, heads set aside."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from nsc_merge.adapters import Adapter, Factor
from nsc_merge.models.bases.quantised import Linear, is_linear, is_quantised, stored_or_dequantised
from nsc_merge.models.bases.sharded import class_name
from nsc_merge.models.bases.stored_weights import numbers_of
from nsc_merge.models.families import Family, find_family

SHARED_POLICIES = ("lambda", "mean", "first")


def fit(
    adapters: Mapping[str, Adapter], model: nn.Module, shared_modules: str = "lambda"
) -> dict[str, Adapter]:
    """Adapters whose every path is one of ``model``, as far as the family's rules can tell.

    Module names of older releases of transformers, and of the same model with or without its head, become
    those of ``model``; a path that no rule helps is kept, for :func:`nsc_merge.models.attachment.adapted_linears` to
    refuse by name. DoRA updates become plain ones.

    Of the modules trained in full (``modules_to_save``), those of the base's own are shared by all tasks and become
    dense updates; the others are heads and stay in :attr:`Adapter.trained`. The base's own are all that the model
    needs before its head, such as LLaVA's projector, and, if it is a language model, its head: one that
    ``get_output_embeddings()`` returns was pretrained with the rest, as ``lm_head``. A classifier's (``score``,
    ``classifier``) begins anew with every task. The adapter's notes say which module is taken for what. Where the
    numbers of a quantised linear are needed, for DoRA and modules trained in full, they are those that it computes
    with, as in PEFT.

    Args:
        adapters: task -> adapter as read.
        model: the base model.
        shared_modules: what happens to shared modules: ``"lambda"`` gives each linear one coefficient per
            task like an adapted one, ``"mean"`` averages them over the tasks that trained them, ``"first"``
            takes the first task's.

    Raises:
        ValueError: naming the adapter and the module, if two paths become one, if a shared module is not
            linear or not in the model, or if its weight is another's too (tied), if a shape does not fit, if weights
            of the base that were saved along are not the model's, or if a linear that some task trained in full has
            LoRA for another and ``shared_modules`` is not ``"lambda"``; and if the model holds adapters itself.
    """
    if shared_modules not in SHARED_POLICIES:
        raise ValueError(
            f"shared_modules: expected one of {list(SHARED_POLICIES)}, found {shared_modules!r}"
        )
    modules = dict(model.named_modules())
    _refuse_adapted(model, modules)
    family = find_family(model)
    trunk = getattr(model, family.prefill if family else "base_model", model)
    # What the bare model is called under a head, this model's or another's.
    prefix = next((name for name, part in modules.items() if name and part is trunk), None)
    prefix = str(getattr(model, "base_model_prefix", "")) if prefix is None else prefix
    own = _own_parameters(model, trunk)
    fitted = {}
    for task, adapter in adapters.items():
        factors = _renamed(task, adapter.factors, modules, family, prefix)
        trained = _renamed_parameters(task, adapter.trained, modules, family, prefix)
        _check_base(task, _renamed_parameters(task, adapter.base_weights, modules, family, prefix), model)
        notes = list(adapter.notes)
        for path, factor in factors.items():
            module = modules.get(path)
            if factor.magnitude is not None and module is not None and is_linear(module):
                factors[path], error = _without_dora(task, path, factor, module, model)
                notes.append(f"{path}: DoRA converted at rank {factor.rank}, relative error {error:.3g}")
        shared = _shared(task, {k: v for k, v in trained.items() if k in own}, model)
        twice = sorted(shared.keys() & factors.keys())
        if twice:
            raise ValueError(f"adapters[{task!r}]: {twice[0]} was trained in full and has LoRA, expected one of them")
        factors.update(shared)
        heads = {name: value for name, value in trained.items() if name not in own}
        unknown = [name for name in heads if prefix and name.startswith(f"{prefix}.")]
        if unknown:
            raise ValueError(
                f"adapters[{task!r}]: {unknown[0]} was trained in full, but {type(model).__name__} has no such "
                f"parameter below {prefix!r}; expected the model that the adapter was trained on"
            )
        notes += [f"{path}: trained in full, the base's own: shared and merged (shared_modules)" for path in shared]
        notes += [
            f"{path}: trained in full, {_whose(path, model, modules)}: kept in heads/, not merged"
            for path in dict.fromkeys(name.rpartition(".")[0] for name in heads)
        ]
        fitted[task] = replace(
            adapter, factors=factors, trained=heads, notes=tuple(dict.fromkeys(notes)), base_weights={}
        )
    return _by_policy(fitted, shared_modules)


def _refuse_adapted(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Refuse a base that runs adapters itself: the merge would be of the linears under them."""
    # PEFT's layers around a linear, and around a module that is trained in full.
    wrapped = [
        path
        for path, module in modules.items()
        if hasattr(module, "merged_adapters") and (hasattr(module, "base_layer") or hasattr(module, "original_module"))
    ]
    if wrapped:
        raise ValueError(
            f"model: expected the base model without adapters, found {type(module := modules[wrapped[0]]).__name__} of "
            f"{type(module).__module__.partition('.')[0]} at {wrapped[0]}; the base is what a PeftModel's unload() "
            "returns (its get_base_model() still holds the adapters), or a model loaded anew"
        )


def _whose(path: str, model: nn.Module, modules: Collection[str]) -> str:
    return "the task's own head" if path in modules else f"not in {class_name(model)}"


def _own_parameters(model: nn.Module, trunk: nn.Module) -> set[str]:
    """Names of the parameters that are the base's own, and no task's head."""
    named = dict(model.named_parameters(remove_duplicate=False))
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None:
        return set(named)
    inside = {id(parameter) for parameter in trunk.parameters()}
    return {name for name, value in named.items() if id(value) in inside}


def _check_base(task: str, saved: Mapping[str, Tensor], model: nn.Module) -> None:
    """Refuse an adapter of another base, as far as weights of the base were saved with it."""
    held = dict(model.named_parameters(remove_duplicate=False))
    for name, value in saved.items():
        base = held.get(name)
        owner = None if base is None else model.get_submodule(name.rpartition(".")[0])
        if owner is not None and is_linear(owner) and is_quantised(owner):
            raise ValueError(
                f"adapters[{task!r}]: {name} of the base was saved with the adapter, but is quantised in the model, so "
                "that they cannot be compared; expected an adapter saved with save_embedding_layers=False"
            )
        if base is None or base.shape != value.shape:
            found = "no such parameter" if base is None else f"shape {list(base.shape)}"
            raise ValueError(
                f"adapters[{task!r}]: {name} of the base was saved with the adapter, in shape {list(value.shape)}; "
                f"found {found} in {type(model).__name__}: expected the base that it was trained on, or one resized "
                "as that was (resize_token_embeddings)"
            )
        # One of the two may have been rounded to the other's dtype.
        mine = numbers_of(model, name, base).detach().cpu()
        if not (torch.equal(mine.to(value.dtype), value) or torch.equal(mine, value.to(mine.dtype))):
            raise ValueError(
                f"adapters[{task!r}]: {name} of the base was saved with the adapter and differs from the model's; "
                "expected the base that it was trained on, with these values in it"
            )


def absent(adapters: Mapping[str, Adapter]) -> dict[str, list[str]]:
    """Adapted module path -> tasks whose adapter does not touch it and whose coefficient is therefore 0."""
    paths = dict.fromkeys(path for adapter in adapters.values() for path in adapter.factors)
    missing = {path: [task for task in adapters if path not in adapters[task].factors] for path in paths}
    return {path: tasks for path, tasks in missing.items() if tasks}


def _renamed(
    task: str, factors: Mapping[str, Factor], names: Collection[str], family: Family | None, prefix: str
) -> dict[str, Factor]:
    renamed: dict[str, Factor] = {}
    for path, factor in factors.items():
        found = _today(path, names, family, prefix)
        if found in renamed:
            raise ValueError(f"adapters[{task!r}]: {path} and another module both mean {found} of the model")
        renamed[found] = factor
    return renamed


def _renamed_parameters(
    task: str, trained: Mapping[str, Tensor], names: Collection[str], family: Family | None, prefix: str
) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for key, value in trained.items():
        path, _, parameter = key.rpartition(".")
        found = f"{_today(path, names, family, prefix)}.{parameter}"
        if found in renamed:
            raise ValueError(f"adapters[{task!r}]: {key} and another tensor both mean {found} of the model")
        renamed[found] = value
    return renamed


def _today(path: str, names: Collection[str], family: Family | None, prefix: str) -> str:
    stages = [path]
    for pattern, replacement in family.legacy if family else ():
        stages.append(re.sub(pattern, replacement, stages[-1]))
    for stage in stages:
        # An adapter of the bare model fits the one with a head, and the other way round.
        for candidate in (stage, stage.removeprefix(f"{prefix}."), f"{prefix}.{stage}"):
            if candidate in names:
                return candidate
    return path


def _without_dora(
    task: str, path: str, factor: Factor, linear: Linear, model: nn.Module
) -> tuple[Factor, float]:
    """The best update of the same rank in place of DoRA's, and its relative error."""
    assert factor.magnitude is not None
    if (linear.out_features, linear.in_features) != (factor.B.shape[0], factor.A.shape[1]):
        raise ValueError(
            f"adapters[{task!r}]: {path}: expected an update of shape {[linear.out_features, linear.in_features]}, "
            f"found [{factor.B.shape[0]}, {factor.A.shape[1]}]"
        )
    base = stored_or_dequantised(model, f"{path}.weight").whole().double().cpu()
    moved = base + factor.delta().cpu()
    moved *= (factor.magnitude.double().cpu() / moved.norm(dim=1))[:, None]
    left, sigma, right = torch.linalg.svd(moved - base, full_matrices=False)
    kept = min(factor.rank, sigma.numel())
    roots = sigma[:kept].sqrt()
    converted = Factor((roots[:, None] * right[:kept]).float(), (left[:, :kept] * roots).float(), 1.0)
    return converted, float(sigma[kept:].norm() / sigma.norm()) if sigma.any() else 0.0


def _shared(task: str, trained: Mapping[str, Tensor], model: nn.Module) -> dict[str, Factor]:
    values: dict[str, dict[str, Tensor]] = {}
    for name, value in trained.items():
        path, _, parameter = name.rpartition(".")
        values.setdefault(path, {})[parameter] = value
    return {path: _dense(f"adapters[{task!r}]: {path}", path, tensors, model) for path, tensors in values.items()}


def _dense(what: str, path: str, tensors: Mapping[str, Tensor], model: nn.Module) -> Factor:
    """The update of a linear that was trained in full."""
    linear: Linear = model.get_submodule(path)
    if not is_linear(linear):
        raise ValueError(
            f"{what} was trained in full (modules_to_save) and all tasks share it, but only nn.Linear can be merged, "
            f"found {type(linear).__name__}; expected an adapter that leaves it as the base has it"
        )
    named = model.named_parameters(remove_duplicate=False)
    weight = getattr(linear, "weight", None)
    tied = [name for name, value in named if value is weight and name != f"{path}.weight"]
    if tied:
        raise ValueError(
            f"{what} was trained in full on its own, but in the model its weight is {tied[0]} too (tied); expected a "
            f"base with a copy: model.{path}.weight = torch.nn.Parameter(model.{path}.weight.detach().clone()) and "
            "model.config.tie_word_embeddings = False"
        )
    deltas = {}
    for parameter, value in tensors.items():
        base = stored_or_dequantised(model, f"{path}.{parameter}").whole()
        if value.shape != base.shape:
            raise ValueError(
                f"{what}.{parameter}: expected shape {list(base.shape)}, found {list(value.shape)}"
            )
        deltas[parameter] = (value.double().cpu() - base.double().cpu()).float()
    weight = deltas.get("weight", torch.zeros(linear.out_features, linear.in_features))
    no_rank = weight.new_empty(0, linear.in_features), weight.new_empty(linear.out_features, 0)
    return Factor(*no_rank, 1.0, bias=deltas.get("bias"), dense=weight)


def _by_policy(adapters: dict[str, Adapter], policy: str) -> dict[str, Adapter]:
    if policy == "lambda":
        return adapters
    holders: dict[str, list[str]] = {}
    for task, adapter in adapters.items():
        for path, factor in adapter.factors.items():
            if factor.dense is not None:
                holders.setdefault(path, []).append(task)
    for path, tasks in holders.items():
        others = [task for task, adapter in adapters.items() if path in adapter.factors and task not in tasks]
        if others:
            raise ValueError(
                f"shared_modules: {path} was trained in full for {tasks}, but has LoRA for {others}; "
                f"expected 'lambda', found {policy!r}, which needs one kind"
            )
    fixed = {}
    for task, adapter in adapters.items():
        factors = dict(adapter.factors)
        for path, tasks in holders.items():
            if task in tasks:
                share = 1 / len(tasks) if policy == "mean" else float(task == tasks[0])
                factors[path] = replace(factors[path], fixed=share)
        fixed[task] = replace(adapter, factors=factors)
    return fixed
