"""Fits adapters to a model: today's module names, shared trainables as updates, heads set aside."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from nsc_merge.adapters import Adapter, Factor
from nsc_merge.adapters.algebra.low_rank import rows_of
from nsc_merge.models.bases.quantised import Linear, is_linear, stored_or_dequantised
from nsc_merge.models.bases.sharded import class_name
from nsc_merge.models.block_finding import trunk_of
from nsc_merge.models.families import find_family
from nsc_merge.models.merged.matrices import is_matrix_alone, module_at
from nsc_merge.models.merged.stacks import updates_of_experts, updates_of_stacks
from nsc_merge.models.renaming import name_today, rules_of
from nsc_merge.models.trained_in_full import (
    by_policy,
    check_base,
    classifier_tensors,
    own_tensors,
    update_of_rows,
    updates_of_whole,
)

SHARED_POLICIES = ("lambda", "mean", "first")

Value = TypeVar("Value")


def fit(
    adapters: Mapping[str, Adapter], model: nn.Module, shared_modules: str = "lambda"
) -> dict[str, Adapter]:
    """Adapters whose every path is one of ``model``, as far as the family's rules can tell.

    Module names of older releases of transformers, and of the same model with or without its head, become
    those of ``model``; a path that no rule helps is kept, for :func:`nsc_merge.models.attachment.adapted_linears` to
    refuse by name.

    DoRA runs ``m * (W + s B A) / norm`` with the norms of the rows. That is ``W + gain * W + (1 + gain) * s B A`` with
    ``gain = m / norm - 1``, so that each becomes an exact update, which scales with its coefficient and adds to others
    (``s`` stays the factor's scaling, and its ``gain`` is over that);
    :attr:`nsc_merge.adapters.Adapter.dora` may ask for plain ones instead. A merge of directions and magnitudes apart,
    renormalised by the merged weight, is another one. Norms are in float64; PEFT has them in the weight's dtype.

    Of the modules trained in full (``modules_to_save``), those of the base's own are shared by all tasks and become
    dense updates; the others are heads and stay in :attr:`Adapter.trained`. The base's own are all that the model
    needs before its head, such as LLaVA's projector, and, if it is a language model, its head: one that
    ``get_output_embeddings()`` returns was pretrained with the rest, as ``lm_head``. A classifier's (``score``,
    ``classifier``; what ``get_classifier()`` returns, as timm has it) begins anew with every task. The adapter's notes
    say which module is taken for what. Where the numbers of a quantised linear are needed, for DoRA and modules trained
    in full, they are those that it computes with, as in PEFT.

    Args:
        adapters: task -> adapter as read.
        model: the base model.
        shared_modules: what happens to shared modules: ``"lambda"`` gives each linear one coefficient per
            task like an adapted one, ``"mean"`` averages them over the tasks that trained them, ``"first"``
            takes the first task's.

    Raises:
        ValueError: naming the adapter and the module, if two paths become one, if a shared module is no linear,
            embedding, norm or convolution, or not in the model, if its weight is another's too (tied), or a buffer of
            it was changed, if a shape does not fit, if weights of the base that were saved along are not the model's,
            or if a module that some task trained in full has LoRA for another and ``shared_modules`` is not
            ``"lambda"``; and if the model holds adapters itself.
    """
    if shared_modules not in SHARED_POLICIES:
        raise ValueError(
            f"shared_modules: expected one of {list(SHARED_POLICIES)}, found {shared_modules!r}"
        )
    modules = dict(model.named_modules())
    _refuse_adapted(modules)
    trunk, prefix = _trunk(model, modules)
    own, classifier = own_tensors(model, trunk), classifier_tensors(model)
    fitted = {}
    for task, adapter in renamed(adapters, model).items():
        # Those that were made in memory may be elsewhere.
        factors = {path: factor.cpu() for path, factor in adapter.factors.items()}
        trained, notes = adapter.trained, list(adapter.notes)
        check_base(task, adapter.base_weights, model)
        for path, factor in factors.items():
            module = modules.get(path)
            if factor.magnitude is not None and module is not None:
                factors[path], note = _of_dora(task, path, factor, module, model, exact=adapter.dora != "convert")
                notes += [note] if note else []
        shared, about = updates_of_whole(task, {k: v for k, v in trained.items() if k in own}, model)
        twice = sorted(shared.keys() & factors.keys())
        if twice:
            raise ValueError(f"adapters[{task!r}]: {twice[0]} was trained in full and has LoRA, expected one of them")
        factors.update(shared)
        heads = {name: value for name, value in trained.items() if name not in own}
        unknown = [name for name in heads if prefix and name.startswith(f"{prefix}.") and name not in classifier]
        if unknown:
            raise ValueError(
                f"adapters[{task!r}]: {unknown[0]} was trained in full, but {type(model).__name__} has no such "
                f"parameter below {prefix!r}; expected the model that the adapter was trained on"
            )
        for path, rows in adapter.token_rows.items():
            if path in factors:
                raise ValueError(
                    f"adapters[{task!r}]: {path} has rows of tokens (trainable_token_indices) and other updates, which "
                    "PEFT does not train together; expected one of them: take the other's tensors out of the file"
                )
            factors[path] = update_of_rows(task, path, rows, model)
            about[path] = f"rows of {len(rows.indices)} tokens trained (trainable_token_indices): merged"
        notes += [f"{path}: {note}" for path, note in about.items()]
        notes += [
            f"{path}: trained in full, {_whose(path, model, modules)}: kept in heads/, not merged"
            for path in dict.fromkeys(name.rpartition(".")[0] for name in heads)
        ]
        fitted[task] = replace(
            adapter, factors=factors, trained=heads, notes=tuple(dict.fromkeys(notes)), base_weights={},
            token_rows={},
        )
    return by_policy(fitted, shared_modules)


def renamed(adapters: Mapping[str, Adapter], model: nn.Module) -> dict[str, Adapter]:
    """Adapters whose every path is one of ``model``, as far as the family's rules can tell.

    Raises:
        ValueError: naming the adapter and the module, if two paths become one.
    """
    modules = dict(model.named_modules())
    rules, prefix = rules_of(model, find_family(model)), _trunk(model, modules)[1]

    @functools.cache
    def today(path: str) -> str:
        return name_today(path, modules, rules, prefix)

    def of_parameter(name: str) -> str:
        path, _, parameter = name.rpartition(".")
        return f"{today(path)}.{parameter}"

    return {
        task: replace(
            adapter,
            notes=tuple(dict.fromkeys((*adapter.notes, *_translations(adapter.factors, today)))),
            factors=_renamed(task, _with_matrices(task, adapter, model, today), today),
            stacks={},
            trained=_renamed(task, adapter.trained, of_parameter),
            base_weights=_renamed(task, adapter.base_weights, of_parameter),
            token_rows=_renamed(task, adapter.token_rows, today),
        )
        for task, adapter in adapters.items()
    }


def _translations(paths: Iterable[str], today: Callable[[str], str]) -> list[str]:
    """A sentence on modules that are called otherwise in the model, if there are such."""
    named = ((path, today(path)) for path in paths)
    # The same model with or without its head is no other.
    moved = {path: found for path, found in named if not (path.endswith(found) or found.endswith(path))}
    if not moved:
        return []
    first = next(iter(moved))
    modules = f"{len(moved)} modules are" if len(moved) > 1 else "1 module is"
    return [f"{modules} called otherwise in this model: {first} is taken for {moved[first]}"]


def _with_matrices(
    task: str, adapter: Adapter, model: nn.Module, today: Callable[[str], str]
) -> dict[str, Factor]:
    """An adapter's updates with those of experts and routers under the paths of their matrices."""
    of_stacks = updates_of_stacks(task, adapter.stacks, model, today)
    of_experts, used = updates_of_experts(task, adapter.factors, model, today)
    others = {}
    for path, factor in adapter.factors.items():
        if path not in used:
            named = today(path)
            module = module_at(model, named) if factor.bias is None and factor.magnitude is None else None
            router = module is not None and is_matrix_alone(module)
            others[f"{named}.weight" if router else path] = factor
    twice = sorted((of_stacks.keys() & of_experts.keys()) | (others.keys() & {*of_stacks, *of_experts}))
    if twice:
        raise ValueError(f"adapters[{task!r}]: {twice[0]} has LoRA twice, on its module and on its parameter")
    return {**others, **of_experts, **of_stacks}


def _trunk(model: nn.Module, modules: Mapping[str, nn.Module]) -> tuple[nn.Module, str]:
    """The model without its head, and what it is called under one, this model's or another's."""
    family = find_family(model)
    trunk = trunk_of(model, family.prefill if family else "base_model")
    prefix = next((name for name, part in modules.items() if name and part is trunk), None)
    return trunk, str(getattr(model, "base_model_prefix", "")) if prefix is None else prefix


def _refuse_adapted(modules: Mapping[str, nn.Module]) -> None:
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


def absent(adapters: Mapping[str, Adapter]) -> dict[str, list[str]]:
    """Adapted module path -> tasks whose adapter does not touch it and whose coefficient is therefore 0."""
    paths = dict.fromkeys(path for adapter in adapters.values() for path in adapter.factors)
    missing = {path: [task for task in adapters if path not in adapters[task].factors] for path in paths}
    return {path: tasks for path, tasks in missing.items() if tasks}


def _renamed(task: str, named: Mapping[str, Value], today: Callable[[str], str]) -> dict[str, Value]:
    renamed: dict[str, Value] = {}
    for name, value in named.items():
        found = today(name)
        if found in renamed:
            raise ValueError(f"adapters[{task!r}]: {name} and another name both mean {found} of the model")
        renamed[found] = value
    return renamed


def _of_dora(
    task: str, path: str, factor: Factor, linear: Linear, model: nn.Module, *, exact: bool
) -> tuple[Factor, str]:
    """The update that a linear with DoRA makes: exact, or the best plain one of the same rank and a note of its error.

    Raises:
        ValueError: if the module is no linear, or a shape does not fit, or if a row has no norm to divide by.
    """
    assert factor.magnitude is not None
    if not is_linear(linear):
        raise ValueError(
            f"adapters[{task!r}]: {path}: DoRA on {type(linear).__name__} is not merged, expected it on linears that "
            "keep their weight as nn.Linear does; train with use_dora=False, or leave this task out of the merge"
        )
    if (linear.out_features, linear.in_features) != (factor.B.shape[0], factor.A.shape[1]):
        raise ValueError(
            f"adapters[{task!r}]: {path}: expected an update of shape {[linear.out_features, linear.in_features]}, "
            f"found [{factor.B.shape[0]}, {factor.A.shape[1]}]"
        )
    weight = stored_or_dequantised(model, f"{path}.weight")
    norms = weight.row_norms(rows_of([(1.0, factor)], weight.device))
    if not norms.all():
        raise ValueError(
            f"adapters[{task!r}]: {path}: DoRA divides by the norms of the rows of the base's weight with the update, "
            f"expected them above 0, found 0 in row {int(norms.argmin())}; leave this task out of the merge"
        )
    grown = factor.magnitude.double().cpu() / norms
    if exact:
        # As wide as they were read: methods multiply factors of different tasks.
        kind = torch.promote_types(torch.promote_types(factor.A.dtype, factor.B.dtype), torch.float32)
        # The scaling stays where it is, as methods of factors share it between A and B. One of 0 leaves the gain.
        scaling = factor.scaling or 1.0
        B = (grown[:, None] * (factor.scaling / scaling) * factor.B.double().cpu()).to(kind)
        gain = (grown - 1) / scaling
        return replace(factor, A=factor.A.to(kind), B=B, scaling=scaling, magnitude=None, gain=gain), ""
    base = weight.whole().double().cpu()
    moved = (base + factor.delta().cpu()).mul_(grown[:, None])
    left, sigma, right = torch.linalg.svd(moved - base, full_matrices=False)
    kept = min(factor.rank, sigma.numel())
    roots = sigma[:kept].sqrt()
    converted = Factor((roots[:, None] * right[:kept]).float(), (left[:, :kept] * roots).float(), 1.0)
    error = float(sigma[kept:].norm() / sigma.norm()) if sigma.any() else 0.0
    return converted, f"{path}: DoRA converted at rank {factor.rank}, relative error {error:.3g}"
