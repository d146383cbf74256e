"""Modules trained in full (``modules_to_save``) and rows of tokens: which are the base's own, and their updates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from nsc_merge.adapters import Adapter, Factor
from nsc_merge.adapters.adapter import TokenRows
from nsc_merge.models.bases.quantised import Linear, is_linear, is_quantised, stored_or_dequantised
from nsc_merge.models.bases.stored_weights import numbers_of
from nsc_merge.models.merged.whole import site_of
from nsc_merge.models.traits import classifiers, configs_to_untie, input_embeddings, output_embeddings

# Embeddings and heads as PEFT knows them by name.
_SAVED = ("embed_tokens.weight", "lm_head.weight", "lm_head.bias")


def own_tensors(model: nn.Module, trunk: nn.Module) -> set[str]:
    """Names of the parameters and buffers that are the base's own, and no task's head."""
    named = _tensors(model)
    if output_embeddings(model) is not None:
        return set(named)
    inside = {id(value) for value in _tensors(trunk).values()}
    return {name for name, value in named.items() if id(value) in inside} - classifier_tensors(model)


def classifier_tensors(model: nn.Module) -> set[str]:
    """Names of the parameters and buffers of a classifier that the model itself points out, wherever it is."""
    held = {id(value) for part in classifiers(model) for value in _tensors(part).values()}
    return {name for name, value in _tensors(model).items() if id(value) in held} if held else set()


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def check_base(task: str, saved: Mapping[str, Tensor], model: nn.Module) -> None:
    """Refuse an adapter of another base, as far as weights of the base were saved with it.

    Where they are the model's, they change nothing, whatever module they are of.
    """
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
                "as that was (resize_token_embeddings); nsc_merge.merge(..., added_tokens='mean') resizes it to "
                "the largest vocabulary"
            )
        # One of the two may have been rounded to the other's dtype.
        mine = numbers_of(model, name, base).detach().cpu()
        if not (torch.equal(mine.to(value.dtype), value) or torch.equal(mine, value.to(mine.dtype))):
            if not _is_saved_along(model, name, owner):
                raise ValueError(
                    f"adapters[{task!r}]: {name} is in the adapter's file, differs from the model's and is neither "
                    f"LoRA nor of modules_to_save, nor of an embedding or head of {type(model).__name__}, whose "
                    "weights PEFT saves along; expected modules_to_save to name what was trained in full, or a file "
                    "without it"
                )
            raise ValueError(
                f"adapters[{task!r}]: {name} of the base was saved with the adapter and differs from the model's; "
                "expected the base that it was trained on, with these values in it"
            )


def _is_saved_along(model: nn.Module, name: str, owner: nn.Module | None) -> bool:
    """Whether a weight is of an embedding or head, which PEFT saves without being told to."""
    return name.endswith(_SAVED) or owner in (input_embeddings(model), output_embeddings(model))


def is_unchanged(model: nn.Module, name: str, value: Tensor) -> bool:
    """Whether a parameter that an adapter holds in full is the base's, in the dtype that it was saved in."""
    base = base_value(model, name)
    return base.shape == value.shape and torch.equal(base.to(value.dtype), value.cpu())


def base_value(model: nn.Module, name: str) -> Tensor:
    """The base's numbers of a parameter or buffer, on the CPU; of a quantised linear, those that it computes with."""
    owner = model.get_submodule(name.rpartition(".")[0])
    if is_linear(owner):
        return stored_or_dequantised(model, name).whole().detach().cpu()
    parameter = name.rpartition(".")[2]
    held = owner._buffers.get(parameter)
    return numbers_of(model, name, model.get_parameter(name) if held is None else held).detach().cpu()


def updates_of_whole(
    task: str, trained: Mapping[str, Tensor], model: nn.Module
) -> tuple[dict[str, Factor], dict[str, str]]:
    """The updates of modules trained in full, by path, and what to note of every module.

    Parameters that are the base's to the last bit are left out: mergekit-extract-lora saves whatever it does not
    decompose, changed or not.
    """
    values: dict[str, dict[str, Tensor]] = {}
    for name, value in trained.items():
        path, _, parameter = name.rpartition(".")
        values.setdefault(path, {})[parameter] = value
    factors, notes = {}, {}
    for path, tensors in values.items():
        what = f"adapters[{task!r}]: {path}"
        changed = {part: value for part, value in tensors.items() if not is_unchanged(model, f"{path}.{part}", value)}
        if not changed:
            notes[path] = "saved in full with the base's values: left out"
            continue
        _refuse_buffers(what, changed, model.get_submodule(path))
        _check_kind(what, path, model)
        factors[path] = _dense(what, path, changed, model)
        notes[path] = "trained in full, the base's own: shared and merged (shared_modules)"
    return factors, notes


def _refuse_buffers(what: str, changed: Iterable[str], module: nn.Module) -> None:
    """Refuse statistics that training moved, as of a BatchNorm: between tasks they are not linear."""
    buffers = sorted(set(changed) & module._buffers.keys())
    if buffers:
        raise ValueError(
            f"{what} was trained in full (modules_to_save) and all tasks share it, but its {buffers[0]} is a buffer "
            f"that differs from the base's, and only parameters can be merged, found {type(module).__name__}; expected "
            "an adapter trained with this module in eval mode, or without it in modules_to_save"
        )


def _check_kind(what: str, path: str, model: nn.Module) -> None:
    """Refuse what is no linear, embedding or convolution in one group, nor a norm with one number per channel."""
    module = model.get_submodule(path)
    if is_linear(module) or site_of(module) is not None:
        return
    own = dict(module.named_parameters(recurse=False))
    raise ValueError(
        f"{what} was trained in full (modules_to_save) and all tasks share it, but only linears, embeddings, norms and "
        f"convolutions in one group can be merged, found {type(module).__name__} with parameters {sorted(own)}; "
        "expected an adapter that leaves it as the base has it: train without it in modules_to_save"
    )


def _dense(what: str, path: str, tensors: Mapping[str, Tensor], model: nn.Module) -> Factor:
    """The update of a module that was trained in full, as one of a matrix ``[d_out, d_in]``: of a norm ``[d, 1]``."""
    module = model.get_submodule(path)
    _refuse_tied(what, path, model)
    deltas = {}
    for parameter, value in tensors.items():
        base = base_value(model, f"{path}.{parameter}")
        if value.shape != base.shape:
            raise ValueError(
                f"{what}.{parameter}: expected shape {list(base.shape)}, found {list(value.shape)}: expected the base "
                "that it was trained on, or one resized as that was (resize_token_embeddings); of a classifier, which "
                "each task has of its own, a model that says so as timm's do: model.get_classifier = lambda: "
                f"model.{path}"
            )
        deltas[parameter] = (value.double().cpu() - base.double()).float()
    if is_linear(module):
        linear: Linear = module
        shape = torch.Size((linear.out_features, linear.in_features))
    else:
        shape = module.get_parameter("weight").shape
    weight = deltas["weight"] if "weight" in deltas else torch.zeros(shape, dtype=torch.float32, device="cpu")
    if not is_linear(module):
        # Of a convolution, the kernel belongs to the inputs of an output.
        weight = weight[:, None] if weight.dim() == 1 else weight.flatten(1)
    return Factor.of_matrix(weight, deltas.get("bias"))


def update_of_rows(task: str, path: str, rows: TokenRows, model: nn.Module) -> Factor:
    """The update of an embedding, or head, of which some tokens' rows were trained: its ``B`` picks them.

    Raises:
        ValueError: if the model has no such rows, or if its weight is another's too (tied).
    """
    what = f"adapters[{task!r}]: {path}"
    module = model.get_submodule(path)
    if not (is_linear(module) or isinstance(module, nn.Embedding)):
        raise ValueError(
            f"{what}: trainable_token_indices are rows of an embedding or a linear head, found "
            f"{type(module).__name__}; expected the base that the adapter was trained on"
        )
    _refuse_tied(what, path, model)
    base = base_value(model, f"{path}.weight")
    if rows.values.shape != (len(rows.indices), base.shape[1]) or max(rows.indices) >= base.shape[0]:
        raise ValueError(
            f"{what}: trainable_token_indices up to {max(rows.indices)} of width {list(rows.values.shape[1:])}, found "
            f"a weight of shape {list(base.shape)}; expected the base that it was trained on, or one resized as that "
            "was (resize_token_embeddings)"
        )
    chosen = torch.tensor(rows.indices, device="cpu")
    change = (rows.values.double().cpu() - base[chosen].double()).float()
    picks = torch.zeros(base.shape[0], len(chosen), dtype=torch.float32, device="cpu")
    picks[chosen, torch.arange(len(chosen), device="cpu")] = 1.0
    return Factor(change, picks, 1.0)


def _refuse_tied(what: str, path: str, model: nn.Module) -> None:
    weight = getattr(model.get_submodule(path), "weight", None)
    named = model.named_parameters(remove_duplicate=False)
    tied = [name for name, value in named if value is weight and name != f"{path}.weight"]
    if tied:
        setting = " and model.config.tie_word_embeddings = False" if configs_to_untie(model) else ""
        raise ValueError(
            f"{what} was trained in full on its own, but in the model its weight is {tied[0]} too (tied); expected a "
            "base whole on one device and not quantised, which nsc_merge.merge unties by itself, or one "
            f"with a copy: model.{path}.weight = torch.nn.Parameter(model.{path}.weight.detach().clone()){setting}"
        )


def by_policy(adapters: dict[str, Adapter], policy: str) -> dict[str, Adapter]:
    """Adapters whose modules trained in full have coefficients as ``shared_modules`` says."""
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
